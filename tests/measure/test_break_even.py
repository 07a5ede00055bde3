# SPDX-License-Identifier: Apache-2.0
"""Break-even on rows made by hand."""

from __future__ import annotations

import pytest

from shadowc.measure.break_even import BreakEven, break_even


def test_times_meet_on_the_line_between_two_densities() -> None:
    found = break_even([(0.5, 0.7), (1.0, 1.1), (0.8, 0.9)])
    assert found == BreakEven("interpolated", pytest.approx(0.9))
    assert str(found) == "0.90"


def test_the_largest_crossing_counts_where_noise_makes_several() -> None:
    assert break_even([(1.0, 1.2), (0.8, 0.8), (0.5, 1.1), (0.2, 0.5)]).density == pytest.approx(0.9)


def test_a_density_that_takes_as_long_as_the_twin_is_not_faster() -> None:
    assert break_even([(1.0, 1.2), (0.5, 1.0)]) == BreakEven("below", 0.5)
    assert break_even([(1.0, 1.0), (0.5, 0.5)]) == BreakEven("interpolated", 1.0)


def test_faster_at_the_largest_density_says_that_more_was_not_measured() -> None:
    found = break_even([(0.2, 0.4), (0.5, 0.7)])
    assert found == BreakEven("at least", 0.5)
    assert str(found) == "at least 0.5, the largest measured"


def test_faster_at_none_says_so() -> None:
    found = break_even([(0.2, 1.3), (0.5, 1.7)])
    assert found == BreakEven("below", 0.2)
    assert "faster at none" in str(found)
