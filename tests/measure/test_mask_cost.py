# SPDX-License-Identifier: Apache-2.0
"""What masks cost is told from pairs of one round."""

from __future__ import annotations

import pytest

from shadowc.measure.mask_cost import mask_cost


def test_a_machine_that_becomes_slower_between_rounds_changes_nothing() -> None:
    found = mask_cost([1.03, 2.06, 4.12], [1.0, 2.0, 4.0])
    assert (found.share, found.lowest, found.highest) == pytest.approx((0.03, 0.03, 0.03))


def test_one_disturbed_round_does_not_move_the_median() -> None:
    found = mask_cost([1.02, 1.5, 1.03], [1.0, 1.0, 1.0])
    assert found.share == pytest.approx(0.03)
    assert found.highest == pytest.approx(0.5)


def test_rounds_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        mask_cost([1.0, 1.0], [1.0])
