# SPDX-License-Identifier: Apache-2.0
"""Products of Hessian and gradient, by groups of layers, are those of the plain way (whole.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from shadowc.sparsity import curved, record
from shadowc.sparsity.criteria import find_criterion
from shadowc.sparsity.curved import curved_signals
from shadowc.sparsity.families import decoder_of
from shadowc.sparsity.signals import LayerSignals
from shadowc.sparsity.whole import whole_signals
from tests.sparsity.two_layers import LAYERS, differentiable_twice, model_of, texts

EXACT = 1e-9
PARTS = (
    "context_BTHD", "preactivation_BTF", "hidden_BTF",
    "context_gradient_BTHD", "preactivation_gradient_BTF", "hidden_gradient_BTF",
    "context_curvature_BTHD", "preactivation_curvature_BTF",
)  # fmt: skip


@pytest.fixture(scope="module", params=["opt", "llama"])
def model(request: pytest.FixtureRequest) -> Any:
    """float64, two layers."""
    return model_of(request.param)


def by_groups(model: Any, group: int) -> tuple[list[LayerSignals], torch.Tensor]:
    found: dict[int, LayerSignals] = {}
    with differentiable_twice():
        losses_B = curved_signals(decoder_of(model), texts(), found.__setitem__, group=group)
    return [found[layer] for layer in range(LAYERS)], losses_B


def assert_as_the_plain_way(model: Any, group: int) -> None:
    with differentiable_twice():
        plain, losses_BT = whole_signals(decoder_of(model), texts(), curvature=True)
    found, losses_B = by_groups(model, group)
    np.testing.assert_allclose(losses_B, losses_BT.sum(1), rtol=EXACT)
    for mine, theirs in zip(found, plain, strict=True):
        for part in PARTS:
            one, other = getattr(mine, part), getattr(theirs, part)
            assert other.abs().max() > 0
            np.testing.assert_allclose(one, other, rtol=0, atol=EXACT * float(other.abs().max()), err_msg=part)


@pytest.mark.parametrize("group", [0, 1, 2])
def test_groups_give_the_signals_of_the_plain_way(model: Any, group: int) -> None:
    assert_as_the_plain_way(model, group)


def test_a_change_that_does_not_pass_from_group_to_group_is_found(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted defect: what a group reads does not change with the layers below."""
    original = curved._run_with_change

    def forgetful(*arguments: Any) -> Any:
        run = original(*arguments)
        run.starts = {layer: (number, torch.zeros_like(change)) for layer, (number, change) in run.starts.items()}
        return run

    monkeypatch.setattr(curved, "_run_with_change", forgetful)
    assert_as_the_plain_way(model, 0)  # one group has nothing below it
    with pytest.raises(AssertionError, match="curvature"):
        assert_as_the_plain_way(model, 1)


def test_the_model_is_left_as_it_was(model: Any) -> None:
    before = model(texts()).logits
    by_groups(model, 1)
    assert torch.equal(model(texts()).logits, before)
    assert not [module for module in model.modules() if module._forward_hooks or module._forward_pre_hooks]
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_scores_are_the_same_where_the_whole_graph_is_too_large(
    tiny_model: Any, checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids_BT = np.random.default_rng(0).integers(4, 300, (2, 12))
    arguments = (tiny_model, checkpoint.facts, find_criterion("grasp"), ids_BT, [np.arange(1, 11)] * 2)
    whole = record.record_batch(*arguments)
    monkeypatch.setattr(record, "WHOLE_BYTES", 0)
    monkeypatch.setattr(record, "BATCH_BYTES", 1)
    parts = record.record_batch(*arguments)
    assert parts.loss == pytest.approx(whole.loss)
    largest = np.abs(whole.heads_MLH).max()
    np.testing.assert_allclose(parts.heads_MLH, whole.heads_MLH, rtol=1e-3, atol=1e-5 * largest)
    for mine, theirs in zip(parts.neurons_LMF, whole.neurons_LMF, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-5 * np.abs(theirs).max())


def test_criteria_of_second_order_keep_what_fits_and_walk_in_groups_where_it_does_not() -> None:
    from shadowc.checkpoint.resolve import resolve

    small, large = (resolve(name, load_format="dummy").facts for name in ("opt-125m", "opt-1.3b"))
    assert record.whole_fits(small, 1, 256)
    assert not record.whole_fits(large, 1, 256)
    assert 1 <= record.layers_at_once(large, 1, 256, curvature=True) < record.layers_at_once(large, 1, 256)
