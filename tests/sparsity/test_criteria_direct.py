# SPDX-License-Identifier: Apache-2.0
"""Every criterion against a slow direct computation on two layers: mask variables, finite differences, loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from shadowc.sparsity.criteria import find_criterion
from shadowc.sparsity.families import decoder_of
from shadowc.sparsity.signals import LayerSignals, TextSample
from shadowc.sparsity.text import TextRows
from shadowc.sparsity.whole import weights_by_unit, whole_signals
from tests.sparsity.two_layers import (
    HEAD_SIZE,
    HEADS,
    LAYERS,
    NEURONS,
    Place,
    differentiable_twice,
    loss_with,
    model_of,
    texts,
)

EXACT = 1e-9
DIFFERENCES = 1e-5
STEP = 1e-5
FAMILIES = ("opt", "llama")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return model_of(request.param)


@pytest.fixture(scope="module")
def signals(model: Any) -> list[LayerSignals]:
    with differentiable_twice():
        found, _ = whole_signals(decoder_of(model), texts(), curvature=True, rows=True)
    return found


@pytest.fixture(scope="module")
def samples(model: Any) -> list[TextSample]:
    """All positions of many texts."""
    decoder, ids_BT = decoder_of(model), texts(30, 10)
    with differentiable_twice():
        found, _ = whole_signals(decoder, ids_BT)
    rows = TextRows(decoder, seed=5)
    row_M, position_M = torch.arange(30).repeat_interleave(8), torch.arange(1, 9).repeat(30)
    rows.begin(row_M, ids_BT[row_M, position_M + 1])
    for layer, of_layer in enumerate(found):
        rows.add(layer, of_layer, row_M, position_M)
    return list(rows.samples())


def slopes(model: Any, name: str, layer: int, masks: Tensor, spread: Callable[[Tensor], Tensor]) -> Tensor:
    """dLoss/dc of mask variables c = 1 that multiply what passes at a place."""
    variables = masks.clone().requires_grad_()
    place: Place = (name, layer)  # type: ignore[assignment]
    loss = loss_with(model, texts(), {place: lambda values: values * spread(variables)})
    (found,) = torch.autograd.grad(loss, variables)
    return found


def head_slopes(model: Any, layer: int, *, shared: bool = False) -> Tensor:
    shape = (3, 1, HEADS) if shared else (3, 10, HEADS)
    spread = lambda masks: masks.repeat_interleave(HEAD_SIZE, -1)  # noqa: E731
    return slopes(model, "context", layer, torch.ones(shape, dtype=torch.float64), spread)


def neuron_slopes(model: Any, layer: int, *, shared: bool = False) -> Tensor:
    shape = (3, 1, NEURONS) if shared else (3, 10, NEURONS)
    return slopes(model, "hidden", layer, torch.ones(shape, dtype=torch.float64), lambda masks: masks)


def scored(name: str, signals: LayerSignals) -> tuple[Tensor, Tensor]:
    heads, neurons = find_criterion(name).score(signals)
    return heads, neurons


def same(found: Tensor, direct: Tensor, tolerance: float = EXACT) -> None:
    assert float(direct.abs().max()) > 1e-6, "nothing to compare"
    torch.testing.assert_close(found.double(), direct, rtol=tolerance, atol=tolerance * float(direct.abs().max()))


@pytest.mark.parametrize("layer", range(LAYERS))
def test_plainact_is_the_slope_of_a_mask_variable_at_one_token(
    model: Any, signals: list[LayerSignals], layer: int
) -> None:
    heads_BTH, neurons_BTF = scored("plainact", signals[layer])
    same(heads_BTH, head_slopes(model, layer).abs())
    same(neurons_BTF, neuron_slopes(model, layer).abs())


@pytest.mark.parametrize("layer", range(LAYERS))
def test_taylor_is_that_slope_with_the_sign_of_taking_the_unit_away(
    model: Any, signals: list[LayerSignals], layer: int
) -> None:
    heads_BTH, neurons_BTF = scored("taylor", signals[layer])
    same(heads_BTH, -head_slopes(model, layer))
    same(neurons_BTF, -neuron_slopes(model, layer))
    assert float(neurons_BTF.min()) < 0 < float(neurons_BTF.max())


@pytest.mark.parametrize("layer", range(LAYERS))
def test_snip_is_the_slope_of_one_mask_variable_for_all_tokens(
    model: Any, signals: list[LayerSignals], layer: int
) -> None:
    heads_BH, neurons_BF = scored("snip", signals[layer])
    same(heads_BH, head_slopes(model, layer, shared=True)[:, 0].abs())
    same(neurons_BF, neuron_slopes(model, layer, shared=True)[:, 0].abs())


@pytest.mark.parametrize("layer", range(LAYERS))
def test_fisher_is_the_square_of_slopes_a_mask_variable_for_every_number(
    model: Any, signals: list[LayerSignals], layer: int
) -> None:
    heads_BTH, neurons_BTF = scored("fisher", signals[layer])
    ones = torch.ones((3, 10, HEADS * HEAD_SIZE), dtype=torch.float64)
    each_BTE = slopes(model, "context", layer, ones, lambda masks: masks)
    same(heads_BTH, each_BTE.reshape(3, 10, HEADS, HEAD_SIZE).square().sum(-1))
    same(neurons_BTF, neuron_slopes(model, layer).square())


def test_gradnorm_is_the_size_of_finite_differences(model: Any, signals: list[LayerSignals]) -> None:
    heads_BTH, neurons_BTF = scored("gradnorm", signals[0])
    row, t, head, neuron = 1, 4, 1, int(neurons_BTF[1, 4].argmax())

    def slope(name: Any, index: int) -> float:
        def moved(sign: float) -> Callable[[Tensor], Tensor]:
            def change(values: Tensor) -> Tensor:
                values = values.clone()
                values[row, t, index] += sign * STEP
                return values

            return change

        with torch.no_grad():
            up, down = (float(loss_with(model, texts(), {(name, 0): moved(sign)})) for sign in (1, -1))
        return (up - down) / (2 * STEP)

    each = [slope("context", head * HEAD_SIZE + i) for i in range(HEAD_SIZE)]
    assert float(heads_BTH[row, t, head]) == pytest.approx(math.hypot(*each), rel=DIFFERENCES)
    site = "preactivation"
    assert float(neurons_BTF[row, t, neuron]) == pytest.approx(abs(slope(site, neuron)), rel=DIFFERENCES)


def test_norms_are_loops_over_numbers(signals: list[LayerSignals]) -> None:
    one = signals[1]
    for name, read in (("l2norm", one.preactivation_BTF), ("activation", one.hidden_BTF)):
        heads_BTH, neurons_BTF = scored(name, one)
        for row, t, head in np.ndindex(3, 10, HEADS):
            wanted = math.sqrt(sum(float(a) ** 2 for a in one.context_BTHD[row, t, head]))
            assert float(heads_BTH[row, t, head]) == pytest.approx(wanted, rel=EXACT)
        same(neurons_BTF, read.abs())


def test_weight_form_is_the_gradient_of_weights_one_text_at_a_time(model: Any, signals: list[LayerSignals]) -> None:
    heads_BH, neurons_BF = scored("plainact_weight", signals[1])
    parts = [w for w in decoder_of(model).blocks[1].neurons if w.axis == 0 and w.name.endswith(".weight")]
    assert len(parts) == (1 if model.config.model_type == "opt" else 2)
    for row in range(3):
        wanted = torch.zeros(NEURONS, dtype=torch.float64)
        for part in parts:
            part.parameter.requires_grad_()
            ids_T = texts()[row : row + 1]
            (gradient_FE,) = torch.autograd.grad(loss_with(model, ids_T, {}), part.parameter)
            part.parameter.requires_grad_(False)
            for neuron in range(NEURONS):
                wanted[neuron] += sum((gradient_FE[neuron] * part.parameter[neuron]).abs())
        same(neurons_BF[row], wanted)
    same(heads_BH, head_slopes(model, 1).abs().sum(1))


def gradients_at(model: Any, pushed: list[Tensor]) -> list[Tensor]:
    """dLoss/dδ of numbers added to contexts and u of all layers, at δ = pushed (contexts first)."""
    variables = [values.clone().requires_grad_() for values in pushed]
    names = [("context", layer) for layer in range(LAYERS)] + [("preactivation", layer) for layer in range(LAYERS)]
    changes = {
        place: (lambda values, added=added: values + added) for place, added in zip(names, variables, strict=True)
    }
    loss = loss_with(model, texts(), changes)  # type: ignore[arg-type]
    return list(torch.autograd.grad(loss, variables))


def grasp_by_differences(model: Any, signals: list[LayerSignals]) -> list[Tensor]:
    """-a (Hg) and -u (Hq) of all layers, the product by finite differences of gradients along the gradient."""
    contexts = [torch.zeros(3, 10, HEADS * HEAD_SIZE, dtype=torch.float64) for _ in range(LAYERS)]
    hidden = [torch.zeros(3, 10, NEURONS, dtype=torch.float64) for _ in range(LAYERS)]
    gradient = gradients_at(model, [*contexts, *hidden])
    size = STEP / max(float(g.abs().max()) for g in gradient)
    up, down = (gradients_at(model, [sign * size * g for g in gradient]) for sign in (1, -1))
    product = [(u - d) / (2 * size) for u, d in zip(up, down, strict=True)]
    heads = [
        -(product[layer].reshape(3, 10, HEADS, HEAD_SIZE) * signals[layer].context_BTHD).sum(-1)
        for layer in range(LAYERS)
    ]
    return heads + [-product[LAYERS + layer] * signals[layer].preactivation_BTF for layer in range(LAYERS)]


def test_grasp_is_a_product_with_the_hessian_by_finite_differences(model: Any, signals: list[LayerSignals]) -> None:
    direct = grasp_by_differences(model, signals)
    for layer in range(LAYERS):
        heads_BTH, neurons_BTF = scored("grasp", signals[layer])
        same(heads_BTH, direct[layer], DIFFERENCES)
        same(neurons_BTF, direct[LAYERS + layer], DIFFERENCES)


def test_a_product_that_leaves_other_layers_out_is_caught(model: Any, signals: list[LayerSignals]) -> None:
    """Planted defect: the gradient alone in the product's place, and the product of one layer's own block."""
    direct = grasp_by_differences(model, signals)
    first = -(signals[1].gradients()[0] * signals[1].context_BTHD).sum(-1)
    with pytest.raises(AssertionError):
        same(first, direct[1], DIFFERENCES)
    with differentiable_twice():
        own = own_block_only(model)
    with pytest.raises(AssertionError):
        same(-(own * signals[1].context_BTHD).sum(-1), direct[1], DIFFERENCES)


def own_block_only(model: Any) -> Tensor:
    """The Hessian of layer 1's contexts alone, times their gradient."""
    added = torch.zeros(3, 10, HEADS * HEAD_SIZE, dtype=torch.float64, requires_grad=True)
    loss = loss_with(model, texts(), {("context", 1): lambda values: values + added})
    (gradient,) = torch.autograd.grad(loss, added, create_graph=True)
    (product,) = torch.autograd.grad((gradient.detach() * gradient).sum(), added)
    return product.reshape(3, 10, HEADS, HEAD_SIZE)


