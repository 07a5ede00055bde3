# SPDX-License-Identifier: Apache-2.0
"""Where an engine first parts from the masked torch model: layer, tensor, and the stored parameter behind it.

Every tensor is compared with what torch makes of the engine's own tensors before it, under the engine's own masks, so
the first that is out of tolerance is where the error is made. Then the parameters that go into it are compared as they
are stored. It works on engines that `load` refuses because a file has changed: that is what it is for.

Letters: B batch, S tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from shadowc.checkpoint.opt import EMBEDDING, FINAL_NORM, HEAD, POSITIONS, PROJECT_IN, PROJECT_OUT, Affine
from shadowc.measure import parity
from shadowc.measure.against import stored_plan
from shadowc.measure.dequantised import DequantisedSource
from shadowc.measure.layer_walk import STEPS, LayerWalk, steps_of, tensor_names
from shadowc.measure.masks import SMALLEST_SCALE, forced_masks, relative, worse, wrong_selections
from shadowc.measure.stored_weights import stored_as_they_are, stored_parameters
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError, VerificationError
from shadowc.spec.progress import NullProgress, Progress

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy.typing as npt

    from shadowc.checkpoint.opt import OptFacts
    from shadowc.checkpoint.resolve import Checkpoint
    from shadowc.runtime.engine import Engine
    from shadowc.spec.manifest import EngineManifest
    from shadowc.spec.program import SparsityPlan, TensorSource

    Runs = Sequence[Mapping[str, npt.NDArray[np.float32]]]

PARAMETER_TOLERANCE = 1e-6
"""Largest |difference| of a stored parameter from the checkpoint's, rounded as the engine rounds, of its largest."""
REFERENCE_CONTEXT_TOLERANCE = 1e-3
"""Of what attention of reference.onnx gives where the cache is float16: ONNX Runtime stores rounded keys and values,
but attends to those of new tokens before their rounding, of at most 5e-4 each (tiny model, context: 3e-4)."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One tensor of the engine beside torch's."""

    layer: int | None
    """Model layer; None: in front of the first or behind the last one, or the masks of all."""
    tensor: str
    """As the graph names it."""
    made_by: str
    difference: float
    """Largest, of torch's largest value."""
    tolerance: float
    parameters: tuple[str, ...] = ()
    """Names of the parameters that go into it."""

    @property
    def deviates(self) -> bool:
        """Whether it is out of tolerance; a NaN is."""
        return not self.difference <= self.tolerance

    @property
    def where(self) -> str:
        """For people: layer and tensor."""
        return self.tensor if self.layer is None else f"layer {self.layer}, {self.tensor}"


@dataclass(frozen=True, slots=True)
class Altered:
    """A stored parameter that is not the checkpoint's."""

    name: str
    difference: float
    """Largest, of the checkpoint's largest value."""
    at: tuple[int, ...]
    """Index of the largest difference, in the checkpoint's order."""
    values: int
    """How many differ."""


@dataclass(frozen=True, slots=True)
class BisectReport:
    """All tensors in the order in which the engine makes them, and what is behind the first that deviates."""

    folder: str
    compared: tuple[Compared, ...]
    altered: tuple[Altered, ...]
    """Parameters of the first deviation that are not the checkpoint's."""
    matched: tuple[str, ...]
    """Parameters of the first deviation that are; those in neither are stored in a form that is not compared."""
    changed_files: tuple[str, ...]
    """What `verify` would say about the folder."""
    positions: int
    """Token positions that were compared."""
    reference: bool
    """Whether the graph was reference.onnx, without kernels of ours."""

    @property
    def first(self) -> Compared | None:
        """The first tensor that deviates; None: none does."""
        return next((one for one in self.compared if one.deviates), None)

    def require(self) -> None:
        """Raises VerificationError naming the first deviation."""
        if self.first is None:
            return
        raise VerificationError(
            f"{self.folder} parts from torch at {self.first.where} ({self.first.made_by}): {self.first.difference:.1e} "
            f"of the largest value, tolerance {self.first.tolerance:.0e}",
            hint=self._hint(self.first),
            problems=[
                f"{one.name} is stored with {one.values} other values, the worst at {list(one.at)} "
                f"({one.difference:.1e} of the largest)"
                for one in self.altered
            ] + list(self.changed_files),
        )  # fmt: skip

    def _hint(self, first: Compared) -> str:
        if self.altered or self.changed_files:
            return "compile the engine again"
        unseen = [name for name in first.parameters if name not in self.matched]
        known = f"{', '.join(self.matched)}: as in the checkpoint; " if self.matched else ""
        known += f"{', '.join(unseen)}: stored in a form that is not compared; " if unseen else ""
        if not self.reference:
            return f"{known}run it again with --reference to tell a kernel from the graph"
        return f"{known}the graph{' or one of the latter' if unseen else ''} is wrong: compile the engine again"


