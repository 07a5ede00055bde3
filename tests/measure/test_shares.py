# SPDX-License-Identifier: Apache-2.0
"""Parts of a token's time: every node has one, they add up, and what is unknown is seen."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shadowc
from shadowc.measure.settings import Variant
from shadowc.measure.shares import Part, Shares, by_generation, part_of, profile
from shadowc.runtime.engine import Engine
from shadowc.runtime.load import load_cpu
from shadowc.runtime.recording import NodeTime, Run, read_recording
from shadowc.spec.density import Density
from shadowc.spec.errors import InternalError
from tests.e2e import compiled

PROMPT = np.arange(4, 20, dtype=np.int64)[None]
PARTS = ("predictor", "selection", "attention", "ffn", "lm_head", "framework", "other")
HALF = Density(0.5, 0.5)


def profiled(engine: Engine, *, mask: str = "token", densities: tuple[Density, ...] = (HALF,)) -> list[Shares]:
    return profile(Variant("it", mask, False, engine, densities), engine, PROMPT)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "operator", "part"),
    [
        ("layers.3.ffn", "SparseFFN", "ffn"),
        ("layers.3.attention", "SparseAttention", "attention"),
        ("threshold.heads", "SelectThreshold", "selection"),
        ("select.neurons.3", "SelectThreshold", "selection"),
        ("threshold.heads", "Concat", "selection"),
        ("active.heads", "Concat", "selection"),
        ("tail.predicted", "Max", "selection"),
        ("predictor.heads.3.fc1.y", "Add", "predictor"),
        ("predictor.heads.3", "PredictUnits", "predictor"),
        ("predictor.heads.fc1.product", "MatMulRows", "predictor"),
        ("predictor.heads.fc1.product", "Linear", "predictor"),
        ("predictor.first", "Sub", "predictor"),
        ("scores.heads", "Slice", "predictor"),
        ("predictor.heads.3.fc1.product", "Linear", "predictor"),
        ("scores.heads.3", "Slice", "predictor"),
        ("logits", "MatMulRows", "lm_head"),
        ("logits", "MatMul", "lm_head"),
        ("logits", "Linear", "lm_head"),
        ("lm_head.product", "Linear", "lm_head"),
        ("fused.lm_head", "Gemm", "lm_head"),
        ("layers.3.attention.x", "LayerNormalization", "framework"),
        ("SkipLayerNormalization", "SkipLayerNormalization", "framework"),
        ("layers.3.middle", "Add", "framework"),
        ("layers.3.gate", "Linear", "other"),
        ("MatMul_12", "MatMul", "other"),
        ("surprise", "Conjure", "other"),
    ],
)
def test_a_node_belongs_to_a_part_by_operator_and_name(name: str, operator: str, part: Part) -> None:
    assert part_of(name, operator) == part


@pytest.fixture(scope="module")
def dejavu_engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As sparse_engine, with a predictor and a selection for each layer. Read only."""
    train = compiled.TRAIN.model_copy(update={"style": "dejavu"})
    return shadowc.compile(
        compiled.options(tiny_checkpoint, tmp_path_factory.mktemp("dejavu") / "tiny.engine", train=train)
    )


