# SPDX-License-Identifier: Apache-2.0
"""Where an engine first parts from the masked torch model: layer, tensor, and the stored parameter behind it.

Every tensor is compared with what torch makes of the engine's own tensors before it, under the engine's own masks, so
the first that is out of tolerance is where the error is made. Then the parameters that go into it are compared as they
are stored. It works on engines that `load` refuses because a file has changed: that is what it is for.

Where masks hold for a sequence, model.onnx comes first, since it makes the scores; then decode_fixed.onnx under the
mask of a prompt's last token, which must have the scores that model.onnx gives that token.

Letters: B batch, S tokens, Z masked tokens, L predicted layers, N units of a kind.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from shadowc.checkpoint.opt import EMBEDDING, FINAL_NORM, HEAD, POSITIONS, PROJECT_IN, PROJECT_OUT, Affine
from shadowc.measure import parity
from shadowc.measure.against import stored_plan
from shadowc.measure.bisect_report import Altered, BisectReport, Compared
from shadowc.measure.dequantised import DequantisedSource, filled_source
from shadowc.measure.layer_walk import STEPS, LayerWalk, steps_of, tensor_names
from shadowc.measure.masks import SMALLEST_SCALE, forced_masks, relative, worse, wrong_selections
from shadowc.measure.stored_weights import stored_as_they_are, stored_parameters
from shadowc.runtime.sequence_engine import SequenceEngine
from shadowc.runtime.stored import StoredGraph, require_exact_products
from shadowc.spec.density import UNIT_KINDS, Density
from shadowc.spec.errors import InputError, VerificationError
from shadowc.spec.manifest import FIXED_FILE, MODEL_FILE, REFERENCE_FILE
from shadowc.spec.progress import NullProgress, Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy.typing as npt
    import onnx

    from shadowc.checkpoint.opt import OptFacts
    from shadowc.checkpoint.resolve import Checkpoint
    from shadowc.measure.parity import Probe
    from shadowc.runtime.engine import Engine
    from shadowc.spec.manifest import EngineManifest
    from shadowc.spec.program import SparsityPlan, TensorSource

    Runs = Sequence[Mapping[str, npt.NDArray[np.float32]]]

PARAMETER_TOLERANCE = 1e-6
"""Largest |difference| of a stored parameter from the checkpoint's, rounded as the engine rounds, of its largest."""


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
        reference: look at reference.onnx in stock ONNX Runtime, which has no kernels of ours (decode_fixed.onnx: the
            same graph with the operators as functions).
        threads: of the engine.
        progress: told about layers.

    Raises:
        InputError: the engine was compiled from another checkpoint.
        UnsupportedError: it is of another target.
        VerificationError: a file is missing or has another size.
    """
    from shadowc.checkpoint.resolve import resolve
    from shadowc.emit.folder import MEANS_FILE
    from shadowc.runtime.load import load_cpu
    from shadowc.runtime.verification import RECOMPILE, file_problems, read_manifest

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
    require_exact_products(engine.graph(), folder)
    with progress.stage("files"):
        changed = tuple(file_problems(folder, manifest, remember=False))
        if said := [problem for problem in changed if MEANS_FILE in problem]:
            raise VerificationError(
                f"{said[0]}; it says what the biases of skipped heads should hold, so nothing can be compared with it",
                hint=RECOMPILE,
            )
    with progress.stage("tensors"):
        densities = parity.DENSITIES if manifest.sparsity else parity.DENSITIES[:1]
        graphs = _graphs(engine, checkpoint.facts, densities, reference=reference)
        compared = _compare(engine, checkpoint, graphs, densities, progress, reference=reference)
    first = next((one for one in compared if one.deviates), None)
    altered, matched = ((), ()) if first is None else _stored(graphs, _truth(engine, checkpoint), first)
    positions = sum(run["residual.0"].shape[1] for graph in graphs for run in graph.runs)
    return BisectReport(str(folder), compared, altered, matched, changed, positions, reference)


def compiled_from(manifest: EngineManifest) -> tuple[bool, int]:
    """Whether an engine was compiled from dummy weights, and their seed."""
    kind, _, rest = manifest.model.source.partition("-")
    return (True, int(rest.partition("-")[0])) if kind == "dummy" else (False, 0)


def _truth(engine: Engine, checkpoint: Checkpoint) -> TensorSource:
    weights, filled = engine.manifest.weights, filled_source(checkpoint.weights, engine.head_means())
    return filled if weights == "fp32" else DequantisedSource(filled, weights)


@dataclass(frozen=True, slots=True)
class _Graph:
    """A graph of an engine, and what it gave."""

    file: str
    stored: StoredGraph
    names: Mapping[int, Mapping[str, str]]
    """Model layer -> step -> the graph's name of its tensor."""
    runs: Runs
    """One per density."""
    masked: int
    """Masked tokens of each run."""
    call_starts: torch.Tensor
    """[S]: where the call in which each token was new begins."""
    mask_scores: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    """Scores [B,1,L,N] of heads and of neurons that should hold in this graph; empty where none do."""

    def every_head_written(self, layer: int) -> bool:
        """Whether the cache gets keys and values of inactive heads too."""
        node = next(node for node in self.stored.model.graph.node if node.name == f"layers.{layer}.attention")
        kv: bytes = next(attribute.s for attribute in node.attribute if attribute.name == "kv")
        return kv == b"all"


