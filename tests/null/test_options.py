# SPDX-License-Identifier: Apache-2.0
"""Options of the stages: frozen, strict about names, checked, and the same text for the same choice."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from shadowc.spec.density import Density
from shadowc.spec.errors import InputError
from shadowc.spec.options import CollectOptions, CompileOptions, TrainOptions

WRONG = [
    (CollectOptions, {"positions": 0}),
    (CollectOptions, {"length": 1}),
    (TrainOptions, {"neuron_block": 0}),
    (TrainOptions, {"validation": 1.0}),
    (TrainOptions, {"rate": 0.0}),
    (CompileOptions, {"model": "opt-mini", "scope": "layer"}),
    (CompileOptions, {"model": "opt-mini", "weights": "int3"}),
    (CompileOptions, {"model": "opt-mini", "densty": 0.5}),
    (CompileOptions, {}),
]


@pytest.mark.parametrize(("kind", "values"), WRONG)
def test_wrong_options_are_refused(kind, values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        kind(**values)


def test_options_cannot_be_changed() -> None:
    options = CompileOptions(model="opt-mini")
    with pytest.raises(ValidationError, match="frozen"):
        options.scope = "local"  # type: ignore[misc]


def test_options_survive_json() -> None:
    options = CompileOptions(model="opt-mini", out=Path("mini"), head_density=0.2, train=TrainOptions(neuron_block=8))
    assert CompileOptions.model_validate_json(options.model_dump_json()) == options


def test_equal_options_have_equal_text_and_unequal_ones_do_not() -> None:
    text = CompileOptions(model="opt-mini").model_dump_json()
    assert CompileOptions(model="opt-mini").model_dump_json() == text
    assert CompileOptions(model="opt-mini", seed=1).model_dump_json() != text


def test_density_of_options_is_checked_when_read() -> None:
    assert CompileOptions(model="opt-mini", neuron_density=0.2).density == Density(0.5, 0.2)
    with pytest.raises(InputError):
        _ = CompileOptions(model="opt-mini", head_density=1.5).density
