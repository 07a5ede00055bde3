# SPDX-License-Identifier: Apache-2.0
"""The gate of every compile: parity A of what was written, before it gets its name.

An engine for the CPU runs. An engine for TensorRT cannot run without a GPU; its graphs are run instead, with its own
weights.bin, by stock ONNX Runtime with the operators as functions and activations in float32. What that leaves
unchecked (TensorRT's kernels and shadowc's, and 16-bit rounding between them) is said in engine.json.

Letters: B batch, S tokens, H heads, D head size, T slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shadowc.measure.masks import relative, worse
from shadowc.measure.parity import DECODE_TOKENS, PREFILL_TOKENS, check_parity
from shadowc.spec.density import Density
from shadowc.spec.errors import InternalError, VerificationError
from shadowc.spec.manifest import FIXED_FILE, MODEL_FILE, WEIGHTS_FILE

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx

    from shadowc.checkpoint.resolve import Checkpoint
    from shadowc.measure.parity import ParityReport
    from shadowc.measure.twin import GraphRunner
    from shadowc.sparsity.predictor import Predictor
    from shadowc.spec.manifest import EngineManifest, TensorRtPart
    from shadowc.spec.program import Program

Advance = Callable[[int, int], None]

NOTHING_WRITTEN = "; no engine was written"
DUMP = "shadowc compile --dump-passes DIR writes the graphs after every pass"
PREFILL_TOLERANCE = 1e-4
"""Largest |difference| between the prefill graph and the decode graph at density 1, over the largest value: both
compute in float32 with the same weights."""
CHECKED = "graphs on the CPU in float32 (operators as ONNX functions), with the weights of this folder"


@dataclass(frozen=True, slots=True)
class Subject:
    """What an engine was compiled from."""

    checkpoint: Checkpoint
    predictor: Predictor | None
    programs: Mapping[str, Program]
    seed: int


def check_engine(subject: Subject, manifest: EngineManifest, folder: Path, advance: Advance) -> dict[str, object]:
    """Run a CPU engine against torch.

    Raises:
        VerificationError: its numbers are not torch's.
    """
    from shadowc.runtime import variants
    from shadowc.runtime.cores import usable_cores
    from shadowc.runtime.engine import Engine, rewritten
    from shadowc.runtime.library import OpLibrary
    from shadowc.runtime.sequence_engine import SequenceEngine
    from shadowc.runtime.session import Session
    from shadowc.runtime.weights_memory import WeightsMemory

    library, threads = OpLibrary.installed().path, usable_cores()
    weights = WeightsMemory.open(folder / WEIGHTS_FILE, ahead=False)

    def exactly(name: str) -> Session:
        return rewritten(Session(folder / name, threads, library, weights=weights), variants.with_exact_prompts)

    session = exactly(MODEL_FILE)
    new_held_probe = None
    if manifest.sparsity is not None and manifest.sparsity.mask == "sequence":
        new_held_probe = SequenceEngine(folder, manifest, session, exactly(FIXED_FILE)).fixed_prober()
    new_probe = Engine(folder, manifest, session).prober()
    with weights.passing():
        report = _parity(subject, "model", manifest, new_probe, advance, new_held_probe)
    report.require(NOTHING_WRITTEN, DUMP)
    return report.as_dict()


def check_graphs(subject: Subject, manifest: EngineManifest, folder: Path, advance: Advance) -> dict[str, object]:
    """Run the graphs of an engine for TensorRT against torch, as far as a CPU can.

    Raises:
        VerificationError: the numbers are not torch's, or the two graphs disagree.
        InputError: an activation is too large for the engine's type.
    """
    from shadowc.measure.overflow import require_range
    from shadowc.measure.twin import DecodeProbe, mapped_weights

    part = _tensorrt(manifest)
    weights = mapped_weights(folder / WEIGHTS_FILE, part.weights)
    capacity = PREFILL_TOKENS + DECODE_TOKENS
    graph, decode = _twin(folder, part, "decode", weights)
    report = _parity(
        subject, "decode", manifest, lambda: DecodeProbe(decode, manifest.model, capacity=capacity), advance
    )
    largest = require_range(graph, decode.largest, part.activations)
    # After the range: numbers that large may miss the tolerance too, and are the cause.
    report.require(NOTHING_WRITTEN, DUMP)
    graph, prefill = _twin(folder, part, "prefill", weights)
    difference, where = prefill_difference(prefill, decode, manifest, subject.seed)
    largest = max(largest, require_range(graph, prefill.largest, part.activations))
    if not difference <= PREFILL_TOLERANCE:
        raise VerificationError(
            f"the prefill graph does not compute what the decode graph computes: {where} differs by {difference:.2e} "
            f"(tolerance {PREFILL_TOLERANCE:.0e}){NOTHING_WRITTEN}",
            hint=DUMP,
        )
    return {
        **report.as_dict(), "on_device": False, "checked": CHECKED,
        **({} if part.activations == "float32" else {"largest_activation": largest}),
        "prefill": difference, "prefill_tolerance": PREFILL_TOLERANCE,
    }  # fmt: skip


def prefill_difference(
    prefill: GraphRunner, decode: GraphRunner, manifest: EngineManifest, seed: int
) -> tuple[float, str]:
    """Largest relative difference between the graphs on a left-padded batch, in last logits and real K/V; and where."""
    ids_BS, mask_BS = padded_batch(manifest, seed)
    ours = prefill.run({"input_ids": ids_BS, "attention_mask": mask_BS})
    theirs = _dense_decode(decode, manifest, ids_BS, mask_BS)
    real_BS = mask_BS.astype(bool)
    worst = relative(_largest(ours["logits"][:, -1] - theirs["logits"][:, -1]), _largest(theirs["logits"][:, -1]))
    where = "logits"
    for name in (name for name in ours if name.startswith("present.")):
        mine, other = (side[name].swapaxes(1, 2)[real_BS] for side in (ours, theirs))
        difference = relative(_largest(mine - other), _largest(other))
        if worse(worst, difference) != worst:
            worst, where = difference, name
    return worst, where


def padded_batch(manifest: EngineManifest, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Two rows of random tokens [B,S] and their mask; the second starts with pads."""
    tokens = min(PREFILL_TOKENS, manifest.model.positions)
    ids_BS = np.random.default_rng(seed).integers(4, manifest.model.vocab, (2, tokens), dtype=np.int64)
    mask_BS = np.ones((2, tokens), np.int64)
    mask_BS[1, : tokens // 3] = 0
    return ids_BS, mask_BS


def _dense_decode(
    decode: GraphRunner, manifest: EngineManifest, ids_BS: npt.NDArray[np.int64], mask_BS: npt.NDArray[np.int64]
) -> dict[str, npt.NDArray[Any]]:
    model, (rows, tokens) = manifest.model, ids_BS.shape
    empty_BHTD = np.zeros((rows, model.heads, tokens, model.head_size), np.float32)
    dials = Density()
    return decode.run(
        {
            "input_ids": ids_BS,
            "past": np.zeros(rows, np.int64),
            "start": (1 - mask_BS).sum(axis=1),
            "density_heads": np.full(rows, dials.heads, np.float32),
            "density_neurons": np.full(rows, dials.neurons, np.float32),
            **{
                f"past_key_values.{layer}.{kind}": empty_BHTD
                for layer in range(model.layers)
                for kind in ("key", "value")
            },
        }
    )


def _parity(
    subject: Subject,
    graph: str,
    manifest: EngineManifest,
    new_probe: Callable[[], Any],
    advance: Advance,
    new_held_probe: Callable[[], Any] | None = None,
) -> ParityReport:
    from shadowc.measure.dequantised import filled_source, truth_for_tensorrt

    checkpoint, predictor, program = subject.checkpoint, subject.predictor, subject.programs[graph]
    filled = filled_source(checkpoint.weights, {} if predictor is None else predictor.means)
    return check_parity(
        new_probe,
        checkpoint.facts,
        checkpoint.weights,
        truth=None if manifest.tensorrt is None else truth_for_tensorrt(filled, manifest.weights),
        weights=manifest.weights,
        block=1 if predictor is None else predictor.block,
        orders={} if predictor is None else dict(enumerate(predictor.orders_LF, start=1)),
        sparse=predictor is not None,
        plan=program.plan,
        predictor=predictor,
        seed=subject.seed,
        advance=advance,
        new_held_probe=new_held_probe,
    )


def _twin(
    folder: Path, part: TensorRtPart, name: Any, weights: Mapping[str, npt.NDArray[Any]]
) -> tuple[onnx.GraphProto, GraphRunner]:
    """A graph as it was written, and its twin."""
    import onnx

    from shadowc.measure.twin import GraphRunner, float32_twin
    from shadowc.runtime.cores import usable_cores

    model = onnx.load(folder / part.plans[name].onnx)
    return model.graph, GraphRunner(float32_twin(model, weights), weights, usable_cores())


def _tensorrt(manifest: EngineManifest) -> TensorRtPart:
    if manifest.tensorrt is None:
        raise InternalError("an engine of target cpu was given to the check of TensorRT graphs")
    return manifest.tensorrt


def _largest(array: npt.NDArray[Any]) -> float:
    return float(np.abs(array).max())