def bisect(
    folder: Path,
    model: str | None = None,
    *,
    load_format: Literal["auto", "dummy"] | None = None,
    offline: bool = False,
    seed: int | None = None,
    reference: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> BisectReport:
    """Compare an engine of target cpu with its checkpoint, tensor by tensor.

    Args:
        folder: the engine; its files may have changed, but not their sizes.
        model: name or path of the checkpoint; None: the name that the engine was compiled with.
        load_format: None: as the engine was compiled.
        offline: do not use the network.
        seed: of dummy weights; None: as the engine was compiled.
        reference: look at reference.onnx in stock ONNX Runtime, which has no kernels of ours.
        threads: of the engine.
        progress: told about layers.

    Raises:
        InputError: the engine was compiled from another checkpoint.
        UnsupportedError: it is of another target.
        VerificationError: a file is missing or has another size.
    """
    from shadowc.checkpoint.resolve import resolve
    from shadowc.runtime.load import load_cpu
    from shadowc.runtime.verification import file_problems, read_manifest

    progress = progress or NullProgress()
    manifest = read_manifest(folder)
    dummy, compiled_seed = compiled_from(manifest)
    engine = load_cpu(folder, threads=threads, verify=False, reference=reference, exact_prompts=True, mask=None)
    with progress.stage("checkpoint"):
        checkpoint = resolve(
            model or manifest.model.name,
            load_format=load_format or ("dummy" if dummy else "auto"),
            offline=offline,
            seed=compiled_seed if seed is None else seed,
        )
    if checkpoint.identity != manifest.model.source:
        raise InputError(
            f"{folder} was compiled from another checkpoint than {model or manifest.model.name}: "
            f"expected {manifest.model.source[:16]}, found {checkpoint.identity[:16]}",
            hint=f"shadowc bisect {folder} --against CHECKPOINT",
        )
    with progress.stage("files"):
        changed = tuple(file_problems(folder, manifest, remember=False))
    with progress.stage("tensors"):
        compared, positions = _compare(engine, checkpoint, progress, reference=reference)
    first = next((one for one in compared if one.deviates), None)
    altered, matched = ((), ()) if first is None else _stored(engine, _truth(engine, checkpoint), first)
    return BisectReport(str(folder), compared, altered, matched, changed, positions, reference)


def compiled_from(manifest: EngineManifest) -> tuple[bool, int]:
    """Whether an engine was compiled from dummy weights, and their seed."""
    kind, _, rest = manifest.model.source.partition("-")
    return (True, int(rest.partition("-")[0])) if kind == "dummy" else (False, 0)


def _truth(engine: Engine, checkpoint: Checkpoint) -> TensorSource:
    weights = engine.manifest.weights
    return checkpoint.weights if weights == "fp32" else DequantisedSource(
        checkpoint.weights, engine.head_block(), weights
    )  # fmt: skip


def _compare(
    engine: Engine, checkpoint: Checkpoint, progress: Progress, *, reference: bool
) -> tuple[tuple[Compared, ...], int]:
    facts, sparsity, weights = checkpoint.facts, engine.manifest.sparsity, engine.manifest.weights
    graph, truth = engine.graph(), _truth(engine, checkpoint)
    names = {layer: tensor_names(graph, layer) for layer in range(facts.layers)}
    shown = ["residual.0", *(name for of in names.values() for name in of.values() if not name.startswith("cached."))]
    ids_BS, prefill, masked = parity.tokens_of(facts)
    densities: tuple[Density, ...] = parity.DENSITIES if sparsity else parity.DENSITIES[:1]
    new_probe = engine.prober(shown)
    runs = [parity.run_of(new_probe(), ids_BS, density, prefill, masked, shown) for density in densities]
    tolerance = parity.LAYER_TOLERANCE[weights]
    found = [
        Compared(
            None, "residual.0", "both embeddings", parity.embedding_difference(runs[0], ids_BS, facts, truth),
            tolerance, (EMBEDDING, POSITIONS, PROJECT_IN) if facts.projected else (EMBEDDING, POSITIONS),
        )
    ]  # fmt: skip
    tolerances = dict.fromkeys(STEPS, tolerance)
    if reference and weights != "fp32":
        tolerances["context"] = REFERENCE_CONTEXT_TOLERANCE
    for layer in range(facts.layers):
        walk = LayerWalk(facts, truth, layer)
        found += _layer(walk, layer, names[layer], runs, engine, checkpoint, tolerances)
        if layer == 0 and sparsity is not None:
            found.append(_selection(runs, stored_plan(engine, sparsity), densities, masked))
        progress.advance(layer + 1, facts.layers, "layers")
    logits = reduce(worse, (parity.logits_difference(run, facts, truth) for run in runs))
    found.append(_logits(facts, logits, parity.LOGITS_TOLERANCE[weights]))
    return tuple(found), ids_BS.shape[1] * len(runs)


def _logits(facts: OptFacts, difference: float, tolerance: float) -> Compared:
    norm = Affine.of(FINAL_NORM)
    made_by: dict[str, tuple[str, ...]] = {"final norm": (norm.weight, norm.bias)} if facts.final_norm else {}
    made_by |= {"project_out": (PROJECT_OUT,)} if facts.projected else {}
    parameters = tuple(name for names in made_by.values() for name in names)
    return Compared(None, "logits", " and ".join((*made_by, "LM head")), difference, tolerance, (*parameters, HEAD))


def _layer(
    walk: LayerWalk,
    layer: int,
    names: Mapping[str, str],
    runs: Runs,
    engine: Engine,
    checkpoint: Checkpoint,
    tolerances: Mapping[str, float],
) -> list[Compared]:
    sparsity = engine.manifest.sparsity
    block, order_F = 1 if sparsity is None else sparsity.neuron_block, engine.neuron_orders().get(layer)
    worst: dict[str, float] = {}
    for run in runs:
        masks = forced_masks(run, layer, checkpoint.facts, block, order_F)
        seen = {step: torch.from_numpy(run[name]) for step, name in names.items()}
        differences = walk.differences(torch.from_numpy(run[f"residual.{layer}"]), *masks, seen)
        worst = {step: worse(worst.get(step, 0.0), value) for step, value in differences.items()}
    return [
        Compared(layer, names[step.tensor], step.made_by, worst[step.tensor], tolerances[step.tensor], step.parameters)
        for step in steps_of(layer, names, norm_first=checkpoint.facts.norm_first)
    ]


def _selection(runs: Runs, plan: SparsityPlan, densities: Sequence[Density], masked: int) -> Compared:
    """Thresholds that scores and density do not give, as a share of all."""
    tokens = masked + parity.DECODE_TOKENS
    wrong = sum(wrong_selections(run, plan, density, tokens) for run, density in zip(runs, densities, strict=True))
    every = sum(run[f"threshold.{kind}"].size for run in runs for kind in ("heads", "neurons"))
    return Compared(None, "threshold.heads, threshold.neurons", "SelectThreshold", wrong / max(every, 1), 0.0)


def _stored(engine: Engine, truth: TensorSource, first: Compared) -> tuple[tuple[Altered, ...], tuple[str, ...]]:
    """Of the parameters behind a tensor: those that are not the checkpoint's, and the names of those that are."""
    stored = (
        stored_as_they_are(engine, first.parameters)
        if first.layer is None
        else stored_parameters(engine, first.layer)
    )  # fmt: skip
    found, matched = [], []
    for name in (name for name in first.parameters if name in stored):
        exact = truth.tensor(name)
        difference = np.abs(stored[name] - exact)
        scale = float(np.abs(exact).max())
        wrong = ~(difference <= PARAMETER_TOLERANCE * max(scale, SMALLEST_SCALE))
        if wrong.any():
            at = np.unravel_index(int(np.argmax(np.where(np.isnan(difference), np.inf, difference))), difference.shape)
            found.append(Altered(name, relative(float(difference[at]), scale), tuple(map(int, at)), int(wrong.sum())))
        else:
            matched.append(name)
    return tuple(found), tuple(matched)
