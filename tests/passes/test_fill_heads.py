# SPDX-License-Identifier: Apache-2.0
"""Biases that leave the mean of a skipped head in its place and do nothing else.

Letters: T keys, E hidden, H heads, D head size.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shadowc.checkpoint.opt import layer_names
from shadowc.emit.records import materialise
from shadowc.passes import fill_heads
from shadowc.spec.errors import InternalError
from shadowc.spec.program import Program
from tests.trace import deep

FILLED = replace(deep.plan(), fill="mean")
BIASES = ("bqkv", "bo")


def recipes(program: Program, layer: int) -> tuple[Any, Any]:
    first, second = (program.weights[f"layers.{layer}.attention.{part}"] for part in BIASES)
    return first, second


def test_every_predicted_layer_gets_its_own_means_and_layer_0_none() -> None:
    program = deep.compiled(FILLED)
    assert [recipe.kind for recipe in recipes(program, 0)] == ["qkv_bias", "copy"]
    for layer in range(1, program.facts.layers):
        first, second = recipes(program, layer)
        assert (first.kind, second.kind) == ("centred_qkv_bias", "filled_bias")
        assert first.sources[-1] == second.sources[-1] == f"predictor.mean.heads.{layer}"


def test_fill_zero_changes_nothing() -> None:
    program = deep.compiled(deep.plan())
    kinds = {recipe.kind for layer in range(program.facts.layers) for recipe in recipes(program, layer)}
    assert kinds == {"qkv_bias", "copy"}


def test_the_pass_may_run_again() -> None:
    program = deep.compiled(FILLED)
    before = dict(program.weights)
    assert not any(fill_heads.apply(program).counts.values())
    assert program.weights == before


def test_biases_that_another_pass_has_changed_are_refused_and_none_is_forgotten() -> None:
    program = deep.compiled(FILLED, until="sparsify_attention")
    name = "layers.3.attention.bqkv"
    program.weights[name] = replace(program.weights[name], kind="copy")
    with pytest.raises(InternalError, match=r"layers\.3\.attention\.bqkv is made by copy, expected qkv_bias"):
        fill_heads.apply(program)
    with pytest.raises(InternalError, match=r"biases of layer 1 use the means \(none\)"):
        fill_heads.ensures(deep.compiled(FILLED, until="sparsify_attention"))


def test_fill_zero_changes_nothing_and_says_so() -> None:
    program = deep.compiled(replace(FILLED, fill="zero"), until="sparsify_attention")
    report = fill_heads.apply(program)
    assert (report.counts, report.refusals) == ({"layers": 0}, ("skipped heads leave zero",))


def test_means_of_another_layer_and_half_a_change_are_refused() -> None:
    for part, name in (("bqkv", "predictor.mean.heads.2"), ("bo", "predictor.mean.heads.2")):
        program = deep.compiled(FILLED)
        recipe = program.weights[f"layers.3.attention.{part}"]
        program.weights[f"layers.3.attention.{part}"] = replace(recipe, sources=(*recipe.sources[:-1], name))
        with pytest.raises(InternalError, match="biases of layer 3 use the means"):
            fill_heads.ensures(program)
    program = deep.compiled(FILLED)
    program.weights["layers.3.attention.bo"] = deep.compiled(deep.plan()).weights["layers.3.attention.bo"]
    with pytest.raises(InternalError, match="biases of layer 3 use the means"):
        fill_heads.ensures(program)


@cache
def filled_recipes() -> tuple[Any, Any]:
    return recipes(deep.compiled(FILLED), 1)


class Source:
    """A layer of random numbers, and means of its heads."""

    def __init__(self, seed: int, heads: int, size: int) -> None:
        rng, E = np.random.default_rng(seed), heads * size
        names = layer_names(1)
        linear = {part.weight: (E, E) for part in (names.q, names.k, names.v, names.out)}
        linear |= {part.bias: (E,) for part in (names.q, names.k, names.v, names.out)}
        shapes: dict[str, tuple[int, ...]] = {**linear, "predictor.mean.heads.1": (heads, size)}
        self.values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.values))

    def tensor(self, name: str) -> np.ndarray:
        return self.values[name]


@given(seed=st.integers(0, 10**6), heads=st.integers(1, 5), size=st.integers(1, 6), keys=st.integers(1, 7))
def test_a_layer_is_what_it_was_but_that_skipped_heads_leave_their_means(
    seed: int, heads: int, size: int, keys: int
) -> None:
    source, names, E = Source(seed, heads, size), layer_names(1), heads * size
    shapes = (heads, 3, size), (E,)
    first, second = (replace(recipe, shape=shape) for recipe, shape in zip(filled_recipes(), shapes, strict=True))
    made = {**materialise({"a": first}, source, ["a"]), **materialise({"b": second}, source, ["b"])}
    rng = np.random.default_rng([seed, 1])
    x_TE = rng.standard_normal((keys, E))
    weight_HT = rng.dirichlet(np.ones(keys), heads)
    active_H = rng.random(heads) < 0.5
    values_THD = (x_TE @ source.tensor(names.v.weight).T.astype(np.float64)).reshape(keys, heads, size)
    out_EE, mean_HD = source.tensor(names.out.weight).astype(np.float64), source.tensor("predictor.mean.heads.1")

    def context(bias_HD: np.ndarray, skipped_HD: np.ndarray) -> np.ndarray:
        found_HD = np.einsum("ht,thd->hd", weight_HT, values_THD + bias_HD)
        return np.where(active_H[:, None], found_HD, skipped_HD).reshape(-1)

    v_bias_HD = source.tensor(names.v.bias).reshape(heads, size)
    wanted_E = out_EE @ context(v_bias_HD, mean_HD) + source.tensor(names.out.bias)
    found_E = out_EE @ context(made["a"][:, 2], np.zeros((heads, size))) + made["b"]
    np.testing.assert_allclose(found_E, wanted_E, atol=1e-5 * max(np.abs(wanted_E).max(), 1))
    for part, affine in enumerate((names.q, names.k)):
        np.testing.assert_array_equal(made["a"][:, part].reshape(-1), source.tensor(affine.bias))
