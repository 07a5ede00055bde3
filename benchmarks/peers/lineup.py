# SPDX-License-Identifier: Apache-2.0
"""Who takes part, and what each needs first: its environment, and the checkpoint in its own form."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from benchmarks.peers.environments import PreparationError, logged, python_of
from benchmarks.peers.process import Launch

ROOT = Path(__file__).resolve().parents[2]
OURS = "shadowc"
DENSE = "dense"
TITLES: Mapping[str, str] = MappingProxyType(
    {
        OURS: "shadowc",
        "openvino": "OpenVINO GenAI",
        "ctranslate2": "CTranslate2",
        "transformers": "transformers",
        "onnxruntime": "ONNX Runtime",
    }
)
"""Runtime -> its name in the table. The key is also the name of its file in contestants/."""

WEIGHTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        OURS: ("int8", "int4", "bf16", "fp32"),
        "openvino": ("int8", "int8-sym", "int4"),
        "ctranslate2": ("int8", "bf16", "fp32"),
        "transformers": ("bf16", "fp32"),
        "onnxruntime": ("int8", "fp32"),
    }
)

_SHARE = r"(0(\.\d+)?|1(\.0+)?)"
_DENSITY = f"{_SHARE}/{_SHARE}"


@dataclass(frozen=True, slots=True)
class Entrant:
    """One process of the race: a runtime with one model."""

    label: str
    runtime: str
    weights: str
    settings: tuple[str, ...] = (DENSE,)
    engine: Path | None = None
    """A compiled engine to take as it is; None: made from the checkpoint."""


def entrants(items: Sequence[str], engines: Sequence[str], densities: Sequence[str]) -> list[Entrant]:
    """Read RUNTIME:WEIGHTS and LABEL=FOLDER; shadowc's own have the dense twin and every density as settings.

    Raises:
        ValueError: an item names no runtime, weights that the runtime does not have, a label twice, or no density.
    """
    found = []
    for density in densities:
        if not re.fullmatch(_DENSITY, density):
            raise ValueError(f"{density!r}: expected HEADS/NEURONS, two shares from 0 to 1, for example 0.5/0.2")
    settings = (DENSE, *densities)
    for item in items:
        runtime, _, weights = item.partition(":")
        if runtime not in WEIGHTS or weights not in WEIGHTS[runtime]:
            known = ", ".join(f"{name}:{kind}" for name, kinds in WEIGHTS.items() for kind in kinds)
            raise ValueError(f"{item!r}: expected one of {known}")
        found.append(Entrant(item, runtime, weights, settings if runtime == OURS else (DENSE,)))
    for item in engines:
        label, equals, folder = item.partition("=")
        if not (label and equals and Path(folder).is_dir()):
            raise ValueError(f"{item!r}: expected LABEL=FOLDER with the folder of a compiled engine")
        found.append(Entrant(f"{OURS}:{label}", OURS, label, settings, Path(folder).resolve()))
    labels = [entrant.label for entrant in found]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ValueError(f"{', '.join(twice)}: named twice")
    return found


def prepare(entrant: Entrant, checkpoint: Path, cache: Path, threads: int) -> Launch:
    """Make what is missing, and say how the contestant is started.

    Raises:
        PreparationError: its environment or its model cannot be made.
    """
    python = python_of(entrant.runtime, cache / "environments")
    models = cache / "models" / checkpoint.name
    models.mkdir(parents=True, exist_ok=True)
    name = entrant.label.replace(":", "-")
    environment = _environment(threads)
    module = f"benchmarks.peers.contestants.{entrant.runtime}"
    start = [str(python), "-m", module]
    model = entrant.engine or models / name
    compiled = entrant.runtime == OURS and entrant.engine is None  # which does nothing where it is up to date
    if compiled or not model.is_dir():
        unfinished = model if compiled else models / f"{name}.unfinished"
        if not compiled:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
        options = ["--checkpoint", str(checkpoint), "--model", str(unfinished), "--weights", entrant.weights]
        logged([*start, "prepare", *options], models / f"{name}.prepare.log", f"preparing {entrant.label}", environment)
        if not unfinished.is_dir():
            raise PreparationError(f"preparing {entrant.label} left no folder {unfinished}")
        unfinished.rename(model)
    serve = ["serve", "--model", str(model), "--weights", entrant.weights, "--threads", str(threads)]
    return Launch((*start, *serve), environment, models / f"{name}.run.log")


def _environment(threads: int) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
