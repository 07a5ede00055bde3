# SPDX-License-Identifier: Apache-2.0
"""Seeded random weights."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from shadowc.checkpoint import dummy
from shadowc.checkpoint.dummy import STD, DummyWeights, seeded_uniform
from shadowc.checkpoint.opt import EMBEDDING, HEAD, layer_names, parameter_shapes
from tests.checkpoint.handmade import FACTS

MANY = 3 * dummy._BLOCK + 17  # three whole blocks and a remainder that is no multiple of four
RELATIVE = 0.01
"""Of the standard deviation, for statistics over MANY values: more than five standard errors."""
GOLDEN = "3a6430986915bae29b7d2cc441d7bb58"


def test_values_are_the_same_on_every_machine() -> None:
    digest = hashlib.sha256(seeded_uniform(7, "a", (MANY,)).astype("<f4").tobytes()).hexdigest()
    assert digest[:32] == GOLDEN


def test_values_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    many = seeded_uniform(0, "a", (MANY,))
    monkeypatch.setattr(dummy, "_THREADS", 1)
    assert np.array_equal(seeded_uniform(0, "a", (MANY,)), many)


def test_weights_do_not_depend_on_the_order_of_reading() -> None:
    forward, backward = DummyWeights(FACTS, 3), DummyWeights(FACTS, 3)
    first = {name: forward.tensor(name) for name in forward.names()}
    second = {name: backward.tensor(name) for name in reversed(backward.names())}
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_values_differ_when_seed_name_or_block_differ() -> None:
    values = seeded_uniform(0, "a", (2 * dummy._BLOCK,))
    assert not np.array_equal(values, seeded_uniform(1, "a", values.shape))
    assert not np.array_equal(values, seeded_uniform(0, "b", values.shape))
    assert not np.array_equal(values[: dummy._BLOCK], values[dummy._BLOCK :])


def test_values_are_symmetric_with_the_stated_deviation() -> None:
    values = seeded_uniform(0, "a", (MANY,)).astype(np.float64)
    assert abs(values.mean()) < RELATIVE * STD
    assert abs(values.std() - STD) < RELATIVE * STD
    assert -values.min() == pytest.approx(values.max(), rel=RELATIVE)


def test_weights_have_the_models_names_and_shapes() -> None:
    weights = DummyWeights(FACTS, 0)
    assert weights.names() == tuple(sorted((*parameter_shapes(FACTS), HEAD)))
    for name, shape in parameter_shapes(FACTS).items():
        assert weights.tensor(name).shape == shape
        assert weights.tensor(name).dtype == np.float32


def test_head_is_tied_to_the_embedding() -> None:
    weights = DummyWeights(FACTS, 0)
    assert np.array_equal(weights.tensor(HEAD), weights.tensor(EMBEDDING))


def test_norm_weights_lie_around_one_and_biases_around_zero() -> None:
    weights, names = DummyWeights(FACTS, 0), layer_names(1)
    assert np.abs(weights.tensor(names.attention_norm.weight) - 1).max() < 2 * STD
    assert np.abs(weights.tensor(names.ffn_norm.bias)).max() < 2 * STD


def test_relu_leaves_about_half_of_the_neurons_at_zero() -> None:
    x_SE = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    fc1_FE = seeded_uniform(0, "fc1", (1024, 256))
    zeros = float(np.mean(x_SE @ fc1_FE.T <= 0))
    assert 0.45 < zeros < 0.55


def test_unknown_tensor_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        DummyWeights(FACTS, 0).tensor("model.decoder.layers.3.fc1.weight")
