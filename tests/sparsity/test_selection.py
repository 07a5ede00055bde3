# SPDX-License-Identifier: Apache-2.0
"""select_threshold in torch: the same bits as the operator's function in ONNX Runtime and as plain loops.

Letters: B batch, Z tokens, L predicted layers, N units of a layer.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shadowc.sparsity.selection import select_threshold, unit_mask, wanted_units
from shadowc.spec.errors import InputError
from tests.spec import numpy_ops
from tests.spec.sessions import run_op

EXAMPLES = settings(max_examples=80)


@st.composite
def cases(draw: st.DrawFn):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = [draw(st.integers(low, high)) for low, high in ((1, 3), (0, 3), (1, 4), (1, 9))]
    scores = rng.standard_normal(shape).astype(np.float32)
    if draw(st.booleans()):
        scores = np.round(scores)
    scores[rng.random(shape) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = draw(
        st.sampled_from([np.nan, np.inf, -np.inf])
    )
    rows = draw(st.sampled_from([1, shape[0]]))
    shares = st.floats(-0.5, 1.5, width=32) | st.just(math.nan) | st.sampled_from([0.0, 0.5, 1.0])
    density = np.array([draw(shares) for _ in range(rows)], np.float32)
    attributes = {
        "scope": draw(st.sampled_from(["local", "global"])),
        "exempt": draw(st.sampled_from([(-1,), (0,), (0, 2), (0, 1, 2, 3)])),
        "min_active": draw(st.sampled_from([0, 2, 20])),
    }
    return scores, density, attributes


@EXAMPLES
@given(case=cases())
def test_select_threshold_equals_the_operator_and_the_loops(case) -> None:
    scores, density, attributes = case
    found = select_threshold(torch.from_numpy(scores), torch.from_numpy(density), **attributes)
    loops = numpy_ops.select_threshold(scores, density, **attributes)
    onnx_function = run_op("SelectThreshold", {"scores": scores, "density": density}, **attributes)
    for mine, looped, functional in zip(found, loops, onnx_function, strict=True):
        np.testing.assert_array_equal(mine.numpy(), looped)
        np.testing.assert_array_equal(mine.numpy(), functional)
        assert mine.numpy().dtype == functional.dtype


@EXAMPLES
@given(case=cases())
def test_active_counts_the_unit_mask(case) -> None:
    scores, density, attributes = case
    threshold, active = select_threshold(torch.from_numpy(scores), torch.from_numpy(density), **attributes)
    assert torch.equal(unit_mask(torch.from_numpy(scores), threshold).sum(-1), active)


@EXAMPLES
@given(case=cases(), more=st.floats(0.0, 1.0, width=32))
def test_higher_density_never_switches_a_unit_off(case, more: float) -> None:
    scores, density, attributes = case
    scores, density = torch.from_numpy(scores), torch.from_numpy(density).nan_to_num(1.0)
    less, _ = select_threshold(scores, density, **attributes)
    greater, _ = select_threshold(scores, density + more, **attributes)
    assert bool((unit_mask(scores, greater) | ~unit_mask(scores, less)).all())


@EXAMPLES
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.0, 1.0, width=32))
def test_selection_keeps_exactly_the_wanted_units_when_no_scores_tie(seed: int, share: float) -> None:
    scores = torch.from_numpy(np.random.default_rng(seed).permutation(40).astype(np.float32)).view(1, 1, 4, 10)
    density = torch.tensor([share])
    _, active = select_threshold(scores, density, scope="local")
    assert (active == wanted_units(density, 10)).all()
    _, active = select_threshold(scores, density, scope="global", exempt=(2,))
    assert active[0, 0, [0, 1, 3]].sum() == wanted_units(density, 30)
    assert active[0, 0, 2] == 10


def test_wanted_units_is_computed_in_double_precision() -> None:
    just_below_half = np.nextafter(np.float32(0.5), np.float32(0))  # in float32 it plus 0.5 is 1.0: one unit
    assert wanted_units(torch.tensor([just_below_half]), 1).tolist() == [0]
    assert wanted_units(torch.tensor([0.5]), 1).tolist() == [1]


def test_each_row_has_its_own_density() -> None:
    scores = torch.arange(24, dtype=torch.float32).view(1, 1, 2, 12).expand(3, 2, 2, 12)
    _, active = select_threshold(scores, torch.tensor([0.0, 0.25, 1.0]), scope="local")
    assert active[:, 0, 0].tolist() == [0, 3, 12]


def test_selection_refuses_an_unknown_scope() -> None:
    with pytest.raises(InputError, match="local or global"):
        select_threshold(torch.zeros(1, 1, 1, 1), torch.ones(1), scope="layer")  # type: ignore[arg-type]
