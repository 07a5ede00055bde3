# SPDX-License-Identifier: Apache-2.0
"""Density: shares from 0 to 1, checked when made."""

from __future__ import annotations

import math

import pytest

from shadowc.spec.density import Density
from shadowc.spec.errors import InputError

OUTSIDE = (-0.1, 1.0001, 50.0, math.inf, -math.inf, math.nan)


def test_density_is_dense_when_nothing_is_said() -> None:
    assert Density() == Density(heads=1.0, neurons=1.0)


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_one_number_means_both_kinds(share: float) -> None:
    assert Density.of(share) == Density(share, share)


def test_density_of_a_density_is_itself() -> None:
    density = Density(0.5, 0.2)
    assert Density.of(density) is density


@pytest.mark.parametrize("share", OUTSIDE)
@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_density_outside_the_range_is_refused_by_name(kind: str, share: float) -> None:
    with pytest.raises(InputError, match=f"from 0 to 1; found {kind} {share}"):
        Density(**{kind: share})


def test_both_wrong_shares_are_named_at_once() -> None:
    with pytest.raises(InputError, match=r"heads 2.0 and neurons -1.0"):
        Density(2.0, -1.0)


def test_density_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Density().heads = 0.5  # type: ignore[misc]
