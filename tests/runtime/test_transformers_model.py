# SPDX-License-Identifier: Apache-2.0
"""The adapter for transformers gives the tokens of the masked torch model, whatever way they are chosen."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    pipeline,
)
from transformers.generation.streamers import BaseStreamer

import shadowc
from shadowc.runtime.cache import KvCache
from shadowc.runtime.tensorrt.engine import TensorRtEngine
from shadowc.runtime.transformers_model import CACHE, OPTForCausalLM, _config
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError, UnsupportedError
from tests.conftest import TINY
from tests.emit import engines
from tests.runtime.host_engine import on_host
from tests.runtime.masked_torch import MaskedTorch
from tests.runtime.tensorrt_folder import write_folder

if TYPE_CHECKING:
    from transformers import OPTForCausalLM as TorchOpt

PAD, EOS, POSITIONS = TINY["pad_token_id"], TINY["eos_token_id"], TINY["max_position_embeddings"]
DENSITY = Density(0.5, 0.25)
GREEDY = {"do_sample": False, "max_new_tokens": 14, "min_new_tokens": 14}
BEAMS = {**GREEDY, "num_beams": 4}
SAMPLED = {"do_sample": True, "temperature": 0.7, "top_k": 20, "max_new_tokens": 14, "min_new_tokens": 14}
GROUPED = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5, "no_repeat_ngram_size": 2}
WAYS = {
    "greedy": GREEDY,
    "beams": BEAMS,
    "sampled": SAMPLED,
    "sampled beams": {**SAMPLED, "num_beams": 3},
    "several": {**SAMPLED, "num_return_sequences": 3, "top_p": 0.9},
    "processors": {**GREEDY, **GROUPED, "repetition_penalty": 1.3},
}


def random_ids(rows: int = 2, tokens: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(4, TINY["vocab_size"], (rows, tokens)))


def padded(rows: int = 3) -> dict[str, torch.Tensor]:
    ids = random_ids(rows, 9, seed=1)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 2 * row] = 0
    return {"inputs": torch.where(mask == 1, ids, PAD), "attention_mask": mask}


def generated(model: Any, inputs: torch.Tensor, **named: Any) -> np.ndarray:
    torch.manual_seed(7)
    found: torch.Tensor = model.generate(inputs, pad_token_id=PAD, **named)
    return found.numpy()


@pytest.fixture(scope="module")
def model(folders: dict[str, Path]) -> OPTForCausalLM:
    return shadowc.OPTForCausalLM.from_pretrained(folders["fp32"], density=DENSITY)


@pytest.fixture(scope="module")
def held(folders: dict[str, Path]) -> OPTForCausalLM:
    return shadowc.OPTForCausalLM.from_pretrained(folders["sequence"], density=DENSITY)


@pytest.fixture(scope="module")
def judge(tiny_model: TorchOpt) -> MaskedTorch:
    return MaskedTorch(tiny_model, DENSITY)


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_the_masked_torch_model(model: OPTForCausalLM, judge: MaskedTorch, way: str) -> None:
    found, expected = (generated(one, random_ids(), **WAYS[way]) for one in (model, judge))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("way", ["greedy", "beams", "sampled"])
def test_left_padded_rows_are_those_of_the_masked_torch_model(
    model: OPTForCausalLM, judge: MaskedTorch, way: str
) -> None:
    found, expected = (generated(one, **padded(), **WAYS[way]) for one in (model, judge))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("way", ["greedy", "beams", "sampled"])
def test_masks_of_a_sequence_go_with_their_beam(held: OPTForCausalLM, tiny_model: TorchOpt, way: str) -> None:
    judge = MaskedTorch(tiny_model, DENSITY, "sequence")
    found, expected = (generated(one, **padded(), **WAYS[way]) for one in (held, judge))
    np.testing.assert_array_equal(found, expected)


def test_masks_matter_to_the_tokens_that_are_compared(model: OPTForCausalLM, judge: MaskedTorch) -> None:
    dense = [generated(model, random_ids(), density=1.0, **WAYS[way]) for way in ("greedy", "beams", "sampled")]
    masked = [generated(judge, random_ids(), **WAYS[way]) for way in ("greedy", "beams", "sampled")]
    assert all((one != other).any() for one, other in zip(dense, masked, strict=True))


def test_a_cache_that_does_not_follow_its_beams_is_noticed(
    model: OPTForCausalLM, judge: MaskedTorch, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = generated(judge, random_ids(), **BEAMS)
    monkeypatch.setattr(KvCache, "reorder", lambda *_: None)
    assert (generated(model, random_ids(), **BEAMS) != expected).any()


def test_greedy_is_what_the_engine_generates_itself(model: OPTForCausalLM) -> None:
    ids = random_ids(3)
    expected = model.engine.generate(ids.numpy(), max_new_tokens=14, min_new_tokens=14, density=DENSITY)
    np.testing.assert_array_equal(generated(model, ids, **GREEDY), expected)
    assert model.last_stats.heads == model.engine.last_stats.heads
    assert model.last_stats.tokens == 3 * 13


def test_reference_graph_follows_its_beams_too(folders: dict[str, Path], judge: MaskedTorch) -> None:
    slow = OPTForCausalLM.from_pretrained(folders["fp32"], density=DENSITY, reference=True)
    np.testing.assert_array_equal(generated(slow, random_ids(), **BEAMS), generated(judge, random_ids(), **BEAMS))


@pytest.mark.parametrize("kind", ["int8", "int4", "bf16"])
def test_engines_of_narrow_weights_choose_what_they_generate_themselves_and_search(
    folders: dict[str, Path], kind: str
) -> None:
    """One beam, and a sample of the likeliest token alone, are greedy; more beams find what is at least as likely."""
    narrow = OPTForCausalLM.from_pretrained(folders[kind], density=DENSITY)
    asked = padded()
    ids, mask = (tensor.numpy() for tensor in asked.values())
    settings = {"max_new_tokens": 14, "min_new_tokens": 14}
    expected = narrow.engine.generate(ids, attention_mask=mask, density=DENSITY, **settings)
    np.testing.assert_array_equal(generated(narrow, **asked, **GREEDY), expected)
    np.testing.assert_array_equal(generated(narrow, **asked, **{**SAMPLED, "top_k": 1}), expected)
    assert (expected != narrow.engine.generate(ids, attention_mask=mask, density=1.0, **settings)).any()
    beams, sampled = (generated(narrow, **asked, **WAYS[way]) for way in ("beams", "sampled"))
    assert beams.shape == sampled.shape == expected.shape
    assert (beams != expected).any()
    assert (sampled != expected).any()


def test_density_can_be_given_per_call_and_is_the_models_own_otherwise(
    model: OPTForCausalLM, tiny_model: TorchOpt
) -> None:
    found = generated(model, random_ids(), density=Density(0.25, 0.5), **GREEDY)
    np.testing.assert_array_equal(found, generated(MaskedTorch(tiny_model, Density(0.25, 0.5)), random_ids(), **GREEDY))
    assert model.last_stats.active_neuron_share == 0.5


class OnlyEven(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, 1::2] = -torch.inf
        return scores


class AfterTokens(StoppingCriteria):
    def __init__(self, slots: int) -> None:
        self.slots = slots

    def __call__(self, input_ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.slots)


def test_logits_processors_of_the_caller_are_applied(model: OPTForCausalLM) -> None:
    found = generated(model, random_ids(), logits_processor=LogitsProcessorList([OnlyEven()]), **GREEDY)
    assert (found[:, 7:] % 2 == 0).all()


def test_stopping_criteria_of_the_caller_are_applied(model: OPTForCausalLM) -> None:
    settings = {**GREEDY, "min_new_tokens": 0, "eos_token_id": []}
    criteria = StoppingCriteriaList([AfterTokens(11)])
    assert generated(model, random_ids(), stopping_criteria=criteria, **settings).shape == (2, 11)
    config = GenerationConfig(**settings, pad_token_id=PAD)
    assert model.generate(random_ids(), config, None, criteria).shape == (2, 11)


def test_text_that_ends_a_row_is_found(model: OPTForCausalLM) -> None:
    tokenizer = model.engine.tokenizer
    ids = torch.tensor([tokenizer("a lazy neuron")["input_ids"]])
    free = generated(model, ids, **{**GREEDY, "min_new_tokens": 0, "eos_token_id": []})[0, ids.shape[1] :]
    words = [tokenizer.decode([token]) for token in free]
    at = next(
        at for at, word in enumerate(words) if at >= 2 and word.isascii() and word.strip() and word not in words[:at]
    )
    found = generated(
        model, ids, stop_strings=[words[at]], tokenizer=tokenizer, do_sample=False, max_new_tokens=14, eos_token_id=[]
    )
    assert found.shape[1] == ids.shape[1] + at + 1


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.pieces: list[torch.Tensor] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.reshape(-1))

    def end(self) -> None:
        self.ended = True


def test_streamer_gets_prompt_and_tokens_as_they_come(model: OPTForCausalLM) -> None:
    streamer = Collector()
    found = generated(model, random_ids(1), streamer=streamer, **GREEDY)
    np.testing.assert_array_equal(torch.cat(streamer.pieces).numpy(), found[0])
    assert len(streamer.pieces) == 15
    assert streamer.ended


def test_pipeline_continues_texts_alone_and_in_padded_batches(
    model: OPTForCausalLM, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("transformers").propagate = True
    settings = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    texts = ["a lazy neuron", "The quick brown fox jumps"]
    ask = pipeline("text-generation", model=model, tokenizer=model.engine.tokenizer)
    logging.getLogger("transformers").propagate = False
    assert "not supported" not in caplog.text
    together = ask(texts, batch_size=2, **settings)
    for text, answers in zip(texts, together, strict=True):
        expected = model.engine.generate(text, max_new_tokens=6, min_new_tokens=6, density=DENSITY)
        assert answers[0]["generated_text"] == text + expected
        assert ask(text, **settings)[0]["generated_text"] == text + expected
    assert ask(texts[0], density=1.0, **settings) != ask(texts[0], density=0.0, **settings)


def test_rows_end_at_their_end_token_and_are_padded(
    tiny_model: TorchOpt, model: OPTForCausalLM, tmp_path: Path
) -> None:
    free = generated(model, random_ids(seed=5), **GREEDY)[:, 7:]
    eos = next(int(token) for at, token in enumerate(free[0]) if at >= 2 and token not in free[1])
    engines.write_engine(tmp_path / "e", tiny_model, eos=eos)
    early = OPTForCausalLM.from_pretrained(tmp_path / "e", density=DENSITY)
    found = generated(early, random_ids(seed=5), do_sample=False, max_new_tokens=14)[:, 7:]
    first = int(np.argmax(free[0] == eos))
    np.testing.assert_array_equal(found[0], [*free[0, : first + 1], *[PAD] * (14 - first - 1)])
    np.testing.assert_array_equal(found[1], free[1])


@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_generation_goes_up_to_the_last_slot_of_the_context(
    model: OPTForCausalLM, judge: MaskedTorch, way: str
) -> None:
    settings = {**WAYS[way], "max_new_tokens": 50, "min_new_tokens": 0, "eos_token_id": []}
    found = generated(model, random_ids(1, POSITIONS - 5), **settings)
    assert found.shape == (1, POSITIONS)
    expected = generated(judge, random_ids(1, POSITIONS - 5), **{**settings, "max_new_tokens": 5})
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("tokens", [POSITIONS, POSITIONS + 3])
def test_a_prompt_without_room_is_refused_with_both_numbers(model: OPTForCausalLM, tokens: int) -> None:
    with pytest.raises(InputError, match=f"has {tokens} tokens.*holds {POSITIONS}"):
        model.generate(random_ids(1, tokens))


def test_one_token_beyond_the_context_is_refused_with_both_numbers(model: OPTForCausalLM) -> None:
    full = model(random_ids(1, POSITIONS), logits_to_keep=1)
    with pytest.raises(InputError, match=f"has {POSITIONS + 1} tokens.*holds {POSITIONS}"):
        model(random_ids(1, 1), cache=full.cache if hasattr(full, "cache") else full.past_key_values)


def test_a_call_without_generation_gives_the_dense_logits_of_all_tokens(
    model: OPTForCausalLM, tiny_model: TorchOpt
) -> None:
    ids = random_ids()
    expected = tiny_model(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(model(ids, logits_to_keep=1).logits, expected[:, -1:], rtol=0, atol=1e-4)
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, expected[:, -3:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["model", "held"])
def test_a_text_that_goes_on_from_its_cache_equals_the_whole(kind: str, request: pytest.FixtureRequest) -> None:
    """The second prompt is read densely; at density 1 nothing else may matter."""
    one: OPTForCausalLM = request.getfixturevalue(kind)
    first = one.generate(random_ids(1), pad_token_id=PAD, return_dict_in_generate=True, density=1.0, **GREEDY)
    whole = torch.cat([first.sequences, random_ids(1, 5, seed=9)], dim=1)
    cache = first.get("cache", first.get("past_key_values"))
    name = "cache" if "cache" in first else "past_key_values"
    again = one.generate(whole, pad_token_id=PAD, do_sample=False, max_new_tokens=6, min_new_tokens=6, **{name: cache})
    expected = generated(one, whole, density=1.0, do_sample=False, max_new_tokens=6, min_new_tokens=6)
    np.testing.assert_array_equal(again.numpy(), expected)


@pytest.mark.parametrize("refresh", [0, 3])
@pytest.mark.parametrize("keep", [0, 1, 3])
def test_a_second_prompt_makes_the_masks_anew_however_many_logits_are_kept(
    held: OPTForCausalLM, keep: int, refresh: int
) -> None:
    """Two prompts without a token between them are one: what follows them has the masks of the second one's end."""
    engine = held.engine.with_refresh(refresh)
    one = OPTForCausalLM(engine, DENSITY)
    ids = random_ids(2, 20, seed=11)
    first = one(ids[:, :5], logits_to_keep=keep)
    cache = getattr(first, CACHE)
    one(ids[:, 5:12], **{CACHE: cache}, logits_to_keep=keep)
    steps = [one(ids[:, at : at + 1], **{CACHE: cache}).logits for at in range(12, 20)]
    expected = engine.logits(ids.numpy(), DENSITY, "prompt", prompt_tokens=12)[:, 12:]
    np.testing.assert_allclose(torch.cat(steps, dim=1).numpy(), expected, rtol=0, atol=1e-4)
    other = engine.logits(ids.numpy(), DENSITY, "prompt", prompt_tokens=5)[:, 12:]
    assert np.abs(other - expected).max() > 1e-2