def _graphs(engine: Engine, facts: OptFacts, densities: Sequence[Density], *, reference: bool) -> list[_Graph]:
    """The graphs of an engine in the order in which they depend on each other, run on the same tokens."""
    ids_BS, prefill, masked = parity.tokens_of(facts)

    def ran(file: str, model: onnx.ModelProto, prober: Callable[[list[str]], Callable[[], Probe]], tail: int) -> _Graph:
        names = {layer: tensor_names(model, layer) for layer in range(facts.layers)}
        made = (name for of in names.values() for name in of.values() if not name.startswith("cached."))
        shown = ["residual.0", *made]
        new_probe = prober(shown)
        runs = [parity.run_of(new_probe(), ids_BS, density, prefill, tail, shown) for density in densities]
        # decode_fixed.onnx reads a prompt's dense tokens in a call of their own.
        second = prefill - tail if file == FIXED_FILE else 0
        starts_S = torch.arange(ids_BS.shape[1])
        starts_S[:second], starts_S[second:prefill] = 0, second
        return _Graph(file, StoredGraph(model, engine.folder, engine.manifest), names, runs, tail, starts_S)

    graphs = [ran(REFERENCE_FILE if reference else MODEL_FILE, engine.graph(), engine.prober, masked)]
    if isinstance(engine, SequenceEngine):
        prober = partial(engine.fixed_prober, every_head=False)
        # One less: the first token that has scores in the other graph makes the mask here.
        held = ran(FIXED_FILE, engine.fixed_graph(), prober, masked - 1)
        graphs.append(replace(held, mask_scores=_mask_scores(engine.prober([])(), ids_BS, prefill - masked)))
    return graphs


def _mask_scores(probe: Probe, ids_BS: npt.NDArray[np.int64], token: int) -> Mapping[str, npt.NDArray[np.float32]]:
    """Scores [B,1,L,N] that a token has in a call of its own, as the engine asks for them: it sees a rounded cache."""
    if token:
        probe.step(ids_BS[:, :token], density=Density(), sparse_tail=0)
    shown = probe.step(ids_BS[:, token : token + 1], density=Density(), sparse_tail=1)
    return {name: shown[name] for name in (f"scores.{kind}" for kind in UNIT_KINDS)}


def _compare(
    engine: Engine, checkpoint: Checkpoint, graphs: Sequence[_Graph], densities: Sequence[Density], progress: Progress,
    *, reference: bool,
) -> tuple[Compared, ...]:  # fmt: skip
    facts, sparsity = checkpoint.facts, engine.manifest.sparsity
    truth, ids_BS = _truth(engine, checkpoint), parity.tokens_of(facts)[0]
    tolerances = dict.fromkeys(STEPS, parity.LAYER_TOLERANCE)
    # Where the cache is float16 ONNX Runtime stores rounded keys and values, but attends to those of a call's own
    # tokens before their rounding.
    new_are_exact = reference and engine.manifest.weights != "fp32"
    found = [[_embedding(graph, ids_BS, facts, truth, tolerances["output"])] for graph in graphs]
    for layer in range(facts.layers):
        walk = LayerWalk(facts, truth, layer)
        for graph, of_graph in zip(graphs, found, strict=True):
            of_graph += _layer(walk, layer, graph, engine, checkpoint, tolerances, new_are_exact=new_are_exact)
            if layer == 0 and graph is not graphs[0]:
                of_graph.append(_held_scores(graph, graphs[0].file, parity.SCORES_TOLERANCE))
            if layer == 0 and sparsity is not None:
                of_graph.append(_selection(graph, stored_plan(engine, sparsity), densities))
        progress.advance(layer + 1, facts.layers, "layers")
    for graph, of_graph in zip(graphs, found, strict=True):
        of_graph.append(_logits(graph, facts, truth, parity.LOGITS_TOLERANCE))
    return tuple(one for of_graph in found for one in of_graph)