@pytest.mark.parametrize("fixture", ["sparse_engine", "int8_engine", "dejavu_engine"])
def test_no_node_of_an_engine_is_unknown_and_every_part_takes_time(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    engine = load_cpu(request.getfixturevalue(fixture), mask="token")
    (sparse,) = profiled(engine)
    assert sparse.unknown == ()
    assert sparse.other == 0
    assert all(getattr(sparse, part) > 0 for part in PARTS if part != "other")
    assert sum(getattr(sparse, part) for part in PARTS) == pytest.approx(1)
    assert 0 < sparse.gaps < sparse.framework


@pytest.mark.parametrize("fixture", ["sparse_engine", "int8_engine"])
def test_the_dense_twin_has_no_predictor_and_no_selection(fixture: str, request: pytest.FixtureRequest) -> None:
    (dense,) = profiled(load_cpu(request.getfixturevalue(fixture), mask="token").dense_twin(), densities=(Density(),))
    assert (dense.predictor, dense.selection, dense.unknown) == (0, 0, ())
    assert min(dense.attention, dense.ffn, dense.lm_head) > 0


def test_a_mask_of_the_prompt_costs_later_tokens_nothing_and_one_that_is_renewed_does(sequence_engine: Path) -> None:
    engine = load_cpu(sequence_engine)
    (held,) = profiled(engine, mask="sequence")
    assert (held.predictor, held.selection, held.unknown) == (0, 0, ())
    (fresh,) = profiled(load_cpu(sequence_engine, refresh=4), mask="sequence")
    assert min(fresh.predictor, fresh.selection) > 0
    assert fresh.unknown == ()


def test_each_density_has_a_generation_of_its_own(sparse_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []
    right = Engine.generate

    def generate(self: Engine, *given: Any, **named: Any) -> Any:
        asked.append(named["density"])
        return right(self, *given, **named)

    monkeypatch.setattr(Engine, "generate", generate)
    densities = (Density(), HALF, Density(0.1, 0.1))
    assert len(profiled(load_cpu(sparse_engine), densities=densities)) == 3
    assert tuple(asked) == densities


def test_shares_of_generations_come_in_their_order() -> None:
    later = [replace(run, start=run.start + 2000, end=run.end + 2000, nodes=()) for run in STEPS]
    first, second = by_generation([[*STEPS, *later]], [3, 3])
    assert (first.ffn, second.ffn) == (pytest.approx(0.4), 0)
    assert second.gaps == 1


def a_run(start: int, end: int, *nodes: tuple[str, str, int]) -> Run:
    return Run(start, end, tuple(NodeTime(*node) for node in nodes))


STEPS = [
    a_run(0, 1000, ("layers.0.ffn", "SparseFFN", 900)),  # the prompt
    a_run(1100, 1200, ("layers.0.ffn", "SparseFFN", 90)),  # the step that binds
    a_run(1210, 1300, ("layers.0.ffn", "SparseFFN", 40), ("logits", "Linear", 20), ("residual.1", "Add", 10)),
    a_run(1310, 1400, ("layers.0.ffn", "SparseFFN", 40), ("logits", "Linear", 20), ("residual.1", "Add", 10)),
]


def test_shares_are_of_the_time_from_step_to_step_and_gaps_belong_to_the_framework() -> None:
    (found,) = by_generation([STEPS], [3])
    assert found.ms_per_token == pytest.approx(0.1)
    assert (found.ffn, found.lm_head, found.gaps, found.framework) == pytest.approx((0.4, 0.2, 0.3, 0.4))


def test_runs_of_other_graphs_count_when_they_lie_between_the_steps() -> None:
    predicting = [
        a_run(1010, 1090, ("predictor.heads.fc1.product", "Linear", 70)),  # the mask that the prompt makes
        a_run(1301, 1309, ("predictor.heads.fc1.product", "Linear", 6)),
    ]
    (found,) = by_generation([STEPS, predicting], [3])
    assert found.predictor == pytest.approx(0.03)
    assert found.gaps == pytest.approx(0.27)


def test_an_unknown_operator_is_in_other_and_named() -> None:
    planted = [*STEPS[:3], a_run(1310, 1400, ("layers.0.ffn", "SparseFFN", 40), ("new", "Conjure", 30))]
    (found,) = by_generation([planted], [3])
    assert found.unknown == ("Conjure",)
    assert found.other == pytest.approx(0.15)
    assert sum(getattr(found, part) for part in PARTS) == pytest.approx(1)


@pytest.mark.parametrize("steps", [[2], [4], [1, 1], [1]])
def test_a_recording_of_another_length_is_refused(steps: list[int]) -> None:
    with pytest.raises(InternalError, match="runs were recorded"):
        list(by_generation([STEPS], steps))


def test_shares_name_every_part() -> None:
    assert {*PARTS} <= {field.name for field in fields(Shares)}


def test_a_recording_has_nodes_in_the_run_that_they_ran_in(tmp_path: Path) -> None:
    def event(kind: str, name: str, start: int, length: int, **args: str) -> dict[str, object]:
        return {"cat": kind, "name": name, "ts": start, "dur": length, "ph": "X", "args": args}

    events = [
        event("Session", "session_initialization", 0, 90),
        event("Node", "a_kernel_time", 105, 20, op_name="Add"),
        event("Node", "b_kernel_time", 130, 30, op_name="Mul"),
        event("Session", "model_run", 100, 70),
        event("Node", "a_kernel_time", 202, 10, op_name="Add"),
        event("Node", "a_fence_before", 200, 1, op_name="Add"),
        event("Session", "model_run", 200, 50),
    ]
    (tmp_path / "profile.json").write_text(json.dumps(events))
    assert read_recording(tmp_path / "profile.json", 5_000_999) == (
        a_run(5100, 5170, ("a", "Add", 20), ("b", "Mul", 30)),
        a_run(5200, 5250, ("a", "Add", 10)),
    )


def test_a_profile_has_a_run_for_the_prompt_and_for_every_step(sparse_engine: Path, tmp_path: Path) -> None:
    engine = load_cpu(sparse_engine).profiled(tmp_path)
    engine.generate(PROMPT, max_new_tokens=5, min_new_tokens=5)
    (runs,) = engine.recordings()
    assert len(runs) == 5
    assert all(sum(node.microseconds for node in run.nodes) <= run.end - run.start for run in runs)
    assert all(before.end <= after.start for before, after in pairwise(runs))


def test_a_session_without_a_profile_has_no_recording(sparse_engine: Path) -> None:
    with pytest.raises(InternalError, match="without a profile"):
        load_cpu(sparse_engine).recordings()
