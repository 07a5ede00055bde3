# SPDX-License-Identifier: Apache-2.0
"""The check for NaN and infinities."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from shadowc.checkpoint import weights
from shadowc.checkpoint.finite import check_finite
from shadowc.checkpoint.opt import EMBEDDING, parameter_shapes
from shadowc.checkpoint.resolve import Checkpoint, resolve
from shadowc.spec.errors import InputError
from tests.checkpoint.handmade import FACTS, contents, some_tensors, write_shards, write_single

LAST = list(parameter_shapes(FACTS))[-1]
PRETTY = "model.decoder.layers.0.fc2.weight"


def checked(folder: Path) -> Checkpoint:
    return resolve(str(folder))


@pytest.mark.parametrize("kind", ["<f4", "<f2"])
def test_finite_weights_pass_and_every_tensor_is_counted(kind: str, tmp_path: Path) -> None:
    tensors = {name: tensor.astype(kind) for name, tensor in some_tensors().items()}
    seen: list[tuple[int, int]] = []
    check_finite(checked(write_single(tmp_path, tensors)), lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, len(tensors)) for i in range(len(tensors))]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["<f4", "<f2"])
def test_one_bad_value_in_the_last_tensor_is_found_and_named(kind: str, value: float, tmp_path: Path) -> None:
    tensors = {name: tensor.astype(kind) for name, tensor in some_tensors().items()}
    tensors[LAST].flat[-1] = value
    folder = write_shards(tmp_path, tensors)
    before = contents(folder)
    with pytest.raises(InputError) as caught:
        check_finite(checked(folder))
    assert caught.value.problems == (f"{LAST} (1 value)",)
    assert LAST in caught.value.message
    assert caught.value.hint
    assert contents(folder) == before


def test_bad_bfloat16_is_found(tmp_path: Path) -> None:
    tensors = {name: np.zeros(tensor.shape, "<u2") for name, tensor in some_tensors().items()}
    tensors[PRETTY].flat[3] = 0x7FC0
    with pytest.raises(InputError, match=PRETTY):
        check_finite(checked(write_single(tmp_path, tensors)))


def test_largest_finite_values_pass(tmp_path: Path) -> None:
    tensors = some_tensors()
    tensors[PRETTY][:] = np.finfo("<f4").max
    tensors[LAST] = np.full(tensors[LAST].shape, -65504, "<f2")
    check_finite(checked(write_single(tmp_path, tensors)))


def test_bad_value_is_found_in_every_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_BLOCK", 7)
    for place in range(0, FACTS.vocab * FACTS.hidden, 13):
        tensors = some_tensors()
        tensors[EMBEDDING].flat[place] = np.nan
        with pytest.raises(InputError, match="1 value"):
            check_finite(checked(write_single(tmp_path, tensors)))


def test_many_bad_tensors_are_counted_and_five_are_named(tmp_path: Path) -> None:
    tensors = some_tensors()
    for tensor in tensors.values():
        tensor.flat[0] = np.nan
    with pytest.raises(InputError) as caught:
        check_finite(checked(write_single(tmp_path, tensors)))
    assert len(caught.value.problems) == len(tensors)
    assert f"and {len(tensors) - 5} more" in caught.value.message


def test_dummy_weights_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = resolve("opt-66b", load_format="dummy")
    check_finite(dataclasses.replace(checkpoint))
