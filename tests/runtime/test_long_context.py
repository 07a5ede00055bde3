# SPDX-License-Identifier: Apache-2.0
"""Contexts longer than a chunk of a prompt and a step of the cache: right up to the last slot, and not one beyond."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import pytest
import torch

from shadowc.runtime import cache
from shadowc.runtime.decoder import CHUNK_TOKENS, PROMPT_CHUNKS
from shadowc.runtime.engine import Engine
from shadowc.runtime.load import load
from shadowc.runtime.transformers_model import OPTForCausalLM
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError
from tests.conftest import TINY
from tests.emit import engines
from tests.runtime.masked_torch import MaskedTorch

if TYPE_CHECKING:
    from transformers import OPTForCausalLM as TorchOpt

CONTEXT = 700
PAD, LAYERS = TINY["pad_token_id"], TINY["num_hidden_layers"]
DENSITY = Density(0.5, 0.25)


@pytest.fixture(scope="module")
def long_model(tiny_model: TorchOpt) -> TorchOpt:
    """The tiny model with places for a longer text."""
    model = copy.deepcopy(tiny_model)
    table = model.model.decoder.embed_positions
    more = torch.randn((CONTEXT + 2, table.weight.shape[1]), generator=torch.Generator().manual_seed(2)) * 0.15
    more[: len(table.weight)] = table.weight
    table.weight = torch.nn.Parameter(more, requires_grad=False)
    model.config.max_position_embeddings = CONTEXT
    return model


@pytest.fixture(scope="module")
def long_engines(long_model: TorchOpt, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Engine]]:
    folder: Path = tmp_path_factory.mktemp("long")
    facts = replace(engines.tiny_facts(), positions=CONTEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "tiny_facts", lambda: facts)
        engines.write_engine(folder / "token", long_model)
        engines.write_engine(folder / "sequence", long_model, mask="sequence")
        yield {name: load(folder / name) for name in ("token", "sequence")}  # type: ignore[misc]  # cpu engines


def text(tokens: int, rows: int = 1) -> np.ndarray:
    return np.random.default_rng(tokens).integers(4, TINY["vocab_size"], (rows, tokens), dtype=np.int64)


def greedy(model: TorchOpt | MaskedTorch, ids: np.ndarray, tokens: int) -> np.ndarray:
    mask = torch.from_numpy((ids != PAD).astype(np.int64))
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": PAD}
    found: torch.Tensor = model.generate(torch.from_numpy(ids), attention_mask=mask, **settings)
    return found.numpy()


def counted(patch: pytest.MonkeyPatch) -> list[int]:
    """Capacities of the buffers that are allocated from now on."""
    made: list[int] = []
    real = cache.paged_zeros

    def counting(shape: tuple[int, ...], dtype: object = np.float32) -> np.ndarray:
        made.append(shape[2])
        return real(shape, dtype)

    patch.setattr(cache, "paged_zeros", counting)
    return made


def allocations(engine: Engine, prompt: int, patch: pytest.MonkeyPatch, most: int = CONTEXT) -> list[int]:
    """The same while a text of `most` tokens, prompt included, is generated."""
    made, new = counted(patch), most - prompt
    assert engine.generate(text(prompt), max_new_tokens=new, min_new_tokens=new, density=DENSITY).shape == (1, most)
    return made


def test_a_text_of_more_than_a_chunk_and_a_step_ends_in_the_last_slot(
    long_engines: dict[str, Engine], long_model: TorchOpt
) -> None:
    prompt = CONTEXT - 20
    assert prompt > CHUNK_TOKENS * PROMPT_CHUNKS
    assert prompt > 2 * cache.STEP_SLOTS
    found = long_engines["token"].generate(text(prompt), max_new_tokens=500, min_new_tokens=500, density=1.0)
    np.testing.assert_array_equal(found, greedy(long_model, text(prompt), CONTEXT - prompt))


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_masked_tokens_at_the_end_of_the_context_are_those_of_the_masked_torch_model(
    long_engines: dict[str, Engine], long_model: TorchOpt, kind: str
) -> None:
    ids = text(CONTEXT - 6, rows=2)
    ids[1, :30] = PAD
    found = long_engines[kind].generate(ids, max_new_tokens=500, min_new_tokens=500, density=DENSITY)
    expected = greedy(MaskedTorch(long_model, DENSITY, kind), ids, 6)  # type: ignore[arg-type]  # one of its two
    np.testing.assert_array_equal(found, expected)
    assert (found != greedy(long_model, ids, 6)).any(), "masks must matter to what is compared"


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_one_token_more_is_refused_with_both_numbers(long_engines: dict[str, Engine], kind: str) -> None:
    engine = long_engines[kind]
    assert engine.generate(text(CONTEXT - 1), max_new_tokens=5).shape == (1, CONTEXT)
    with pytest.raises(InputError, match=f"has {CONTEXT} tokens and 1 more must fit.*holds {CONTEXT}") as caught:
        engine.generate(text(CONTEXT), max_new_tokens=5)
    assert caught.value.hint == f"shorten the prompt to {CONTEXT - 1} tokens"
    assert engine.logits(text(CONTEXT), protocol="dense").shape[:2] == (1, CONTEXT)
    with pytest.raises(InputError, match=f"has {CONTEXT + 1} tokens.*holds {CONTEXT}"):
        engine.logits(text(CONTEXT + 1), protocol="dense")
    with pytest.raises(InputError, match=f"has {CONTEXT} tokens and 1 more must fit"):
        OPTForCausalLM(engine).generate(torch.from_numpy(text(CONTEXT)), max_new_tokens=1)


def decoders_are_not_told_where_texts_end(patch: pytest.MonkeyPatch) -> None:
    honest = Engine._decoder
    patch.setattr(Engine, "_decoder", lambda engine, batch, _, masks: honest(engine, batch, 0, masks=masks))


@pytest.mark.parametrize("kind", ["token", "sequence"])
@pytest.mark.parametrize(
    ("prompt", "most", "capacity"), [(5, CONTEXT, CONTEXT), (600, CONTEXT, CONTEXT), (5, 300, 304)]
)
def test_room_for_a_text_is_made_once(
    long_engines: dict[str, Engine], kind: str, prompt: int, most: int, capacity: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert allocations(long_engines[kind], prompt, monkeypatch, most) == [capacity] * 2 * LAYERS


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_room_for_a_text_that_is_given_is_made_once(
    long_engines: dict[str, Engine], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = counted(monkeypatch)
    protocol: Literal["decode", "prompt"] = "decode" if kind == "token" else "prompt"  # masks as each makes them
    long_engines[kind].logits(text(600), DENSITY, protocol=protocol, prompt_tokens=20)
    assert made == [608] * 2 * LAYERS, "in steps of 256 it would have been made three times"


def test_room_for_what_transformers_generates_is_made_once(
    long_engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = counted(monkeypatch)
    OPTForCausalLM(long_engines["token"]).generate(torch.from_numpy(text(5)), max_new_tokens=3)
    assert made == [CONTEXT] * 2 * LAYERS


def test_room_that_is_made_again_while_a_text_grows_is_caught(
    long_engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoders_are_not_told_where_texts_end(monkeypatch)
    buffers = 2 * LAYERS
    made = allocations(long_engines["token"], 5, monkeypatch)
    assert made == [256] * buffers + [512] * buffers + [CONTEXT] * buffers  # in steps, where the end is not known


def test_a_cache_that_grows_with_every_token_is_caught(
    long_engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoders_are_not_told_where_texts_end(monkeypatch)
    monkeypatch.setattr(cache, "STEP_SLOTS", 1)
    assert len(allocations(long_engines["token"], CONTEXT - 20, monkeypatch)) == 2 * LAYERS * (2 + 19)
