# SPDX-License-Identifier: Apache-2.0
"""Torch and engines answer alike, and each protocol masks what it says."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shadowc.eval.load import engine_model
from shadowc.eval.model import EvaluatedModel
from shadowc.eval.request import Protocol, Request, Setting
from shadowc.eval.run import evaluate, settings_of
from shadowc.eval.texts import TextCorpus, corpus_of
from shadowc.eval.torch_model import TorchModel
from shadowc.sparsity.predictor import Predictor
from shadowc.sparsity.reference import MaskedState
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError, UnsupportedError
from shadowc.spec.options import Style
from tests.eval.conftest import PROSE

HALF = Density(0.5, 0.25)
WINDOW = 32


def text(model: EvaluatedModel) -> TextCorpus:
    return corpus_of(model, "prose", [PROSE * 2], "0", WINDOW)


def request(seed: int = 0, tokens: int = 24, scored: int = 23, prompt: int | None = None) -> Request:
    ids = np.random.default_rng(seed).integers(4, 200, tokens)
    return Request(tuple(map(int, ids)), scored, prompt)


@pytest.mark.parametrize(("protocol", "mask"), [("decode", "token"), ("prompt", "sequence")])
def test_engine_and_torch_give_the_same_figures(
    in_torch: TorchModel, engine_folders: dict[str, Path], protocol: Protocol, mask: str
) -> None:
    engine = engine_model(engine_folders[mask])
    settings = settings_of(in_torch.methods, [HALF, Density(1.0, 0.3)], [protocol])
    ours = evaluate(in_torch, [text(in_torch)], settings).rows
    theirs = evaluate(engine, [text(engine)], settings).rows
    assert in_torch.methods == engine.methods == ("predictor", "static", "normalised", "random", "static-magnitude")
    assert len(ours) == 1 + 2 * 5
    for one, other in zip(ours, theirs, strict=True):
        assert one.metrics[0].value == pytest.approx(other.metrics[0].value, rel=1e-5), one.setting
        assert one.active_heads == pytest.approx(other.active_heads)
        assert one.active_neurons == pytest.approx(other.active_neurons)
        assert one.masked_share == other.masked_share
    found = {(row.setting.method, row.setting.density): round(row.metrics[0].value, 6) for row in ours}
    assert len({value for (method, _), value in found.items() if method != "static"}) == 1 + 2 * 4


def test_an_engine_answers_tasks_as_torch_does(in_torch: TorchModel, engine_folders: dict[str, Path]) -> None:
    requests = [request(seed, 20, 6, 14) for seed in range(4)] + [request(9, 15, 1, 14)]
    for method in ("dense", "predictor", "random", "normalised"):
        setting = Setting(method, HALF)
        ours = in_torch.score(requests, setting)
        theirs = engine_model(engine_folders["token"]).score(requests, setting)
        for one, other in zip(ours, theirs, strict=True):
            assert one.log_probability == pytest.approx(other.log_probability, rel=1e-5)
            assert (one.masked, one.greedy) == (other.masked, other.greedy)


def step_by_step(model: TorchModel, ids: tuple[int, ...], dense: int) -> torch.Tensor:
    """Logits [S,V] of the masked torch model that is fed token by token, as a decoder is."""
    masked, state = model._masked_model(), MaskedState()
    rows = []
    for at, token in enumerate(ids):
        result = masked.logits(torch.tensor([[token]]), density=HALF, masked_from=dense, state=state)
        rows.append(result.logits[0, -1])
        assert at + 1 == state.length
    return torch.stack(rows)


def nats(logits_SV: torch.Tensor, targets: np.ndarray) -> float:
    chosen = torch.log_softmax(logits_SV.double(), -1)[torch.arange(len(targets)), torch.from_numpy(targets)]
    return float(chosen.sum())


@pytest.mark.parametrize(("scored", "prompt"), [(23, None), (8, 16), (1, 23)])
def test_decode_is_what_decoding_token_by_token_gives(in_torch: TorchModel, scored: int, prompt: int | None) -> None:
    asked = request(1, 24, scored, prompt)
    (found,) = in_torch.score([asked], Setting("predictor", HALF))
    logits_SV = step_by_step(in_torch, asked.ids[:-1], prompt or 1)
    assert found.log_probability == pytest.approx(nats(logits_SV[-scored:], asked.targets), rel=1e-5)
    assert found.masked == 23 - (prompt or 1)


@pytest.mark.parametrize(("protocol", "causal"), [("decode", True), ("prompt", True), ("paper", False)])
def test_no_protocol_but_papers_lets_a_token_see_a_later_one(
    in_torch: TorchModel, protocol: Protocol, causal: bool
) -> None:
    setting = Setting("predictor", HALF, protocol, prompt_tokens=4)
    ids = request(2).ids
    (before,) = _logits(in_torch, ids, setting)
    same = []
    for last in range(30, 60):  # the last token that is fed
        (after,) = _logits(in_torch, (*ids[:-2], last, ids[-1]), setting)
        same.append(torch.allclose(before[:-1], after[:-1], atol=1e-5))
    assert all(same) is causal


def _logits(model: TorchModel, ids: tuple[int, ...], setting: Setting) -> torch.Tensor:
    asked = Request(ids, len(ids) - 1)
    with torch.inference_mode():
        return model._run(torch.tensor([ids[:-1]]), setting, [asked], 0, None)[0]


def test_the_mask_of_paper_is_that_of_the_last_token_fed(in_torch: TorchModel) -> None:
    asked = request(3)
    setting = Setting("predictor", HALF, "paper")
    ids_BS = torch.tensor([asked.ids[:-1]])
    masked = in_torch._masked_model()
    last = masked.logits(ids_BS, density=HALF, masked_from=ids_BS.shape[1] - 1)
    everywhere = tuple(mask.expand(-1, ids_BS.shape[1], -1, -1) for mask in (last.mask_heads, last.mask_neurons))
    logits = masked.logits(ids_BS, density=HALF, masks=everywhere).logits  # type: ignore[arg-type]
    (found,) = in_torch.score([asked], setting)
    assert found.log_probability == pytest.approx(nats(logits[0], asked.targets), rel=1e-5)
    assert found.masked == 23


def test_batches_padding_and_neighbours_change_nothing(in_torch: TorchModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from shadowc.eval import torch_model

    requests = [request(seed, tokens, tokens - 1) for seed, tokens in enumerate((24, 9, 17, 24, 3))]
    for protocol in in_torch.protocols:
        for method in in_torch.methods:
            setting = Setting(method, HALF, protocol, prompt_tokens=None if protocol == "paper" else 2)
            together = in_torch.score(requests, setting)
            monkeypatch.setattr(torch_model, "BATCH_BYTES", 1)
            alone = [in_torch.score([one], setting)[0] for one in requests]
            monkeypatch.undo()
            for one, other in zip(together, alone, strict=True):
                assert one.log_probability == pytest.approx(other.log_probability, rel=1e-5), (protocol, method)
                assert (one.masked, one.heads) == pytest.approx((other.masked, other.heads))


@pytest.mark.parametrize("protocol", ["decode", "prompt"])
def test_a_shared_prompt_is_read_once_and_changes_nothing(
    fresh_torch: Callable[[], TorchModel], protocol: Protocol
) -> None:
    model = fresh_torch()
    ids = request(4, 16, 1).ids
    requests = [Request((*ids, *tail), len(tail), 16) for tail in ((7, 8, 9), (7,), (11, 12, 13, 14))]
    settings = [Setting(), Setting("predictor", HALF, protocol), Setting("normalised", HALF, protocol)]
    for setting in settings:
        shared = model.score(requests, setting)
        # Dense tokens given explicitly, with one more than the prompt has: the whole request goes through at once.
        whole = [Request(one.ids, one.scored, None) for one in requests]
        asked = Setting(setting.method, setting.density, setting.protocol, prompt_tokens=16)
        for one, other in zip(shared, model.score(whole, asked), strict=True):
            assert one.log_probability == pytest.approx(other.log_probability, rel=1e-5)
            assert (one.masked, one.greedy) == (other.masked, other.greedy)
    read = model.passes
    model.score(requests, settings[1])
    assert model.passes - read == 3 * 3  # rows x inputs behind the prompt: the prompt itself is not read again


@pytest.mark.parametrize("style", ["shadow", "dejavu", "shadow+"])
@pytest.mark.parametrize("dense", [1, 5])
def test_a_prompt_under_masks_is_read_once_and_changes_nothing(
    fresh_torch: Callable[[], TorchModel], style: Style, dense: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fresh_torch()
    if style != "shadow":
        checkpoint, known = model._checkpoint, model._predictor
        assert known is not None
        predictor = replace(Predictor.dummy(checkpoint.facts, known.block, 32, style=style), controls=known.controls)
        model = TorchModel(model._model, checkpoint, predictor)
    ids = request(4, 16, 1).ids
    requests = [Request((*ids, *tail), len(tail), 16) for tail in ((7, 8, 9), (7,), (11, 12, 13, 14))]
    for method in ("predictor", "normalised"):
        setting = Setting(method, HALF, "decode", prompt_tokens=dense)
        before = model.passes
        shared = model.score(requests, setting)
        assert model.passes - before == 16 + 3 * 3  # the prompt, then rows x inputs behind it
        with monkeypatch.context() as patch:
            patch.setattr(TorchModel, "_continues", lambda *_: False)
            whole = model.score(requests, setting)
        for one, other in zip(shared, whole, strict=True):
            assert one.log_probability == pytest.approx(other.log_probability, rel=1e-5)
            assert (one.masked, one.greedy) == (other.masked, other.greedy)
            assert (one.heads, one.neurons) == pytest.approx((other.heads, other.neurons))
        assert shared[1].log_probability != model.score(requests, Setting())[1].log_probability


def test_what_a_mask_reads_of_the_answer_keeps_prompts_apart(in_torch: TorchModel) -> None:
    asked = request(4, 20, 4, 16)
    for method in ("random", "oracle"):
        assert not in_torch._continues(asked, Setting(method, HALF, prompt_tokens=1))
    assert not in_torch._continues(asked, Setting("predictor", HALF, "paper"))


def of_style(model: TorchModel, style: Style) -> TorchModel:
    """The same checkpoint and controls, with a predictor of another style."""
    checkpoint, known = model._checkpoint, model._predictor
    assert known is not None
    predictor = replace(Predictor.dummy(checkpoint.facts, known.block, 32, style=style), controls=known.controls)
    return TorchModel(model._model, checkpoint, predictor)


@pytest.mark.parametrize("style", ["dejavu", "shadow+"])
@pytest.mark.parametrize("protocol", ["prompt", "paper"])
def test_masks_that_no_predictor_makes_follow_every_protocol_beside_every_style(
    in_torch: TorchModel, style: Style, protocol: Protocol
) -> None:
    model, requests = of_style(in_torch, style), [request(1), request(2, 20, 6, 14)]
    for method in ("static", "normalised", "random", *(["prompt"] if protocol == "prompt" else [])):
        setting = Setting(method, HALF, protocol, scope="local")
        for one, other in zip(model.score(requests, setting), in_torch.score(requests, setting), strict=True):
            assert one.log_probability == pytest.approx(other.log_probability, rel=1e-6), method
            assert (one.masked, one.heads, one.neurons) == (other.masked, other.heads, other.neurons)
    unnamed = Setting("random", HALF, protocol)  # scope as the predictor has it: shares of the layers for shadow+
    assert 0 < model.score(requests, unnamed)[0].heads < requests[0].scored


@pytest.mark.parametrize("style", ["dejavu", "shadow+"])
@pytest.mark.parametrize("protocol", ["prompt", "paper"])
def test_what_a_style_cannot_do_is_laid_to_the_style_and_what_is_proposed_works(
    in_torch: TorchModel, style: Style, protocol: Protocol
) -> None:
    model = of_style(in_torch, style)
    with pytest.raises(
        UnsupportedError, match=f"a predictor of style {re.escape(style)} makes its masks layer by"
    ) as c:
        model.check(Setting("predictor", HALF, protocol))
    first, _, methods = c.value.hint.partition(", or --methods ")
    assert first == "--protocol decode"
    model.check(Setting("predictor", HALF, "decode"))
    assert ("prompt" in methods.split(",")) is (protocol == "prompt")
    model.check(*(Setting(method, HALF, protocol) for method in methods.split(",")))


@pytest.mark.parametrize("style", ["dejavu", "shadow+"])
def test_styles_that_know_one_layer_are_decoded_and_their_controls_are_ranked_anywhere(
    in_torch: TorchModel, style: Style
) -> None:
    model = of_style(in_torch, style)
    asked = request(1)
    (found,) = model.score([asked], Setting("predictor", HALF))
    assert found.log_probability == pytest.approx(nats(step_by_step(model, asked.ids[:-1], 1), asked.targets), rel=1e-5)
    with pytest.raises(InputError, match="cannot be ranked together"):
        model.check(Setting("predictor", HALF, scope="global"))
    scopes = [model.score([asked], Setting("random", HALF, scope=scope))[0] for scope in ("local", "global")]
    assert scopes[0].log_probability != scopes[1].log_probability


def test_an_answer_of_one_token_is_the_same_under_any_mask(in_torch: TorchModel) -> None:
    asked = request(5, 17, 1, 16)
    dense, masked = (in_torch.score([asked], setting)[0] for setting in (Setting(), Setting("random", HALF)))
    assert dense.log_probability == masked.log_probability
    assert masked.masked == 0
    assert Setting("random", HALF).under_masks(asked) == 0
    inside = Setting("random", HALF, prompt_tokens=1)
    assert in_torch.score([asked], inside)[0].log_probability != dense.log_probability
    assert inside.under_masks(asked) == 1


def test_random_masks_depend_on_seed_and_text_alone(in_torch: TorchModel, engine_folders: dict[str, Path]) -> None:
    one, two = request(6), request(7)
    setting = Setting("random", HALF)
    first = in_torch.score([one, two], setting)[1]
    assert in_torch.score([two], setting)[0].log_probability == pytest.approx(first.log_probability, rel=1e-6)
    other = engine_model(engine_folders["token"], seed=1).score([two], setting)[0]
    assert abs(other.log_probability - first.log_probability) > 1e-3


def test_an_engine_refuses_what_only_torch_can(engine_folders: dict[str, Path]) -> None:
    engine = engine_model(engine_folders["token"])
    with pytest.raises(UnsupportedError, match="which no engine can do") as caught:
        engine.check(Setting("predictor", HALF, "paper"))
    assert caught.value.hint == "shadowc eval --model MODEL --predictor FOLDER --protocol paper"
    with pytest.raises(UnsupportedError, match="makes a mask for every token"):
        engine.check(Setting("predictor", HALF, "prompt"))


def test_an_engine_of_another_style_proposes_what_this_style_can(engine_folders: dict[str, Path]) -> None:
    engine = engine_model(engine_folders["token"])
    manifest = engine.engine.manifest
    assert manifest.sparsity is not None
    sparsity = manifest.sparsity.model_copy(update={"style": "shadow+"})
    engine.engine.manifest = manifest.model_copy(update={"sparsity": sparsity})
    with pytest.raises(
        UnsupportedError, match=r"a predictor of style shadow\+ makes its masks layer by layer"
    ) as caught:
        engine.check(Setting("predictor", HALF, "prompt"))
    assert caught.value.hint.startswith("--protocol decode, or compile with a predictor of --style shadow")
    with pytest.raises(UnsupportedError, match="which no engine can do") as caught:
        engine.check(Setting("predictor", HALF, "paper"))
    assert caught.value.hint.endswith("--protocol paper --methods static,random")


def test_a_mask_of_a_prompt_needs_a_prompt(in_torch: TorchModel) -> None:
    in_torch.check(Setting("predictor", HALF, prompt_tokens=0))
    with pytest.raises(InputError, match="at least 1 dense tokens at the start of a request; prompt_tokens is 0"):
        in_torch.check(Setting("predictor", HALF, "prompt", prompt_tokens=0))
    with pytest.raises(InputError, match="at least 0 dense tokens"):
        in_torch.check(Setting("predictor", HALF, prompt_tokens=-1))


def test_dense_tokens_under_protocol_paper_are_refused_as_it_has_none(in_torch: TorchModel) -> None:
    in_torch.check(Setting("predictor", HALF, "paper"))
    with pytest.raises(InputError, match="masks a sequence from its first token on"):
        in_torch.check(Setting("predictor", HALF, "paper", prompt_tokens=5))


@pytest.mark.parametrize("style", ["shadow", "shadow+"])
def test_one_threshold_for_all_layers_by_their_sensitivity_is_refused_before_anything_runs(
    in_torch: TorchModel, style: Style
) -> None:
    predictor = in_torch._predictor
    assert predictor is not None
    meta, table = {**predictor.meta, "style": style}, np.zeros((1, 1), np.float32)
    with_thresholds = replace(predictor, meta=meta, thresholds={"local": (table, table)})
    model = TorchModel(in_torch._model, in_torch._checkpoint, with_thresholds)
    model.check(Setting("sensitivity", HALF), Setting("calibrated", HALF, scope="global"))
    with pytest.raises(InputError, match="thresholds by sensitivity give every layer a share of its own"):
        model.check(Setting("sensitivity", HALF, scope="global"))


def test_without_a_predictor_there_are_random_masks_and_those_of_a_prompt(tiny_checkpoint: Path) -> None:
    from shadowc.eval.load import torch_model
    from shadowc.sparsity.importance import Origin

    model = torch_model(Origin(str(tiny_checkpoint), "auto", 0))
    assert model.methods == ("random",)
    with pytest.raises(InputError, match="no masks of method predictor; it has: random, prompt"):
        model.check(Setting("predictor", HALF))
    with pytest.raises(InputError, match="no masks of method oracle"):
        model.check(Setting("oracle", HALF))
    assert math.isfinite(model.score([request()], Setting("random", HALF))[0].log_probability)
    asked = Setting("prompt", HALF, "prompt")
    (found,) = model.score([request()], asked)
    assert found.masked == 23 - 16
    assert found.neurons / found.masked == pytest.approx(0.25, abs=0.01)  # single neurons
    (heads, neurons) = model.masks(request(), asked)
    assert (heads[0] == heads).all()
    assert (neurons[0] == neurons).all()


def test_a_ranking_that_nobody_kept_is_refused_with_those_that_there_are(
    in_torch: TorchModel, engine_folders: dict[str, Path]
) -> None:
    for model in (in_torch, engine_model(engine_folders["token"])):
        with pytest.raises(InputError, match="static-nwot; it has: predictor, static, normalised, random, static-magn"):
            model.check(Setting("static-nwot", HALF))