def _embedding(
    graph: _Graph, ids_BS: npt.NDArray[np.int64], facts: OptFacts, truth: TensorSource, tolerance: float
) -> Compared:
    difference = parity.embedding_difference(graph.runs[0], ids_BS, facts, truth)
    parameters = (EMBEDDING, POSITIONS, PROJECT_IN) if facts.projected else (EMBEDDING, POSITIONS)
    return Compared(None, "residual.0", "both embeddings", difference, tolerance, parameters, graph.file)


def _logits(graph: _Graph, facts: OptFacts, truth: TensorSource, tolerance: float) -> Compared:
    difference = reduce(worse, (parity.logits_difference(run, facts, truth) for run in graph.runs))
    norm = Affine.of(FINAL_NORM)
    made_by: dict[str, tuple[str, ...]] = {"final norm": (norm.weight, norm.bias)} if facts.final_norm else {}
    made_by |= {"project_out": (PROJECT_OUT,)} if facts.projected else {}
    parameters = (*(name for names in made_by.values() for name in names), HEAD)
    return Compared(None, "logits", " and ".join((*made_by, "LM head")), difference, tolerance, parameters, graph.file)


def _layer(
    walk: LayerWalk,
    layer: int,
    graph: _Graph,
    engine: Engine,
    checkpoint: Checkpoint,
    tolerances: Mapping[str, float],
    *,
    new_are_exact: bool,
) -> list[Compared]:
    sparsity, names = engine.manifest.sparsity, graph.names[layer]
    block, order_F = 1 if sparsity is None else sparsity.neuron_block, engine.neuron_orders().get(layer)
    written = graph.every_head_written(layer)
    worst: dict[str, float] = {}
    for run in graph.runs:
        masks = forced_masks(run, layer, checkpoint.facts, block, order_F)
        seen = {step: torch.from_numpy(run[name]) for step, name in names.items()}
        x_BSE = torch.from_numpy(run[f"residual.{layer}"])
        differences = walk.differences(
            x_BSE,
            *masks,
            seen,
            every_head_written=written,
            call_starts_S=graph.call_starts if new_are_exact else None,
        )
        worst = {step: worse(worst.get(step, 0.0), value) for step, value in differences.items()}
    return [
        Compared(
            layer, names[step.tensor], step.made_by, worst[step.tensor], tolerances[step.tensor], step.parameters,
            graph.file,
        )
        for step in steps_of(layer, names, norm_first=checkpoint.facts.norm_first)
    ]  # fmt: skip


def _held_scores(held: _Graph, predicting: str, tolerance: float) -> Compared:
    """The scores [B,Z,L,N] that hold, beside those that should."""
    worst = 0.0
    for run in held.runs:
        for name, wanted_B1LN in held.mask_scores.items():
            difference_LN = np.abs(run[name] - wanted_B1LN).max(axis=(0, 1))
            for difference_N, wanted_BN in zip(difference_LN, wanted_B1LN[:, 0].swapaxes(0, 1), strict=True):
                worst = worse(worst, relative(float(difference_N.max()), float(np.ptp(wanted_BN))))
    made_by = f"predictor of {predicting}, at the prompt's last token"
    return Compared(None, "mask_scores.heads, mask_scores.neurons", made_by, worst, tolerance, (), held.file)


def _selection(graph: _Graph, plan: SparsityPlan, densities: Sequence[Density]) -> Compared:
    """Thresholds that scores and density do not give, as a share of all."""
    tokens, runs = graph.masked + parity.DECODE_TOKENS, graph.runs
    wrong = sum(wrong_selections(run, plan, density, tokens) for run, density in zip(runs, densities, strict=True))
    every = sum(run[f"threshold.{kind}"].size for run in runs for kind in UNIT_KINDS)
    share = wrong / max(every, 1)
    return Compared(None, "threshold.heads, threshold.neurons", "SelectThreshold", share, 0.0, (), graph.file)


def _stored(
    graphs: Sequence[_Graph], truth: TensorSource, first: Compared
) -> tuple[tuple[Altered, ...], tuple[str, ...]]:
    """Of the parameters behind a tensor: those that are not the checkpoint's, and the names of those that are."""
    graph = next(graph.stored for graph in graphs if graph.file == first.graph)
    stored = (
        stored_as_they_are(graph, first.parameters) if first.layer is None else stored_parameters(graph, first.layer)
    )
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
