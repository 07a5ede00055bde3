# SPDX-License-Identifier: Apache-2.0
"""Several tokens in one run are those of as many runs: ids, counts, keys and values, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import shadowc
from shadowc.measure.turns import Text, turn_sizes
from shadowc.runtime import cache
from shadowc.runtime import session as sessions
from shadowc.runtime.chains import chained
from shadowc.runtime.decoder import AT_ONCE, NO_ID, Decoder
from shadowc.runtime.engine import Engine
from shadowc.runtime.load import load_cpu
from shadowc.runtime.prompts import Batch
from shadowc.runtime.sequence_engine import SequenceEngine
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError
from shadowc.spec.ops import CHAIN
from shadowc.spec.options import TrainOptions
from shadowc.spec.tensors import BANNED, END, NEXT, PAST, RUNS, TOKEN
from tests.conftest import TINY
from tests.e2e.compiled import options

MASKED = Density(0.5, 0.25)
PROMPT = np.random.default_rng(6).integers(4, TINY["vocab_size"], (1, 7), dtype=np.int64)


@pytest.fixture(scope="module")
def by_name(int8_engine: Path, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Engine]:
    """Engines whose whole graph is a chain."""
    parent = tmp_path_factory.mktemp("runs")

    def made(name: str, **more: Any) -> Engine:
        return load_cpu(shadowc.compile(options(tiny_checkpoint, parent / name, **more)), threads=2)

    sequence = made("sequence", weights="int4", mask="sequence")
    assert isinstance(sequence, SequenceEngine)
    plus = made("plus", weights="bf16", train=TrainOptions(style="shadow+", epochs=1, batch=32))
    int8 = load_cpu(int8_engine, threads=2)
    engines = {"int8": int8, "plus": plus, "dense": int8.dense_twin(), "sequence": sequence}
    return {**engines, "refresh": sequence.with_refresh(3)}


NAMES = ("int8", "plus", "dense", "sequence", "refresh")


def decoder_of(engine: Engine) -> Decoder:
    found = engine._decoder(Batch(PROMPT, np.zeros(1, np.int64)), 60)
    assert isinstance(found, Decoder)
    return found


def started(engine: Engine) -> tuple[Decoder, int]:
    """Behind the prompt, and the first new id."""
    decoder = decoder_of(engine)
    first = int(decoder.prefill(PROMPT).argmax())
    if engine.manifest.sparsity is not None:
        decoder.set_density(MASKED.heads, MASKED.neurons)
    return decoder, first


Counts = list[dict[str, np.ndarray]]


def one_by_one(engine: Engine, tokens: int, banned: int = NO_ID) -> tuple[list[int], Counts, dict[str, np.ndarray]]:
    """Ids, what each step counted, keys and values."""
    decoder, last = started(engine)
    ids, counts = [], []
    for _ in range(tokens):
        outputs = decoder.step(np.array([last]))
        logits = outputs["logits"][0, 0].copy()
        if banned != NO_ID:
            logits[banned] = -np.inf
        counts.append({name: value.copy() for name, value in outputs.items() if name.startswith(("active", "read"))})
        last = int(logits.argmax())
        ids.append(last)
    return ids, counts, decoder.cached(0)


@pytest.mark.parametrize("sizes", [(1, 8, 3, 8), (8, 1, 5, 5, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_one_run_of_many_tokens_gives_what_runs_of_one_do(
    by_name: dict[str, Engine], name: str, sizes: tuple[int, ...]
) -> None:
    engine = by_name[name]
    wanted_ids, wanted_counts, wanted_cache = one_by_one(engine, 20)
    decoder, last = started(engine)
    assert decoder.at_once == AT_ONCE
    ids: list[int] = []
    left = list(sizes)
    while len(ids) < 20:
        most = min(left.pop(0) if left else AT_ONCE, 20 - len(ids))
        run = decoder.run_on(last, most, end=NO_ID)
        assert len(run.ids) == most or name == "refresh"
        for name_of, values in run.outputs.items():
            each = np.split(values, len(run.ids))
            for found, wanted in zip(each, wanted_counts[len(ids) :], strict=False):
                np.testing.assert_array_equal(found, wanted[name_of])
        assert {"read"} <= set(run.outputs)
        ids += run.ids
        last = ids[-1]
    assert ids == wanted_ids
    cache = decoder.cached(0)
    assert cache.keys() == wanted_cache.keys()
    for key, values in cache.items():
        np.testing.assert_array_equal(values, wanted_cache[key])


@pytest.mark.parametrize("name", NAMES)
def test_a_run_ends_with_the_end_token_and_never_with_one_that_is_banned(by_name: dict[str, Engine], name: str) -> None:
    engine = by_name[name]
    free, _, _ = one_by_one(engine, AT_ONCE)
    end = next(token for at, token in enumerate(free) if at >= 1 and token not in free[:at])
    count = free.index(end) + 1
    decoder, first = started(engine)
    ids: list[int] = []
    while len(ids) < count:
        ids += decoder.run_on(ids[-1] if ids else first, AT_ONCE - len(ids), end=end).ids
    assert ids == free[:count]
    assert decoder.filled == PROMPT.shape[1] + count
    rest, _, _ = one_by_one(engine, count + 2)
    assert [*ids, *decoder.run_on(end, 1, end=NO_ID).ids, *decoder.run_on(rest[-2], 1, end=NO_ID).ids] == rest
    without, _, _ = one_by_one(engine, AT_ONCE, banned=end)
    decoder, first = started(engine)
    found: list[int] = []
    while len(found) < AT_ONCE:
        most = AT_ONCE - len(found)
        found += decoder.run_on(found[-1] if found else first, most, end=end, banned=end).ids
    assert found == without
    assert end not in found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("most", "least"), [(2, 0), (2, 2), (23, 0), (30, 11), (9, 9)])
def test_texts_are_the_same_however_many_tokens_a_run_has(
    by_name: dict[str, Engine], name: str, most: int, least: int
) -> None:
    engine = by_name[name]
    density = None if name == "dense" else MASKED
    found = []
    for every in (1, 3, 99, None):
        pieces: list[int] = []
        stream = None if every is None else lambda new: pieces.append(int(new[0]))  # noqa: B023
        more = {} if every is None else {"stream_every": every}
        text = engine.generate(PROMPT, most, least, density, stream, **more)
        assert every is None or pieces == text[0, PROMPT.shape[1] :].tolist()
        stats = engine.last_stats
        counted = (stats.tokens, stats.new_tokens, stats.heads, stats.neurons, stats.bytes_read, stats.finish)
        found.append((text.tolist(), counted, stats.bytes_read_kernels))
    assert all(one == found[0] for one in found)


def test_texts_end_at_the_end_token_in_the_middle_of_a_run(int8_engine: Path) -> None:
    engine = load_cpu(int8_engine, threads=2)

    def text(most: int, least: int = 0, **more: Any) -> list[int]:
        found: list[int] = engine.generate(PROMPT, most, least, MASKED, **more)[0, PROMPT.shape[1] :].tolist()
        return found

    free = text(14, 14)
    eos = next(token for at, token in enumerate(free) if at >= 4 and token not in free[:at])
    model = engine.manifest.model.model_copy(update={"eos": eos})
    engine.manifest = engine.manifest.model_copy(update={"model": model})
    short = text(14)
    assert short == free[: free.index(eos) + 1]
    assert engine.last_stats.finish == ("eos",)
    assert engine.last_stats.tokens == len(short) - 1
    least = len(short) + 2
    longer = text(14, least)
    assert eos not in longer[:least]
    assert longer == text(14, least, stream=lambda _: None)


def test_a_text_of_several_tokens_a_run_ends_with_the_context(by_name: dict[str, Engine]) -> None:
    engine = by_name["int8"]
    found = engine.generate(PROMPT, max_new_tokens=TINY["max_position_embeddings"] * 2, density=MASKED)
    assert found.shape[1] == TINY["max_position_embeddings"]
    assert engine.last_stats.finish == ("context",)


def test_pieces_come_as_soon_as_they_are_known(by_name: dict[str, Engine]) -> None:
    engine, runs, seen = by_name["int8"], [], []
    run_on = Decoder.run_on

    def told(self: Decoder, *arguments: Any, **named: Any) -> Any:
        runs.append(len(seen))
        return run_on(self, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Decoder, "run_on", told)
        engine.generate(PROMPT, 11, 11, MASKED, seen.append, stream_every=4)
    assert runs == [1, 2, 6, 10]  # behind the prompt's and the second token four a run
    assert len(seen) == 11


@pytest.mark.parametrize("every", [0, -1, 1.5])
def test_stream_every_is_a_whole_number_of_tokens(by_name: dict[str, Engine], every: Any) -> None:
    with pytest.raises(InputError, match="stream_every"):
        by_name["int8"].generate(PROMPT, 2, stream=print, stream_every=every)


def test_graphs_that_are_no_chain_rows_and_masks_that_are_looked_at_go_token_by_token(
    by_name: dict[str, Engine], sparse_engine: Path
) -> None:
    assert decoder_of(load_cpu(sparse_engine)).at_once == 1  # its LM head is ONNX Runtime's
    assert decoder_of(load_cpu(sparse_engine, reference=True)).at_once == 1
    engine = by_name["int8"]
    two = Batch(np.repeat(PROMPT, 2, axis=0), np.zeros(2, np.int64))
    assert engine._decoder(two, 60).at_once == 1
    assert engine._decoder(Batch(PROMPT, np.zeros(1, np.int64)), 60, masks=True).at_once == 1


@pytest.mark.parametrize("name", ["int8", "refresh"])
def test_a_turn_of_bench_has_the_time_of_its_own_tokens(
    by_name: dict[str, Engine], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    run_on = Decoder.run_on

    def told(self: Decoder, *arguments: Any, **named: Any) -> Any:
        run = run_on(self, *arguments, **named)
        computed.extend(run.ids)
        return run

    monkeypatch.setattr(Decoder, "run_on", told)
    text = Text(by_name[name], PROMPT, MASKED, [0, *turn_sizes(10)])
    for done in (1, 5, 9, 11):  # the second token, and then four a turn
        text.go_on()
        assert len(computed) == done
    assert len(text.seconds) == 10
    assert all(seconds > 0 for seconds in text.seconds)


def test_texts_that_nobody_waits_for_are_computed_in_runs_of_as_many_as_there_can_be(
    by_name: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    run_on = Decoder.run_on

    def told(self: Decoder, token: int, most: int, **named: Any) -> Any:
        asked.append(most)
        return run_on(self, token, most, **named)

    monkeypatch.setattr(Decoder, "run_on", told)
    by_name["int8"].generate(PROMPT, 20, 20, MASKED)
    assert asked == [1, AT_ONCE, AT_ONCE, 2]


@pytest.mark.parametrize("name", ["int8", "refresh"])
def test_room_for_keys_may_grow_between_two_runs(
    by_name: dict[str, Engine], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = by_name[name]
    wanted, counts, _ = one_by_one(engine, 20)
    monkeypatch.setattr(cache, "STEP_SLOTS", 4)
    decoder = engine._decoder(Batch(PROMPT, np.zeros(1, np.int64)), 1)
    assert isinstance(decoder, Decoder)
    last = int(decoder.prefill(PROMPT).argmax())
    decoder.set_density(MASKED.heads, MASKED.neurons)
    ids: list[int] = []
    while len(ids) < 20:
        run = decoder.run_on(last, min(3, 20 - len(ids)), end=NO_ID)
        ids += run.ids
        last = ids[-1]
        np.testing.assert_array_equal(run.outputs["active.neurons"][-1:], counts[len(ids) - 1]["active.neurons"])
    assert ids == wanted


def test_names_of_runs_are_those_of_the_graph(by_name: dict[str, Engine]) -> None:
    session = by_name["int8"]._generating
    assert {RUNS, BANNED, END} <= session.inputs
    assert NEXT not in session.outputs


# ---- planted


@pytest.mark.parametrize("forgotten", [PAST, TOKEN, "input_ids"])
def test_a_run_that_leaves_something_behind_goes_wrong(
    int8_engine: Path, forgotten: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(model: onnx.ModelProto) -> onnx.ModelProto:
        made = chained(model)
        for chain in (node for node in made.graph.node if node.op_type == CHAIN):
            wiring = {attribute.name: attribute for attribute in chain.attribute}
            if "carried" in wiring:
                pairs = list(wiring["carried"].ints)
                at = pairs.index(list(chain.input).index(forgotten))
                del wiring["carried"].ints[at : at + 2]
        return made

    monkeypatch.setattr(sessions, "chained", forgetful)
    engine = load_cpu(int8_engine, threads=2)
    _, _, by_step = one_by_one(engine, AT_ONCE)
    decoder, first = started(engine)
    decoder.run_on(first, AT_ONCE, end=NO_ID)
    at_once = decoder.cached(0)
    assert any(not np.array_equal(by_step[name], at_once[name]) for name in by_step)