REFUSED: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "no cache": (UnsupportedError, {"use_cache": False}),
    "another cache": (UnsupportedError, {"cache_implementation": "static"}),
    "chunks": (UnsupportedError, {"prefill_chunk_size": 4}),
    "hidden states": (UnsupportedError, {"output_hidden_states": True, "return_dict_in_generate": True}),
    "an assistant": (UnsupportedError, {"prompt_lookup_num_tokens": 3}),
    "its own first layers as an assistant": (UnsupportedError, {"assistant_early_exit": 2}),
    "padding on the right": (InputError, {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]])}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_give_other_tokens_is_refused(model: OPTForCausalLM, name: str) -> None:
    error, settings = REFUSED[name]
    with pytest.raises(error):
        model.generate(random_ids(1), max_new_tokens=3, do_sample=False, **settings)


def test_an_assistant_by_position_is_refused_too(model: OPTForCausalLM) -> None:
    with pytest.raises(UnsupportedError, match="assistant_model"):
        model.generate(random_ids(1), None, None, None, None, None, model, max_new_tokens=3)


def test_no_cache_in_a_configuration_is_refused_too(model: OPTForCausalLM) -> None:
    with pytest.raises(UnsupportedError, match="use_cache"):
        model.generate(random_ids(1), GenerationConfig(use_cache=False, max_new_tokens=3))


