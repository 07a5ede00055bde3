# SPDX-License-Identifier: Apache-2.0
"""An engine folder against the checkpoint that it was compiled from: parity A again, and for fp32 parity B.

Letters: B prompts, S tokens, L predicted layers, F neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from shadowc.measure.free_running import FreeRun, free_run
from shadowc.measure.parity import ParityReport, check_parity
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError, VerificationError
from shadowc.spec.progress import NullProgress, Progress

if TYPE_CHECKING:
    from shadowc.checkpoint.resolve import Checkpoint
    from shadowc.runtime.engine import Engine
    from shadowc.sparsity.predictor import Predictor
    from shadowc.spec.manifest import SparsityPart
    from shadowc.spec.program import SparsityPlan

PROMPT_TOKENS = 16
DENSITIES = (Density(), Density(0.5, 0.5), Density(0.2, 0.2))
Scope = Literal["local", "global"]
SCOPES: tuple[Scope, ...] = get_args(Scope)


@dataclass(frozen=True, slots=True)
class AgainstReport:
    """What an engine and its checkpoint agree on."""

    parity: ParityReport
    runs: tuple[FreeRun, ...]
    """Parity B per scope and density; empty for a dense or a quantised engine."""

    def require(self) -> None:
        """Raises VerificationError if either parity fails."""
        self.parity.require()
        wrong = [run for run in self.runs if not run.passed()]
        if wrong:
            raise VerificationError(
                "engine and masked torch model part ways when both run free",
                hint="compile the engine again; if this stays, report it as a bug",
                problems=[
                    f"{run.scope}, {run.density.heads:g}/{run.density.neurons:g}: {run.masks_wrong} wrong masks, "
                    f"{run.tokens_wrong} wrong tokens, {run.excused} excused of {run.tokens}"
                    for run in wrong
                ],
            )


def verify_against(
    folder: Path,
    model: str,
    *,
    prompts: int = 20,
    tokens: int = 64,
    load_format: Literal["auto", "dummy"] = "auto",
    offline: bool = False,
    seed: int = 0,
    threads: int | None = None,
    progress: Progress | None = None,
) -> AgainstReport:
    """Compares an engine with torch on the checkpoint.

    Args:
        folder: the engine.
        model: name or path of the checkpoint.
        prompts: for parity B, sampled from the model.
        tokens: generated after each prompt.
        load_format: "dummy" if the engine was compiled so.
        offline: do not use the network.
        seed: of dummy weights and of the prompts.
        threads: of the engine.
        progress: told about layers and runs.

    Raises:
        InputError: the engine was compiled from another checkpoint.
    """
    from shadowc.checkpoint.resolve import resolve
    from shadowc.runtime.load import load_cpu
    from shadowc.runtime.stored import require_exact_products

    progress = progress or NullProgress()
    engine = load_cpu(folder, threads=threads, exact_prompts=True)
    checkpoint = resolve(model, load_format=load_format, offline=offline, seed=seed)
    if checkpoint.identity != engine.manifest.model.source:
        raise InputError(
            f"{folder} was compiled from another checkpoint than {model}: "
            f"expected {engine.manifest.model.source[:16]}, found {checkpoint.identity[:16]}",
            hint="name the checkpoint that the engine was compiled from",
        )
    require_exact_products(engine.graph(), folder)
    sparsity = engine.manifest.sparsity
    predictor = None
    if sparsity is not None and engine.manifest.weights == "fp32":
        predictor = stored_predictor(engine, sparsity)
    with progress.stage("parity"):
        parity = _parity(engine, checkpoint, predictor, progress)
    runs: list[FreeRun] = []
    if sparsity is not None and predictor is not None:
        with progress.stage("free runs"):
            runs = _free_runs(engine, sparsity, checkpoint, predictor, prompts, tokens, seed, progress)
    return AgainstReport(parity, tuple(runs))


def stored_predictor(engine: Engine, sparsity: SparsityPart) -> Predictor:
    """The predictor of an fp32 engine, put together from the tensors that its graph holds."""
    from shadowc.sparsity.networks import PARTS, LayerNetworks, Network
    from shadowc.sparsity.predictor import Networks, Predictor

    model, orders, plan = engine.manifest.model, engine.neuron_orders(), stored_plan(engine, sparsity)
    means = engine.head_means()

    linear = sparsity.style == "shadow+"
    stored = {tensor.name for tensor in engine.graph().graph.initializer}

    def network(name: str) -> Network:
        parts = (engine.initialiser(f"predictor.{name}.{part}") for part in PARTS)
        # a product of ONNX Runtime's stores [in, out], the operator of one layer [out, in] with factors beside it
        as_rows = f"predictor.{name}.fc1.weight.scales" in stored
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = (
            np.ascontiguousarray(part if as_rows else part.T) for part in parts
        )
        return Network(fc1_weight, fc1_bias, fc2_weight, fc2_bias, linear)

    def networks(kind: str) -> Networks:
        if sparsity.style == "shadow":
            return network(kind)
        return LayerNetworks(tuple(network(f"{kind}.{layer}") for layer in range(1, model.layers)))

    untouched_F = np.arange(model.ffn, dtype=np.int32)
    return Predictor(
        heads=networks("heads"),
        neurons=networks("neurons"),
        layers=model.layers - 1,
        block=sparsity.neuron_block,
        orders_LF=np.stack([orders.get(layer, untouched_F) for layer in range(1, model.layers)]),
        shares=plan.shares,
        thresholds={} if plan.thresholds is None else {plan.budget: plan.thresholds},
        means_LHD=np.stack([means[layer] for layer in range(1, model.layers)]) if means else None,
    )


def stored_plan(engine: Engine, sparsity: SparsityPart) -> SparsityPlan:
    """How an engine selects: what its manifest says, with the thresholds or (style shadow+) shares that it holds."""
    from shadowc.spec.program import SparsityPlan

    exact = sparsity.select == "exact"
    shares = thresholds = None
    if not exact:
        thresholds = engine.initialiser("limits.heads"), engine.initialiser("limits.neurons")
    elif sparsity.style == "shadow+":
        shares = engine.initialiser("shares.heads"), engine.initialiser("shares.neurons")
    return SparsityPlan(
        0, 0, sparsity.neuron_block, sparsity.scope, sparsity.exempt,
        sparsity.min_active_heads, sparsity.min_active_neurons,
        style=sparsity.style, shares=shares, select=sparsity.select, thresholds=thresholds,
    )  # fmt: skip


def _parity(engine: Engine, checkpoint: Checkpoint, predictor: Predictor | None, progress: Progress) -> ParityReport:
    from shadowc.runtime.sequence_engine import SequenceEngine

    sparsity = engine.manifest.sparsity
    plan = None if sparsity is None else stored_plan(engine, sparsity)
    return check_parity(
        engine.prober(),
        checkpoint.facts,
        checkpoint.weights,
        means=engine.head_means(),
        weights=engine.manifest.weights,
        block=1 if sparsity is None else sparsity.neuron_block,
        orders=engine.neuron_orders(),
        sparse=sparsity is not None,
        plan=plan,
        predictor=predictor,
        advance=progress.advance,
        new_held_probe=engine.fixed_prober() if isinstance(engine, SequenceEngine) else None,
    )


def _free_runs(
    engine: Engine,
    sparsity: SparsityPart,
    checkpoint: Checkpoint,
    predictor: Predictor,
    prompts: int,
    tokens: int,
    seed: int,
    progress: Progress,
) -> list[FreeRun]:
    from shadowc.sparsity.calibration import sample_text
    from shadowc.sparsity.reference import MaskedModel, load_torch_model

    torch_model = load_torch_model(checkpoint)
    prompts_BS = sample_text(torch_model, checkpoint.facts, prompts, PROMPT_TOKENS, seed + 1)
    exact = sparsity.select == "exact"
    scopes = SCOPES if exact and sparsity.style == "shadow" else (sparsity.scope,)
    settings: Sequence[tuple[Scope, Density]] = [(scope, density) for scope in scopes for density in DENSITIES]
    runs = []
    for done, (scope, density) in enumerate(settings, start=1):
        plan = predictor.plan(
            scope,
            sparsity.exempt,
            select=sparsity.select,
            min_active_heads=sparsity.min_active_heads,
            min_active_neurons=sparsity.min_active_neurons,
        )
        masked = MaskedModel(torch_model, plan, predictor)
        ranked = engine.with_scope(scope) if exact else engine
        runs.append(free_run(ranked, masked, prompts_BS, tokens=tokens, density=density))
        progress.advance(done, len(settings), "settings")
    return runs