def test_magnitude_is_a_loop_over_the_weights_of_a_unit(model: Any, samples: list[TextSample]) -> None:
    heads_H, neurons_F = find_criterion("magnitude").score(samples[1])
    named = dict(model.named_parameters())
    opt = model.config.model_type == "opt"
    scope = "model.decoder.layers.1" if opt else "model.layers.1"
    rows_of_heads = ("q_proj", "k_proj", "v_proj") if opt else ("q_proj",)
    for head in range(HEADS):
        mine = slice(head * HEAD_SIZE, (head + 1) * HEAD_SIZE)
        total = sum(float((named[f"{scope}.self_attn.{name}.weight"][mine] ** 2).sum()) for name in rows_of_heads)
        total += float((named[f"{scope}.self_attn.{'out_proj' if opt else 'o_proj'}.weight"][:, mine] ** 2).sum())
        assert float(heads_H[head]) == pytest.approx(math.sqrt(total), rel=EXACT)
    rows, column = (("fc1",), "fc2") if opt else (("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
    for neuron in range(NEURONS):
        total = sum(float((named[f"{scope}.{name}.weight"][neuron] ** 2).sum()) for name in rows)
        total += float((named[f"{scope}.{column}.weight"][:, neuron] ** 2).sum())
        assert float(neurons_F[neuron]) == pytest.approx(math.sqrt(total), rel=EXACT)


def test_nwot_counts_agreeing_signs_of_pairs_of_texts(samples: list[TextSample]) -> None:
    sample = samples[0]
    heads_H, neurons_F = find_criterion("nwot").score(sample)

    def counted(signs_NB: np.ndarray[Any, Any]) -> float:
        count = len(signs_NB)
        kernel = np.array([[(signs_NB[m] == signs_NB[n]).sum() for n in range(count)] for m in range(count)], float)
        return float(np.linalg.slogdet(kernel + np.eye(count))[1])

    context = sample.context().reshape(30, 8, HEADS, HEAD_SIZE).numpy() > 0
    for head in range(HEADS):
        assert float(heads_H[head]) == pytest.approx(counted(context[:, :, head].reshape(30, -1)), rel=1e-5)
    hidden = sample.preactivation().reshape(30, 8, NEURONS).numpy() > 0
    for neuron in range(NEURONS):
        assert float(neurons_F[neuron]) == pytest.approx(counted(hidden[:, :, neuron]), rel=1e-5)


def test_nwot_of_a_neuron_that_never_fires_is_the_lowest_and_finite() -> None:
    silent = TextSample(0, 1, 2, 0, torch.arange(3).repeat_interleave(4), torch.zeros(12), preactivation_RF=None,
                        context_RHD=torch.ones(12, 1, 2))  # fmt: skip
    values = torch.stack([-torch.ones(12), torch.randn(12, generator=torch.Generator().manual_seed(0))], 1)
    _, neurons_F = find_criterion("nwot").score(replaced(silent, values))
    assert float(neurons_F[0]) == pytest.approx(math.log(1 + 3 * 4))
    assert float(neurons_F[1]) > float(neurons_F[0])


def replaced(sample: TextSample, values_RF: Tensor) -> TextSample:
    from dataclasses import replace

    return replace(sample, preactivation_RF=values_RF)


def test_jacov_is_the_published_sum_over_eigenvalues_without_those_that_are_zero(samples: list[TextSample]) -> None:
    sample = samples[1]
    heads_H, neurons = find_criterion("jacov").score(sample)
    assert neurons is None
    for head in range(HEADS):
        rows = sample.gradient()[:, head].numpy()
        rows = rows[np.abs(rows).sum(1) > 0]
        generator = torch.Generator().manual_seed(sample.seed)
        found = []
        for _ in range(10):
            drawn = torch.randperm(len(rows), generator=generator)[:200].numpy()
            values = np.sort(np.linalg.eigvalsh(np.corrcoef(rows[drawn])))
            assert np.abs(values[: -(HEAD_SIZE - 1)]).max() < 1e-9  # what is left out is zero
            values = values[-(HEAD_SIZE - 1) :]
            found.append(-sum(math.log(v + 1e-5) + 1 / (v + 1e-5) for v in values))
        assert float(heads_H[head]) == pytest.approx(float(np.mean(found)), rel=1e-5)


def test_epenas_compares_classes_of_the_next_token(samples: list[TextSample]) -> None:
    sample = samples[0]
    heads_H, neurons = find_criterion("epenas").score(sample)
    assert neurons is None
    labels = sample.label_R.numpy()
    classes = [label for label in np.unique(labels) if (labels == label).sum() > 4]
    assert len(classes) > 3
    for head in range(HEADS):
        rows = sample.gradient()[:, head].numpy()
        s = [np.log(np.abs(np.corrcoef(rows[labels == label])) + 1e-5).mean() for label in classes]
        wanted = np.mean([abs(s[i] - s[j]) for i in range(len(s)) for j in range(i)])
        assert float(heads_H[head]) == pytest.approx(float(wanted), rel=1e-5)


def test_random_is_another_draw_in_every_layer_and_the_same_for_a_seed(samples: list[TextSample]) -> None:
    score = find_criterion("random").score
    assert not torch.equal(score(samples[0])[1], score(samples[1])[1])
    assert torch.equal(score(samples[1])[1], score(samples[1])[1])


def test_weights_by_unit_hold_every_weight_of_a_unit_once(model: Any) -> None:
    block = decoder_of(model).blocks[0]
    found = weights_by_unit(block)
    shared = 0 if model.config.model_type == "opt" else 2 * 16 * HEAD_SIZE  # one head of keys and of values
    attention = sum(w.numel() for name, w in block.layer.self_attn.named_parameters() if name.endswith("weight"))
    assert found.heads_HW.numel() + shared == attention
    assert found.neurons_FW.shape == (NEURONS, 16 * (2 if model.config.model_type == "opt" else 3))