@pytest.mark.parametrize("given", [None, GenerationConfig(max_new_tokens=3)])
def test_no_cache_in_the_models_own_configuration_is_refused_too(
    model: OPTForCausalLM, monkeypatch: pytest.MonkeyPatch, given: GenerationConfig | None
) -> None:
    monkeypatch.setattr(model.generation_config, "use_cache", False)
    with pytest.raises(UnsupportedError, match="use_cache"):
        model.generate(random_ids(1), given, max_new_tokens=3)


@pytest.mark.parametrize(("norm_first", "projected"), [(True, 0), (False, 32), (False, 0)])
def test_configuration_says_where_norms_are_and_how_wide_embeddings(
    model: OPTForCausalLM, norm_first: bool, projected: int
) -> None:
    part = model.engine.model.model_copy(update={"norm_first": norm_first, "projected": projected})
    config = _config(part)
    assert (config.do_layer_norm_before, config.word_embed_proj_dim) == (norm_first, projected or part.hidden)


def test_an_engine_is_not_saved_as_a_checkpoint(model: OPTForCausalLM, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="cannot be saved"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_engine_for_tensorrt_samples_and_refuses_beams(host: TensorRtEngine, judge: MaskedTorch) -> None:
    device = OPTForCausalLM(host, DENSITY)
    np.testing.assert_array_equal(generated(device, random_ids(), **SAMPLED), generated(judge, random_ids(), **SAMPLED))
    with pytest.raises(UnsupportedError, match="target cpu"):
        device.generate(random_ids(1), pad_token_id=PAD, **BEAMS)


def test_engine_built_for_a_shorter_context_ends_and_refuses_there(
    folders: dict[str, Path], judge: MaskedTorch, tmp_path: Path
) -> None:
    write_folder(folders["fp32"], tmp_path / "e", max_context=24)
    short = OPTForCausalLM(on_host(tmp_path / "e"), DENSITY)
    settings = {"do_sample": False, "eos_token_id": []}
    found = generated(short, random_ids(1, 20), max_new_tokens=30, **settings)
    np.testing.assert_array_equal(found, generated(judge, random_ids(1, 20), max_new_tokens=4, **settings))
    with pytest.raises(InputError, match=r"24 tokens.*holds 24"):
        short.generate(random_ids(1, 24))
    with pytest.raises(InputError, match=r"25 tokens.*24"):
        short(random_ids(1, 25))
    assert short.config.max_position_embeddings == 24
