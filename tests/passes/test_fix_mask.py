# SPDX-License-Identifier: Apache-2.0
"""The graph whose masks are inputs: its interface, its weights, its numbers, and what it refuses."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from shadowc.passes import fix_mask
from shadowc.pipeline import run_passes, schedule
from shadowc.spec.errors import InternalError
from shadowc.spec.program import Program
from tests.trace import deep

N = deep.FACTS.layers
TOLERANCE = 2e-5
"""Largest |difference| over the largest |logit|: float32, another order of additions."""


def fixed(kv: Literal["active", "all"] = "active", weights: str = "fp32") -> Program:
    program = deep.traced(deep.plan())
    run_passes(program, schedule(target="cpu", weights=weights, skip_zeros=False, sparse=True, fixed=kv))
    return program


def names(values) -> list[str]:
    return [value.name for value in values]


@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_masks_are_inputs_and_the_predictor_is_gone(weights: str) -> None:
    program, predicting = fixed(weights=weights), deep.compiled(deep.plan(), weights=weights)
    caches = [f"{layer}.{kind}" for layer in range(N) for kind in ("key", "value")]
    assert names(program.graph.inputs)[: -len(program.weights)] == [
        "input_ids", "attention_mask", *(f"past_key_values.{name}" for name in caches),
        "density_heads", "density_neurons", "mask_scores.heads", "mask_scores.neurons",
    ]  # fmt: skip
    assert names(program.graph.outputs) == [
        "logits", *(f"present.{name}" for name in caches),
        "threshold.heads", "threshold.neurons", "active.heads", "active.neurons", "read",
    ]  # fmt: skip
    shapes = {value.name: tuple(value.shape) for value in program.graph.inputs}
    assert shapes["mask_scores.heads"] == ("B", "Z", N - 1, 4)
    gone = predicting.weights.keys() - program.weights.keys()
    assert gone
    assert all(name.startswith("predictor.") for name in gone)
    assert all(predicting.weights[name] == recipe for name, recipe in program.weights.items())


@pytest.mark.parametrize("kv", ["active", "all"])
def test_every_attention_writes_the_k_and_v_that_were_asked_for(kv: Literal["active", "all"]) -> None:
    nodes = [node for node in fixed(kv).graph.nodes if node.op == "SparseAttention"]
    assert len(nodes) == N
    assert {node.attrs["kv"] for node in nodes} == {kv}


def test_given_scores_compute_what_the_predictors_own_do() -> None:
    source, (ids, mask) = deep.Tensors(), deep.padded_batch()
    predicting = deep.Decoder(deep.filled(deep.compiled(deep.plan()), source), batch=2)
    wanted = predicting(ids, mask, **deep.dials([0.5, 0.2], tail=ids.shape[1]))
    given = {f"mask_scores.{kind}": wanted[f"scores.{kind}"] for kind in ("heads", "neurons")}
    shares = {name: value for name, value in deep.dials([0.5, 0.2]).items() if name != "sparse_tail"}
    found = deep.Decoder(deep.filled(fixed("all"), source), batch=2)(ids, mask, **shares, **given)
    for kind in ("heads", "neurons"):
        np.testing.assert_array_equal(found[f"threshold.{kind}"], wanted[f"threshold.{kind}"])
    assert np.abs(found["logits"] - wanted["logits"]).max() <= TOLERANCE * np.abs(wanted["logits"]).max()


def test_pass_does_nothing_the_second_time() -> None:
    program = fixed()
    before = names(program.graph.nodes)
    report = fix_mask.apply(program)
    assert report.counts == {"inputs": 0}
    assert report.refusals
    assert names(program.graph.nodes) == before


def test_a_graph_without_a_predictor_is_refused() -> None:
    with pytest.raises(InternalError, match=r"scores\.heads is missing"):
        fix_mask.apply(deep.compiled(None))
