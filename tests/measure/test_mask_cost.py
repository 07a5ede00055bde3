# SPDX-License-Identifier: Apache-2.0
"""What masks cost is told from pairs of one round."""

from __future__ import annotations

import numpy as np
import pytest

from shadowc.measure.mask_cost import mask_cost


def test_a_machine_that_becomes_slower_between_rounds_changes_nothing() -> None:
    found = mask_cost([1.03, 2.06, 4.12], [1.0, 2.0, 4.0])
    assert (found.share, found.least, found.most) == pytest.approx((0.03, 0.03, 0.03))


def test_one_disturbed_round_does_not_move_the_median() -> None:
    found = mask_cost([1.02, 1.5, 1.03], [1.0, 1.0, 1.0])
    assert found.share == pytest.approx(0.03)
    assert found.most == pytest.approx(0.5)


@pytest.mark.parametrize(("rounds", "left_out"), [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (21, 5)])
def test_the_interval_leaves_out_what_95_percent_allow(rounds: int, left_out: int) -> None:
    found = mask_cost([1.01 + 0.01 * number for number in range(rounds)], [1.0] * rounds)
    assert found.least == pytest.approx(0.01 * (1 + left_out))
    assert found.most == pytest.approx(0.01 * (rounds - left_out))


@pytest.mark.parametrize("rounds", [6, 9, 21])
def test_medians_of_many_more_rounds_lie_in_19_of_20_intervals(rounds: int) -> None:
    rng, inside, runs = np.random.default_rng(0), 0, 2000
    for _ in range(runs):
        found = mask_cost((1 + rng.standard_exponential(rounds)).tolist(), [1.0] * rounds)
        inside += found.least <= np.log(2) <= found.most
    assert 0.945 < inside / runs < 0.99


def test_rounds_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        mask_cost([1.0, 1.0], [1.0])
