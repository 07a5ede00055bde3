# SPDX-License-Identifier: Apache-2.0
"""The command that makes an engine again, the same one as far as engine.json tells, for a library and a GPU."""

from __future__ import annotations

import shlex
from pathlib import Path

from shadowc.runtime.graph_file import read_graph
from shadowc.runtime.tensorrt.bindings import TARGETS
from shadowc.spec.errors import VerificationError
from shadowc.spec.manifest import EngineManifest, SparsityPart, TensorRtPart, TrtFamily
from shadowc.spec.options import WEIGHTS, CollectOptions, CompileOptions, TrainOptions

RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""What TensorRT for RTX 1.7 can build for."""
RTX_PORTABLE = ("8.0", "8.6", "8.9", "12.0")
"""What it builds for if nothing else is asked for; cards above the last one run the plan too."""
LOWEST_CAPABILITY = "7.5"
"""The plugin has no code for older cards."""
RTX_HALF_ONLY = ("7.5",)
"""Those without float32 products."""
_DUMMY = "dummy-"
"""How the source of random weights begins; their seed comes next."""


def needs_float32(weights: str, predicted: bool) -> bool:
    """Whether an engine computes float32 products: its weights are, or it has a predictor."""
    return weights == "fp32" or predicted


def command(manifest: EngineManifest, family: TrtFamily, capability: str = "", *, skip_zeros: bool = True) -> str:
    """What to type to have the engine again.

    Args:
        manifest: of the engine.
        family: the library to build with; where it cannot build for the card, another target is named.
        capability: the card that must run it, such as "8.6"; empty: those that it was built for.
        skip_zeros: see `skips_zeros`.
    """
    target: str = TARGETS[family]
    cards: tuple[str, ...] = ()
    if target == "tensorrt-rtx":
        possible = rtx_cards(manifest, capability)
        target, cards = ("tensorrt", ()) if possible is None else (target, possible)
    if capability and numbers(capability) < numbers(LOWEST_CAPABILITY):
        target, cards = "cpu", ()
    words = ["shadowc", "compile", "--model", manifest.model.name, "--target", target]
    if manifest.weights != WEIGHTS[target][0] and manifest.weights in WEIGHTS[target]:
        words += ["--weights", manifest.weights]
    limits = {} if target == "cpu" else _limits(manifest)
    for flag, value in {**limits, **_sparsity(manifest.sparsity), **_origin(manifest)}.items():
        words += [flag, value]
    words += [] if skip_zeros else ["--no-skip-zeros"]
    for card in cards:
        words += ["--compute-capability", card]
    return shlex.join([*words, "--out", "FOLDER"])


def skips_zeros(graph: Path) -> bool:
    """Whether a decode graph leaves out the second half of neurons whose ReLU is 0; also true if it cannot be read."""
    try:
        nodes = read_graph(graph).graph.node
    except VerificationError:
        return True
    return all(attribute.i for node in nodes for attribute in node.attribute if attribute.name == "skip_zeros")


def rtx_cards(manifest: EngineManifest, capability: str) -> tuple[str, ...] | None:
    """What TensorRT for RTX is to be told to build for, so that a card runs the engine.

    Returns:
        empty where its default will do; None where it cannot build this engine for the card.
    """
    chosen = _chosen(manifest.tensorrt)
    if not capability or capability in chosen:
        return chosen
    if capability in RTX_HALF_ONLY and needs_float32(manifest.weights, manifest.sparsity is not None):
        return None
    if capability in RTX_CAPABILITIES:
        return () if not chosen and covers(RTX_PORTABLE, RTX_PORTABLE[-1], capability) else (capability,)
    return () if covers((), RTX_PORTABLE[-1], capability) else None


def covers(listed: tuple[str, ...], portable_above: str | None, capability: str) -> bool:
    """Whether a plan for the listed cards, and for those from `portable_above` on, runs on a card."""
    return capability in listed or (portable_above is not None and numbers(capability) >= numbers(portable_above))


def numbers(capability: str) -> tuple[int, int]:
    """`"8.6"` as numbers that compare."""
    major, minor = capability.split(".")
    return int(major), int(minor)


def _chosen(part: TensorRtPart | None) -> tuple[str, ...]:
    """The cards that were asked for; an engine of the default runs on newer ones too, other families ask for none."""
    asked = part is not None and part.family == "rtx1" and part.portable_above is None
    return part.compute_capabilities if part is not None and asked else ()


def _origin(manifest: EngineManifest) -> dict[str, str]:
    source = manifest.model.source
    if not source.startswith(_DUMMY):
        return {}
    seed = source.removeprefix(_DUMMY).split("-")[0]
    return {"--load-format": "dummy", **({"--seed": seed} if seed != "0" else {})}


def _limits(manifest: EngineManifest) -> dict[str, str]:
    part = manifest.tensorrt
    if part is None:
        return {}
    flags = {"--max-batch": str(part.max_batch)} if part.max_batch != _default("max_batch") else {}
    if part.max_context != manifest.model.positions:
        flags["--max-context"] = str(part.max_context)
    return flags


def _sparsity(part: SparsityPart | None) -> dict[str, str]:
    if part is None:
        return {"--predictor": "none"}
    usual = {
        "head_density": _default("head_density"),
        "neuron_density": _default("neuron_density"),
        "scope": "global",
        "neuron_block": TrainOptions().neuron_block,
        "fill": CollectOptions().fill,
    }
    flags = {
        f"--{name.replace('_', '-')}": str(getattr(part, name))
        for name, value in usual.items()
        if getattr(part, name) != value
    }
    least = {"heads": part.min_active_heads, "neurons": part.min_active_neurons * part.neuron_block}
    flags |= {f"--min-active-{kind}": str(number) for kind, number in least.items() if number}
    exempt = {"--exempt": ",".join(str(layer + 1) for layer in part.exempt)} if part.exempt else {}
    return {**flags, **exempt}


def _default(name: str) -> object:
    return CompileOptions.model_fields[name].default
