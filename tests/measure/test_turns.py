# SPDX-License-Identifier: Apache-2.0
"""Texts of several engines of one process go on in turns, say what they would say alone, and have every token timed."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from shadowc.measure.bench import bench
from shadowc.measure.turns import TURN_TOKENS, Text, tokens_generated, turn_sizes
from shadowc.runtime.load import load_cpu
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError, InternalError

if TYPE_CHECKING:
    from shadowc.runtime.engine import Engine

PROMPT = np.array([[2, 44, 101, 7, 230, 19, 63]], np.int64)


@pytest.fixture(scope="module")
def engine(sparse_engine: Path) -> Engine:
    return load_cpu(sparse_engine, threads=1)


def watched(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Who generates and how many ids, filled while texts go on."""
    seen: list[tuple[str, int]] = []
    generate = type(engine).generate

    def told(self: Any, prompt: Any, most: int, least: int, density: Density, stream: Any, stream_every: int) -> Any:
        count = iter(range(1, most + 1))

        def piece(ids: Any) -> None:
            seen.append((f"{density.heads}", next(count)))
            stream(ids)

        return generate(self, prompt, most, least, density, piece, stream_every=stream_every)

    monkeypatch.setattr(type(engine), "generate", told)
    return seen


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 24])
def test_turns_share_out_all_tokens(tokens: int) -> None:
    sizes = turn_sizes(tokens)
    assert sum(sizes) == tokens
    assert max(sizes) <= TURN_TOKENS


def test_texts_go_on_by_turns_and_every_token_but_the_first_two_is_timed(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watched(engine, monkeypatch)
    texts = [Text(engine, PROMPT, density, turn_sizes(6)) for density in (Density(1, 1), Density(0.5, 0.5))]
    for part in ([1, 2, 3, 4, 5, 6], [7, 8]):  # the last id follows from no step
        for text, name in zip(texts, ("1", "0.5"), strict=True):
            seen.clear()
            text.go_on()
            assert [(float(who), number) for who, number in seen] == [(float(name), number) for number in part]
    assert [len(text.seconds) for text in texts] == [6, 6]
    assert all(second > 0 for text in texts for second in text.seconds)


def test_bytes_are_those_of_the_same_text_alone(engine: Engine) -> None:
    densities = [Density(1, 1), Density(0.5, 0.5)]
    texts = [Text(engine, PROMPT, density, turn_sizes(6)) for density in densities]
    for _ in turn_sizes(6):
        for text in texts:
            text.go_on()
    new = tokens_generated(6)
    for text, density in zip(texts, densities, strict=True):
        engine.generate(PROMPT, new, new, density)
        assert text.bytes_read == engine.last_stats.bytes_read
    assert texts[1].bytes_read < texts[0].bytes_read


def test_a_text_that_has_ended_has_no_more_turns(engine: Engine) -> None:
    whole = Text(engine, PROMPT, Density(), turn_sizes(2))
    whole.go_on()
    with pytest.raises(InternalError, match="ended behind 2 of 2 timed tokens"):
        whole.go_on()
    room = engine.manifest.model.positions - PROMPT.shape[1]
    short = Text(engine, PROMPT, Density(), [0, room + 8, 4])
    short.go_on()
    short.go_on()  # the context ends in this turn
    with pytest.raises(InternalError, match=f"of {room + 12} timed tokens"):
        short.go_on()


def test_texts_that_are_closed_before_their_end_leave_no_thread(engine: Engine) -> None:
    before = threading.active_count()
    fresh, begun, ended = (Text(engine, PROMPT, Density(), turn_sizes(6)) for _ in range(3))
    begun.go_on()
    for _ in turn_sizes(6):
        ended.go_on()
    assert threading.active_count() > before
    for text in (fresh, begun, ended):
        text.close()
        text.close()
    assert threading.active_count() == before


def test_a_round_that_an_error_or_ctrl_c_ends_leaves_no_thread(
    sparse_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns, go_on, before = iter(range(10)), Text.go_on, threading.active_count()

    def interrupted(text: Text) -> None:
        if next(turns) == 3:
            raise KeyboardInterrupt
        go_on(text)

    monkeypatch.setattr(Text, "go_on", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench(sparse_engine, densities=[Density(0.5, 0.5)], rounds=1, tokens=8, skip_zeros=False, threads=1)
    assert threading.active_count() == before


def test_an_error_of_a_text_comes_to_who_gave_the_turn(engine: Engine) -> None:
    with pytest.raises(InputError, match="the prompt has 64 tokens"):
        Text(engine, np.full((1, 64), 5, np.int64), Density(), turn_sizes(4)).go_on()
