# SPDX-License-Identifier: Apache-2.0
"""Oracle scores are the criterion's own, prompt scores what fired in the prompt; each has one protocol."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shadowc.eval import references
from shadowc.eval.load import engine_model
from shadowc.eval.references import oracle_scores, prompt_scores
from shadowc.eval.request import Request, Setting
from shadowc.eval.torch_model import TorchModel
from shadowc.sparsity.collect import record_batch
from shadowc.sparsity.criteria import find_criterion
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError, LookAheadWarning, UnsupportedError
from tests.eval.test_protocols import request

HALF = Density(0.5, 0.25)


def test_the_oracle_knows_each_tokens_own_scores(in_torch: TorchModel) -> None:
    asked, predictor = request(1), in_torch._predictor
    assert predictor is not None
    with torch.inference_mode():  # as `score` calls it
        heads, neurons = oracle_scores(in_torch._model, in_torch._checkpoint.facts, predictor, asked, 3)
    rows = record_batch(
        in_torch._model, in_torch._checkpoint.facts, find_criterion("plainact"), np.array([asked.ids]), [np.array([9])]
    )
    assert heads.shape[0] == 20
    np.testing.assert_allclose(heads[6], rows.heads_MLH[0, 1:], rtol=1e-4, atol=1e-9)
    first_block = rows.neurons_LMF[2][0, predictor.orders_LF[1][: predictor.block]].sum()
    assert neurons[6, 1, 0] == pytest.approx(first_block, rel=1e-4)


def test_the_oracle_keeps_no_more_units_than_asked_where_most_have_no_importance(in_torch: TorchModel) -> None:
    from shadowc.sparsity.selection import select_threshold

    scores_ZLU = np.zeros((2, 3, 64), np.float32)
    scores_ZLU[:, :, ::16] = 0.5
    apart = torch.from_numpy(references._ties_apart(scores_ZLU))[None]
    for scope in ("local", "global"):
        _, active_BZL = select_threshold(apart, torch.tensor([0.25]), scope=scope)
        assert active_BZL.sum(-1).tolist() == [[48, 48]], scope
    assert (apart[0].numpy() > 0).tolist() == (scores_ZLU > 0).tolist()


def test_the_oracle_asks_once_for_all_settings_and_keeps_what_fits(
    in_torch: TorchModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[tuple[int, ...], int]] = []

    def counted(model: object, facts: object, predictor: object, request: Request, first: int) -> tuple[object, object]:
        asked.append((request.ids, first))
        return np.full((2, 3), float(first)), np.full((2, 5), float(sum(request.ids)))

    monkeypatch.setattr(references, "oracle_scores", counted)
    first, second, predictor = request(1), request(2), in_torch._predictor
    assert predictor is not None
    oracle = references.Oracle(in_torch._model, in_torch._checkpoint.facts, predictor)
    for _ in range(2):  # two settings on a piece of two requests, and one with a longer dense start
        for one, dense in ((first, 1), (second, 1), (first, 3)):
            heads, neurons = oracle.scores(one, dense)
            assert (heads[0, 0], neurons[0, 0]) == (dense, sum(one.ids))
    assert len(asked) == 3
    monkeypatch.setattr(references, "KEPT_ORACLE_BYTES", 200)  # one pair has 128
    for one in (second, first):  # the former pushes out all but itself
        oracle.scores(one, 2)
    assert len(asked) == 5
    oracle.scores(first, 2)
    assert len(asked) == 5
    oracle.scores(second, 1)
    assert len(asked) == 6


@pytest.mark.parametrize(
    ("criterion", "signed"), [("taylor", True), ("grasp", True), ("plainact", False), ("fisher", False)]
)
def test_the_oracle_of_scores_with_a_sign_says_that_it_is_no_bound(
    in_torch: TorchModel, criterion: str, signed: bool
) -> None:
    predictor = in_torch._predictor
    assert predictor is not None
    changed = replace(predictor, meta={**predictor.meta, "criterion": criterion})
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        references.Oracle(in_torch._model, in_torch._checkpoint.facts, changed)
    said = [str(one.message) for one in heard if issubclass(one.category, LookAheadWarning)]
    assert [text.startswith(f"oracle of {criterion}: the sign") for text in said] == [True] * signed


def test_the_oracles_masks_are_the_best_units_of_each_token(in_torch: TorchModel) -> None:
    requests = [request(seed, tokens, tokens - 1) for seed, tokens in ((1, 24), (2, 12))]  # one row is padded
    setting = Setting("oracle", HALF)
    together = in_torch.score(requests, setting)
    for one, asked in zip(together, requests, strict=True):
        assert one.log_probability == pytest.approx(in_torch.score([asked], setting)[0].log_probability, rel=1e-5)
        assert one.heads / one.masked == pytest.approx(0.5, abs=0.1)
    tail = Request(requests[0].ids, 6, 18)
    (answer,) = in_torch.score([tail], setting)
    (whole,) = in_torch.score([Request(tail.ids, 6)], Setting("oracle", HALF, prompt_tokens=18))
    assert answer.log_probability == pytest.approx(whole.log_probability, rel=1e-5)


def test_the_oracle_answers_windows_in_which_nothing_is_masked(in_torch: TorchModel) -> None:
    short, long = request(1, 2, 1), request(2)
    dense = in_torch.score([short], Setting())[0]
    alone, together = (
        in_torch.score([short], Setting("oracle", HALF)),
        in_torch.score([short, long], Setting("oracle", HALF)),
    )
    for found in (alone[0], together[0]):
        assert found.masked == 0
        assert found.log_probability == pytest.approx(dense.log_probability, rel=1e-5)


def test_prompt_scores_are_lengths_of_scaled_activations(in_torch: TorchModel) -> None:
    ids, predictor, model = request(3).ids[:7], in_torch._predictor, in_torch._model
    assert predictor is not None
    with torch.inference_mode():
        heads, neurons = prompt_scores(model, predictor, ids)
    seen: list[torch.Tensor] = []
    layer = model.model.decoder.layers[1]
    handles = [part.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone())) for part in
               (layer.self_attn.out_proj, layer.fc2)]  # fmt: skip
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    context, hidden = seen[0].reshape(7, heads.shape[2], -1), seen[1].reshape(7, -1)
    for head in range(heads.shape[2]):
        share = [float(context[at, head].norm() / context[at].norm()) for at in range(7)]
        assert heads[0, 0, head] == pytest.approx(np.sqrt(np.square(share).sum()), rel=1e-4)
    members = predictor.orders_LF[0][: predictor.block]
    share = [float(hidden[at, members.tolist()].norm() / hidden[at].norm()) for at in range(7)]
    assert neurons[0, 0, 0] == pytest.approx(np.sqrt(np.square(share).sum()), rel=1e-4)


def test_neurons_that_are_silent_in_the_prompt_do_not_exceed_the_density(
    fresh_torch: Callable[[], TorchModel],
) -> None:
    loaded = fresh_torch()
    for layer in loaded._model.model.decoder.layers:
        bias = layer.fc1.bias
        bias.data = bias.data - 100.0 * (torch.arange(len(bias)) % 8 > 0)  # one of eight neurons fires
    model = TorchModel(loaded._model, loaded._checkpoint)  # single neurons
    for scope in ("local", "global"):
        (found,) = model.score([request(4, 20, 6, 14)], Setting("prompt", HALF, "prompt", scope=scope))
        assert found.neurons / found.masked == pytest.approx(HALF.neurons, abs=0.01)


def test_the_prompts_mask_holds_for_what_follows(in_torch: TorchModel) -> None:
    asked = request(4, 20, 6, 14)
    (found,) = in_torch.score([asked], Setting("prompt", HALF, "prompt"))
    assert found.masked == 5
    assert found.heads / 5 == pytest.approx(0.5, abs=0.1)
    others = {name: in_torch.score([asked], Setting(name, HALF, "prompt"))[0] for name in ("predictor", "random")}
    assert len({found.log_probability, *(one.log_probability for one in others.values())}) == 3


def test_each_reference_has_one_protocol_and_is_for_torch(
    in_torch: TorchModel, engine_folders: dict[str, Path]
) -> None:
    with pytest.raises(InputError, match="method oracle has protocol decode only; found prompt"):
        in_torch.check(Setting("oracle", HALF, "prompt"))
    with pytest.raises(InputError, match="method prompt has protocol prompt only; found decode"):
        in_torch.check(Setting("prompt", HALF))
    with pytest.raises(UnsupportedError, match="oracle: a reference that torch alone can compute"):
        engine_model(engine_folders["token"]).check(Setting("oracle", HALF))
    assert not {"oracle", "prompt"} & set(in_torch.methods)  # measured only where they are named
