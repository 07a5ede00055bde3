# SPDX-License-Identifier: Apache-2.0
"""What the builder says, in sentences that name the cause and the next command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shadowc.runtime.tensorrt.bindings import Messages

_NEEDS_GPU = "this step of the builder needs an NVIDIA GPU and its driver"
NO_LAYERS = "the parser found no layers"
"""What the builder's process says where TensorRT says nothing."""
LESS_MEMORY = "free memory, or compile with a smaller --max-batch and --max-context"
"""The next command wherever memory ran out."""
_KNOWN = (
    ("FP32 GEMM is not supported", "compute capability 7.5 has no float32 products",
     "leave out --compute-capability 7.5, or compile with --weights fp16 and --predictor none"),
    ("formatTacticCombinations", "an operator has no kernel for the types of its inputs", "shadowc doctor"),
    ("Invalid optimization profiles", "the profile is upside down or incomplete", "report this: it is a bug"),
    ("asked for [(", "the builder keeps another profile than it was given", "report this: it is a bug"),
    ("self-consistent", "the sizes that the profile allows cannot occur together", "report this: it is a bug"),
    ("invalid shape profile", "the sizes that the profile allows cannot occur together", "report this: it is a bug"),
    ("missing dimensions in profile", "an input of changing size has no profile", "report this: it is a bug"),
    ("no optimization profile", "an input of changing size has no profile", "report this: it is a bug"),
    ("dedicated kernel", "it has no fused attention for this head size and type", "--weights fp32"),
    ("CUDA_SUCCESS", _NEEDS_GPU, "build on a machine with a GPU"),
    ("Failed to open file", "a file of the graph is missing", "compile again"),
    ("MODEL_DESERIALIZE_FAILED", "the file of the graph is damaged", "compile again"),
    (NO_LAYERS, "the file of the graph is empty", "compile again"),
    ("out of memory", "memory ran out", LESS_MEMORY),
    ("OutOfMemory", "memory ran out", LESS_MEMORY),
    ("bad_alloc", "memory ran out", LESS_MEMORY),
    ("annot allocate memory", "memory ran out", LESS_MEMORY),
    ("MemoryError", "memory ran out", LESS_MEMORY),
)  # fmt: skip
"""Part of a message -> what it means, and what to do."""
_ECHOES = ("cudaError 35", "cudaError 100")
"""Without a driver these stand beside every error, and where there is none."""
_CONTEXT = "ModelImporter.cpp"
"""The parser's lines about where it was; its own list of errors says what was wrong."""


def explained(messages: Messages, refused: Mapping[str, Any], plugin: Path) -> tuple[str, str]:
    """The reason of a refused build and the next command; the reason is empty if nothing was said.

    Args:
        messages: what the builder logged.
        refused: the step that failed: "plugin", "parse", "profile" or "build", with what is known about it.
        plugin: the library of the operators.
    """
    first = first_cause(messages, refused.get("reasons", ()))
    if refused.get("step") == "plugin":
        return _plugin_reason(plugin, first), "install the plugin again (in a checkout: make setup)"
    if "Plugin not found" in first or "IPluginCreator not found" in first:
        registered = ", ".join(refused.get("registered", ())) or "nothing"
        return (
            f"an operator of the graph is not in {plugin.name}, which registered {registered}",
            "install the plugin again (in a checkout: make setup)",
        )
    for part, meaning, hint in _KNOWN:
        telling = next((text for text in (first, *messages.errors) if part in text), None)
        if telling is not None:
            return f"{meaning} ({_short(telling)})", hint
    if any(echo in first for echo in _ECHOES):
        return f"{_NEEDS_GPU} ({_short(first)})", "shadowc doctor"
    nodes = ", ".join(refused.get("nodes", ())[:1])
    return (f"at {nodes}: {_short(first)}" if nodes and first else _short(first)), "shadowc doctor"


def first_cause(messages: Messages, reasons: Sequence[str] = ()) -> str:
    """The first error that tells a cause: neither an echo of the missing driver nor the parser's whereabouts."""
    telling = [text for text in messages.errors if _CONTEXT not in text and not any(echo in text for echo in _ECHOES)]
    return next(iter((*telling, *reasons, *messages.errors)), "")


def _plugin_reason(plugin: Path, first: str) -> str:
    """TensorRT returns nothing whatever is wrong with a library: look at the four causes."""
    if not plugin.is_file():
        return f"the plugin {plugin} is missing"
    if plugin.stem.endswith("_auto"):
        return f"{plugin.name} registers itself and must not be given to the builder; the one without _auto is"
    if "getCreators" in first or "SymbolAddress" in first:
        return f"{plugin} is no plugin library: it exports no getCreators"
    return f"the plugin {plugin} cannot be loaded ({_short(first) or 'no reason was logged'})"


def _short(text: str, most: int = 300) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
