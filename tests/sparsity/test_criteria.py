# SPDX-License-Identifier: Apache-2.0
"""Criteria: formulas against autograd by hand, finite differences, and the identity they rest on."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from shadowc.checkpoint.opt import OptFacts
from shadowc.sparsity.criteria import criterion, criterion_names, find_criterion
from shadowc.sparsity.record import record_batch
from shadowc.sparsity.signals import LayerSignals
from shadowc.spec.errors import InputError, InternalError

FLOAT32 = 1e-4
DIFFERENCE = 1e-5  # central differences in float64 with the step below
STEP = 1e-4


@pytest.fixture(scope="module")
def ids_BT() -> torch.Tensor:
    ids = torch.randint(4, 320, (2, 12), generator=torch.Generator().manual_seed(5))
    ids[:, 0] = 2
    return ids


def summed_loss(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    logits_BTV = model(input_ids=ids_BT).logits
    return F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), ids_BT[:, 1:].flatten(), reduction="sum")


def scored(model: Any, facts: OptFacts, name: str, ids_BT: torch.Tensor) -> Any:
    positions = [np.arange(ids_BT.shape[1])] * len(ids_BT)
    return record_batch(model, facts, find_criterion(name), ids_BT.numpy(), positions)


def loss_with_scaled(model: Any, ids_BT: torch.Tensor, site: Any, where: tuple[Any, ...], factor: float) -> float:
    """The loss when some numbers of one activation are multiplied by a factor."""

    def scale(values: torch.Tensor) -> torch.Tensor:
        changed = values.clone().reshape(*ids_BT.shape, -1)
        changed[where] *= factor
        return changed.reshape(values.shape)

    kind, module = site
    hook = (
        module.register_forward_pre_hook(lambda _, inputs: (scale(inputs[0]),))
        if kind == "input"
        else module.register_forward_hook(lambda _, __, output: scale(output))
    )
    with torch.no_grad():
        loss = float(summed_loss(model, ids_BT))
    hook.remove()
    return loss


@pytest.mark.parametrize("layer", [0, 2])
def test_plainact_equals_the_slope_of_the_loss_when_a_unit_is_scaled(
    tiny_model: Any, facts: OptFacts, ids_BT: torch.Tensor, layer: int
) -> None:
    exact = copy.deepcopy(tiny_model).double()
    exact.set_attn_implementation("sdpa")  # the eager one takes its softmax in float32
    rows = scored(exact, facts, "plainact", ids_BT)
    decoder_layer = exact.model.decoder.layers[layer]
    head, neuron, row, t = 1, int(rows.neurons_LMF[layer][5].argmax()), 0, 5
    sites = {
        "head": (("input", decoder_layer.self_attn.out_proj), (row, t, slice(16 * head, 16 * head + 16))),
        "neuron": (("output", decoder_layer.fc1), (row, t, neuron)),
    }
    found = {"head": rows.heads_MLH[t, layer, head], "neuron": rows.neurons_LMF[layer][t, neuron]}
    for kind, (site, where) in sites.items():
        up, down = (loss_with_scaled(exact, ids_BT, site, where, 1 + sign * STEP) for sign in (1, -1))
        assert found[kind] == pytest.approx(abs(up - down) / (2 * STEP), rel=DIFFERENCE), kind


def test_plainact_equals_autograd_by_hand(tiny_model: Any, facts: OptFacts, ids_BT: torch.Tensor) -> None:
    kept: dict[str, torch.Tensor] = {}
    model = copy.deepcopy(tiny_model).requires_grad_(True)
    layer = model.model.decoder.layers[1]
    layer.self_attn.out_proj.register_forward_pre_hook(lambda _, inputs: kept.update(a=inputs[0]))
    layer.fc1.register_forward_hook(lambda _, __, output: kept.update(u=output))
    loss = summed_loss(model, ids_BT)
    slope_a, slope_u, slope_w = torch.autograd.grad(loss, [kept["a"], kept["u"], layer.fc1.weight])
    heads = (slope_a * kept["a"]).detach().reshape(-1, 4, 16).sum(-1).abs()
    neurons = (slope_u * kept["u"]).detach().reshape(-1, 256).abs()

    rows = scored(tiny_model, facts, "plainact", ids_BT)

    torch.testing.assert_close(torch.from_numpy(rows.heads_MLH[:, 1]), heads, rtol=FLOAT32, atol=FLOAT32)
    torch.testing.assert_close(torch.from_numpy(rows.neurons_LMF[1]), neurons, rtol=FLOAT32, atol=FLOAT32)
    # The published weight form is the same product, summed over tokens and without the bias.
    published = (slope_w * layer.fc1.weight).sum(1)
    activation_form = (slope_u * (kept["u"] - layer.fc1.bias)).reshape(-1, 256).sum(0)
    torch.testing.assert_close(activation_form, published, rtol=FLOAT32, atol=FLOAT32)


def test_plainact_is_zero_for_a_neuron_that_did_not_fire(
    tiny_model: Any, facts: OptFacts, ids_BT: torch.Tensor
) -> None:
    signed = scored(tiny_model, facts, "l2norm", ids_BT)
    hidden: list[torch.Tensor] = []
    hook = tiny_model.model.decoder.layers[2].fc1.register_forward_hook(lambda _, __, output: hidden.append(output))
    with torch.no_grad():
        tiny_model(input_ids=ids_BT)
    hook.remove()
    silent = (hidden[0].reshape(-1, 256) <= 0).numpy()

    important = scored(tiny_model, facts, "plainact", ids_BT).neurons_LMF[2]

    assert silent.any()
    assert (important[silent] == 0).all()
    assert (signed.neurons_LMF[2][silent] > 0).any()  # the published norm does rank them: its documented weakness


def test_l2norm_is_the_published_formula_per_token() -> None:
    generator = torch.Generator().manual_seed(1)
    context_BTHD, fc1_BTF = (torch.randn(2, 3, 4, 5, generator=generator), torch.randn(2, 3, 7, generator=generator))
    heads_BTH, neurons_BTF = find_criterion("l2norm").score(LayerSignals(context_BTHD, fc1_BTF, fc1_BTF.relu()))
    torch.testing.assert_close(heads_BTH, (context_BTHD**2).sum(-1).sqrt())
    torch.testing.assert_close(neurons_BTF, (fc1_BTF**2).sqrt())


def test_activation_is_what_a_unit_says_and_zero_for_a_neuron_that_did_not_fire() -> None:
    generator = torch.Generator().manual_seed(1)
    context_BTHD, fc1_BTF = (torch.randn(2, 3, 4, 5, generator=generator), torch.randn(2, 3, 7, generator=generator))
    heads_BTH, neurons_BTF = find_criterion("activation").score(LayerSignals(context_BTHD, fc1_BTF, fc1_BTF.relu()))
    torch.testing.assert_close(heads_BTH, (context_BTHD**2).sum(-1).sqrt())
    torch.testing.assert_close(neurons_BTF, torch.where(fc1_BTF > 0, fc1_BTF, 0.0))


def test_registry_says_what_needs_gradients_and_where_formulas_come_from() -> None:
    assert set(criterion_names()) >= {"l2norm", "plainact"}
    assert find_criterion("plainact").gradients
    assert not find_criterion("l2norm").gradients
    assert all("Source:" in find_criterion(name).formula for name in criterion_names())


def test_unknown_criterion_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match=r"known are activation, epenas, fisher, .*, snip") as caught:
        find_criterion("plain-act")
    assert caught.value.hint == "--criterion plainact"


def test_registering_a_name_twice_is_a_bug() -> None:
    with pytest.raises(InternalError, match="two criteria"):
        criterion("l2norm", gradients=False)(lambda signals: (signals.context_BTHD, signals.preactivation_BTF))


def test_using_gradients_without_asking_is_a_bug() -> None:
    signals = LayerSignals(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))
    with pytest.raises(InternalError, match="did not ask"):
        find_criterion("plainact").score(signals)
