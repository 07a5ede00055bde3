# SPDX-License-Identifier: Apache-2.0
"""The cache: updated in place, enlarged without forgetting, and nothing beyond its filled slots is read."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from shadowc.runtime import cache
from shadowc.runtime.cache import KvCache
from shadowc.runtime.decoder import Decoder
from shadowc.runtime.engine import Engine
from shadowc.runtime.load import load_cpu, read_manifest
from shadowc.runtime.prompts import Batch
from shadowc.runtime.weights_memory import LARGE_PAGE
from shadowc.spec.errors import InputError, InternalError
from tests.conftest import TINY

TOLERANCE = 2e-5
"""Largest |difference| over the largest |logit|: float32, another order of additions."""


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "STEP_SLOTS", 8)


def decoder_of(engine: Engine, rows: int = 1) -> Decoder:
    batch = Batch(np.zeros((rows, 1), np.int64), np.zeros(rows, np.int64))
    return Decoder(engine._session, engine.manifest.model, batch, in_place=engine._in_place)


def step_logits(decoder: Decoder, ids: np.ndarray) -> Iterator[np.ndarray]:
    for token in ids[0]:
        yield decoder.step(np.array([token]))["logits"][0, 0].copy()


def error_of_steps(engine: Engine, decoder: Decoder, ids: np.ndarray) -> float:
    """Distance of single dense steps from one pass over the whole text."""
    decoder.set_density(1.0, 1.0)
    whole = engine.logits(ids, protocol="dense")[0]
    found = np.stack(list(step_logits(decoder, ids)))
    return float(np.abs(found - whole).max() / np.abs(whole).max())


def text(tokens: int = 40) -> np.ndarray:
    return np.random.default_rng(11).integers(4, TINY["vocab_size"], (1, tokens), dtype=np.int64)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is committed")
def test_much_room_takes_memory_as_it_is_filled() -> None:
    def committed() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    kv = KvCache(5, (1, 32, 64), limit=8192, likely=8192)  # five keys and values of 64 MiB each
    assert cache.MOST_LARGE < 10 * (64 << 20)
    before = committed()
    kv.reserve(1)
    for buffer in kv._past.values():
        buffer[:, :, 0] = 1.0
    assert kv.capacity == 8192
    assert committed() - before < 4 << 20


def test_keys_and_values_of_a_usual_text_lie_one_behind_the_other_from_the_start_of_a_large_page() -> None:
    kv = KvCache(3, (1, 3, 64), limit=2048, likely=1490, dtype=np.float16)
    kv.reserve(33)
    places = [buffer.ctypes.data for buffer in kv._past.values()]
    assert kv.capacity == 1504
    assert places[0] % LARGE_PAGE == 0
    assert np.diff(places).tolist() == [3 * 1504 * 64 * 2] * 5
    assert all((buffer == 0.0).all() for buffer in kv._past.values())


def test_less_than_a_large_page_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "large_zeros", None)
    kv = KvCache(1, (1, 3, 64), limit=2048, likely=1490, dtype=np.float16)
    assert kv.reserve(33)
    assert sum(buffer.nbytes for buffer in kv._past.values()) < LARGE_PAGE


def test_the_buffer_is_updated_in_place(engine: Engine) -> None:
    decoder = decoder_of(engine)
    list(step_logits(decoder, text(5)))
    keys = decoder._cache._past["1.key"]
    assert decoder._cache._present["1.key"] is keys
    assert (np.abs(keys).sum(axis=(0, 1, 3)) > 0).tolist() == [True] * 5 + [False] * (keys.shape[2] - 5)


def test_the_reference_takes_turns_between_two_buffers(reference: Engine) -> None:
    decoder = decoder_of(reference)
    assert error_of_steps(reference, decoder, text(12)) <= TOLERANCE
    assert decoder._cache._present["1.key"] is not decoder._cache._past["1.key"]


@pytest.mark.usefixtures("small_steps")
@pytest.mark.parametrize("name", ["engine", "reference"])
def test_growing_forgets_nothing(name: str, request: pytest.FixtureRequest) -> None:
    engine: Engine = request.getfixturevalue(name)
    decoder = decoder_of(engine)
    assert error_of_steps(engine, decoder, text()) <= TOLERANCE
    assert decoder._cache.capacity == 40


@pytest.mark.usefixtures("small_steps")
def test_neither_does_growing_from_one_stretch_of_memory_to_another(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "LARGE_PAGE", 1)
    batch = Batch(np.zeros((1, 1), np.int64), np.zeros(1, np.int64))
    decoder = Decoder(engine._session, engine.manifest.model, batch, likely=20)
    assert error_of_steps(engine, decoder, text()) <= TOLERANCE
    keys, values = (decoder._cache._past[f"0.{part}"] for part in ("key", "value"))
    assert decoder._cache.capacity == 40
    assert values.ctypes.data - keys.ctypes.data == keys.nbytes


def test_the_cache_is_float16_unless_weights_are_float32(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        decoder = decoder_of(load_cpu(folder))
        decoder.feed(text()[:, :3], sparse_tail=0, outputs=())
        wide = read_manifest(folder).weights == "fp32"
        assert {slots.dtype for slots in decoder.cached(1).values()} == {np.dtype(np.float32 if wide else np.float16)}
        assert decoder.cached(1)["0.key"].shape == (1, 2, 4, 16)


@pytest.mark.usefixtures("small_steps")
def test_capacity_grows_in_steps_up_to_the_context() -> None:
    kv = KvCache(2, (1, 4, 16), limit=20)
    assert [kv.reserve(slots) for slots in (1, 8, 9, 16, 20)] == [True, False, True, False, True]
    assert kv.capacity == 20
    with pytest.raises(InternalError, match="21 slots"):
        kv.reserve(21)


@pytest.mark.usefixtures("small_steps")
def test_room_that_will_be_needed_is_made_at_once_but_not_where_a_graph_computes_with_all_of_it() -> None:
    kv = KvCache(2, (1, 4, 16), 50, likely=30)
    assert [kv.reserve(slots) for slots in (1, 32, 33)] == [True, False, True]
    reference = KvCache(2, (1, 4, 16), 50, likely=30, in_place=False)
    assert reference.reserve(1)
    assert reference.capacity == 8


@pytest.mark.usefixtures("small_steps")
def test_where_the_system_refuses_room_for_a_whole_text_it_is_made_in_steps(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = cache.paged_zeros

    def refusing(shape: tuple[int, ...], dtype: object) -> np.ndarray:
        if shape[2] > 32:
            raise OSError(12, "Cannot allocate memory")
        return honest(shape, dtype)

    monkeypatch.setattr(cache, "paged_zeros", refusing)
    batch = Batch(np.zeros((1, 1), np.int64), np.zeros(1, np.int64))
    decoder = Decoder(engine._session, engine.manifest.model, batch, likely=40)
    assert error_of_steps(engine, decoder, text(30)) <= TOLERANCE
    assert decoder._cache.capacity == 32
    with pytest.raises(InputError, match=r"keys and values of 33 tokens, batch 1, take 0\.\d MB, and the system"):
        decoder._cache.reserve(33)


@pytest.mark.usefixtures("small_steps")
def test_a_cache_that_forgets_when_it_grows_is_caught(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = KvCache.reserve

    def forgetful(self: KvCache, slots: int) -> bool:
        filled, self.filled = self.filled, 0
        grown = honest(self, slots)
        self.filled = filled
        return grown

    monkeypatch.setattr(KvCache, "reserve", forgetful)
    assert error_of_steps(engine, decoder_of(engine), text()) > 100 * TOLERANCE


def test_buffers_that_overlap_in_one_stretch_of_memory_are_caught(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overlapping(count: int, shape: tuple[int, ...], dtype: object) -> list[np.ndarray]:
        heads = np.zeros((count + shape[1], *shape[2:]), dtype)  # type: ignore[call-overload]  # a dtype
        return [heads[None, at : at + shape[1]] for at in range(count)]

    monkeypatch.setattr(cache, "LARGE_PAGE", 1)
    monkeypatch.setattr(cache, "large_zeros", overlapping)
    assert error_of_steps(engine, decoder_of(engine), text(20)) > 100 * TOLERANCE


def test_a_stale_entry_is_caught(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = KvCache.advance

    def stale(self: KvCache, tokens: int) -> bool:
        swapped = honest(self, tokens)
        if self.filled == 10:
            self._past["2.key"][:, :, 9] = self._past["2.key"][:, :, 8]  # slot 9 keeps what another token wrote
        return swapped

    monkeypatch.setattr(KvCache, "advance", stale)
    assert error_of_steps(engine, decoder_of(engine), text(20)) > 100 * TOLERANCE


def test_slots_beyond_the_filled_ones_may_hold_anything(engine: Engine) -> None:
    decoder = decoder_of(engine)
    decoder._cache.reserve(1)
    for buffer in decoder._cache._past.values():
        buffer[:] = np.nan
    assert error_of_steps(engine, decoder, text(12)) <= TOLERANCE


def test_single_steps_after_a_chunk_use_its_entries(engine: Engine) -> None:
    ids, decoder = text(20), decoder_of(engine)
    decoder.set_density(1.0, 1.0)
    decoder.feed(ids[:, :15], sparse_tail=0, outputs=())
    last = list(step_logits(decoder, ids[:, 15:]))
    whole = engine.logits(ids, protocol="dense")[0, 15:]
    assert np.abs(np.stack(last) - whole).max() <= TOLERANCE * np.abs(whole).max()
    assert decoder.filled == 20


def test_a_muted_row_reads_less_and_leaves_the_others_alone(engine: Engine) -> None:
    ids = np.array([7, 8])
    together, muted = decoder_of(engine, rows=2), decoder_of(engine, rows=2)
    for decoder in (together, muted):
        decoder.set_density(0.5, 0.5)
        decoder.step(ids)
    muted.mute(1)
    kept, quiet = (decoder.step(ids) for decoder in (together, muted))
    np.testing.assert_array_equal(quiet["logits"][0], kept["logits"][0])
    assert quiet["active.heads"][1].sum() == 0
    assert quiet["read"][:, :, 1].sum() < kept["read"][:, :, 1].sum()
