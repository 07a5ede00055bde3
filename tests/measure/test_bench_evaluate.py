# SPDX-License-Identifier: Apache-2.0
"""What bench and eval report is what the kernels counted and what torch computes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from statistics import median

import numpy as np
import pytest
from typer.testing import CliRunner

import shadowc
from shadowc.cli.app import app
from shadowc.eval import likelihood
from shadowc.measure import settings
from shadowc.measure.bench import BenchRow, _row, bench
from shadowc.measure.break_even import BreakEven
from shadowc.measure.evaluate import evaluate
from shadowc.measure.rounds import Turn
from shadowc.measure.turns import Text
from shadowc.runtime.library import OpLibrary
from shadowc.runtime.load import load_cpu, read_manifest
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError, UnsupportedError, VerificationError
from shadowc.spec.progress import Event, EventProgress

TEXT = "One neuron is one record, and a record that is not read costs nothing. " * 6


def test_dense_bits_equal_torchs_cross_entropy(sparse_engine: Path, tiny_model: object) -> None:
    import torch

    engine = shadowc.load(sparse_engine)
    report = evaluate(engine, TEXT, densities=[], window=32)
    ids = engine.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    nats = 0.0
    for at in range(0, len(ids), 31):
        window = torch.tensor([[2, *ids[at : at + 31]]])
        with torch.no_grad():
            logits = tiny_model(window).logits[0, :-1]  # type: ignore[operator]
        nats += float(torch.nn.functional.cross_entropy(logits.double(), window[0, 1:], reduction="sum"))
    assert report.dense == pytest.approx(nats / np.log(2) / len(TEXT.encode()), rel=1e-5)
    assert report.tokens == len(ids)


def test_bits_are_the_same_in_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    logits, ids = rng.normal(size=(70, 40)).astype(np.float32) * 20, rng.integers(0, 40, 70)
    wide = logits.astype(np.float64)
    wanted = -np.log2(np.exp(wide)[np.arange(70), ids] / np.exp(wide).sum(axis=1)).sum()
    for rows in (1, 64, 70, 1000):
        monkeypatch.setattr(likelihood, "ROWS_AT_ONCE", rows)
        assert -likelihood.log_likelihood(logits, ids)[0] / np.log(2) == pytest.approx(wanted, rel=1e-12)


def test_eval_counts_the_bytes_of_the_file_when_lines_end_in_crlf(sparse_engine: Path, tmp_path: Path) -> None:
    content = TEXT.replace(". ", ".\r\n").encode()
    (tmp_path / "text.txt").write_bytes(content)
    arguments = ["eval", str(sparse_engine), "--text", str(tmp_path / "text.txt")]
    result = CliRunner().invoke(app, [*arguments, "--densities", "1", "--methods", "predictor", "--json"])
    (found,) = json.loads(result.stdout)["corpora"]
    assert found["bytes"] == len(content)
    assert found["sha256"] == hashlib.sha256(content).hexdigest()


def test_every_method_keeps_the_share_that_was_asked_for(sparse_engine: Path) -> None:
    report = evaluate(shadowc.load(sparse_engine), TEXT, densities=[Density(0.5, 0.25)], window=32)
    assert [row.method for row in report.rows] == ["predictor", "static", "normalised", "random"]
    for row in report.rows:
        assert row.active_heads == pytest.approx(0.5, abs=0.02)
        assert row.active_neurons == pytest.approx(0.25, abs=0.02)
    by_method = {row.method: row.bits_per_byte for row in report.rows}
    assert len({by_method[method] for method in ("static", "normalised", "random")}) == 3
    assert by_method["predictor"] not in {by_method["static"], by_method["random"]}


def test_eval_measures_all_controls_under_one_mask_per_sequence(sequence_engine: Path) -> None:
    report = evaluate(load_cpu(sequence_engine), TEXT, densities=[Density(0.5, 0.25)], window=32)
    assert [row.method for row in report.rows] == ["predictor", "static", "normalised", "random"]
    by_method = {row.method: row.bits_per_byte for row in report.rows}
    # Of random weights a predictor may learn no more than their mean: its masks are then those of `normalised`.
    assert len({by_method[method] for method in ("static", "normalised", "random")}) == 3
    assert by_method["predictor"] not in {by_method["static"], by_method["random"]}
    assert all(row.active_heads == pytest.approx(0.5, abs=0.02) for row in report.rows)


def test_eval_under_one_mask_is_refused_by_an_engine_of_masks_per_token(sparse_engine: Path) -> None:
    with pytest.raises(UnsupportedError, match="mask for every token") as caught:
        evaluate(shadowc.load(sparse_engine), TEXT, densities=[], protocol="prompt")
    assert "--mask sequence" in (caught.value.hint or "")


def test_bench_has_rows_for_a_mask_per_sequence_beside_those_per_token(sequence_engine: Path) -> None:
    report = bench(sequence_engine, densities=[Density(0.5, 0.5)], rounds=1, tokens=4)
    size = {row.label: row.megabytes_per_token for row in report.rows}
    assert list(size) == [
        "dense twin",
        "dense twin, skip zeros",
        "0.5 heads, 0.5 neurons",
        "0.5 heads, 0.5 neurons, skip zeros",
        "0.5 heads, 0.5 neurons, a mask per sequence",
        "0.5 heads, 0.5 neurons, a mask per sequence, skip zeros",
    ]
    assert size["0.5 heads, 0.5 neurons, a mask per sequence"] < size["0.5 heads, 0.5 neurons"]


def test_bench_counts_fewer_bytes_at_lower_density_and_with_skipped_zeros(sparse_engine: Path) -> None:
    report = bench(sparse_engine, densities=[Density(0.5, 0.5)], rounds=1, tokens=4)
    assert [row.label for row in report.rows] == [
        "dense twin",
        "dense twin, skip zeros",
        "0.5 heads, 0.5 neurons",
        "0.5 heads, 0.5 neurons, skip zeros",
    ]
    dense, dense_skip, half, half_skip = (row.megabytes_per_token for row in report.rows)
    assert dense > dense_skip > half_skip
    assert dense > half > half_skip
    assert report.rows[0].speedup == 1
    assert report.stream_gigabytes_per_second > 0


@pytest.fixture
def short_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast the stream is does not matter here."""
    monkeypatch.setattr(settings, "STREAM_BYTES", 1 << 20)
    monkeypatch.setattr(settings, "PACE_BYTES", 1 << 20)


@pytest.mark.usefixtures("short_stream")
def test_memory_of_the_weights_is_measured_where_caches_cannot_hold_it(
    sparse_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = {"densities": [Density(0.5, 0.5)], "rounds": 3, "tokens": 3, "skip_zeros": False}
    assert bench(sparse_engine, **quick).weights_stream_by_round == ()
    size = (sparse_engine / "weights.bin").stat().st_size
    speeds = iter([3e9, 1e9, 2e9])

    def stream_over(_: OpLibrary, memory: np.ndarray, threads: int, repeats: int) -> float:
        if memory.size == settings.PACE_BYTES:  # for the pace of a moment
            return 1e9
        assert (memory.size, threads, repeats) == (size, 1, settings.STREAM_REPEATS)
        assert memory.tobytes() == (sparse_engine / "weights.bin").read_bytes()
        return next(speeds)

    monkeypatch.setattr(OpLibrary, "stream_over", stream_over)
    monkeypatch.setattr(settings, "LEAST_WEIGHTS", size)
    assert bench(sparse_engine, **quick, threads=1).weights_stream_by_round == (3.0, 1.0, 2.0)
    monkeypatch.setattr(settings, "LEAST_WEIGHTS", size + 1)
    assert bench(sparse_engine, **quick).weights_stream_by_round == ()


@pytest.mark.usefixtures("short_stream")
def test_on_two_cores_every_round_tells_how_far_threads_are_apart(
    sparse_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = {"densities": [Density(0.5, 0.5)], "rounds": 2, "tokens": 3, "skip_zeros": False}
    trips = iter([70.0, 300.0])
    monkeypatch.setattr(settings, "usable_cores", lambda: 2)
    monkeypatch.setattr(OpLibrary, "round_trip", lambda _: next(trips))
    report = bench(sparse_engine, **quick, threads=2)
    assert report.round_trip_ns_by_round == (70.0, 300.0)
    assert report.noise.warning is not None
    assert "70 to 300 ns apart" in report.noise.warning
    assert bench(sparse_engine, **quick, threads=1).round_trip_ns_by_round == ()
    monkeypatch.setattr(OpLibrary, "round_trip", lambda _: None)
    assert bench(sparse_engine, **quick, threads=2).round_trip_ns_by_round == ()
    monkeypatch.setattr(OpLibrary, "round_trip", lambda _: pytest.fail("two threads of many cores meet anywhere"))
    monkeypatch.setattr(settings, "usable_cores", lambda: 4)
    assert bench(sparse_engine, **quick, threads=2).round_trip_ns_by_round == ()


@pytest.mark.usefixtures("short_stream")
def test_weights_that_are_cut_while_they_are_measured_end_bench_with_a_sentence(
    sparse_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "engine"
    shutil.copytree(sparse_engine, folder)
    monkeypatch.setattr(settings, "LEAST_WEIGHTS", 1)
    side = settings.on_cpu(folder, read_manifest(folder), [Density(0.5, 0.5)], [False], 1, None)
    assert side.weights_bandwidth is not None
    assert side.weights_bandwidth() > 0
    os.truncate(folder / "weights.bin", 4096)
    with pytest.raises(VerificationError, match="it changed after it was loaded"):
        side.weights_bandwidth()


@pytest.mark.usefixtures("short_stream")
def test_the_numbers_of_a_bench_row_follow_from_its_rounds(sparse_engine: Path) -> None:
    report = bench(sparse_engine, densities=[Density(0.5, 0.5)], rounds=3, tokens=4, skip_zeros=False)
    stream = report.stream_by_round
    assert report.stream_gigabytes_per_second == median(stream)
    for row in report.rows:
        assert row.ms_per_token == pytest.approx(median(row.ms_by_round))
        assert (row.ms_lowest, row.ms_highest) == (min(row.ms_by_round), max(row.ms_by_round))
        assert row.floor_ms > 0
        assert (row.above_floor_ms is None) == (row.steady_turns == 0)
        ratios = [base / own for base, own in zip(report.rows[0].ms_by_round, row.ms_by_round, strict=True)]
        assert row.speedup == pytest.approx(median(ratios))
        assert row.shares is not None
        assert row.shares.unknown == ()
    (twin, half) = report.rows
    (found,) = report.break_even
    ratio = median(own / base for own, base in zip(half.ms_by_round, twin.ms_by_round, strict=True))
    assert found.break_even == BreakEven("at least" if ratio < 1 else "below", 0.5)
    spreads = [(row.ms_highest - row.ms_lowest) / row.ms_per_token for row in report.rows]
    assert report.noise.spread == pytest.approx(max(spreads))
    assert report.noise.stream_spread == pytest.approx((max(stream) - min(stream)) / median(stream))


def a_row(*rounds: list[tuple[float, int, float, float]]) -> BenchRow:
    """Of a token that reads 90 MB; a turn is ms per token, tokens, and GB/s before and behind."""
    turns = [[Turn(ms / 1e3, tokens, (a * 1e9, b * 1e9)) for ms, tokens, a, b in turns] for turns in rounds]
    return _row(settings.Setting("", Density(), False, "token"), turns, [1.0] * len(rounds), 90e6, None)


def test_a_row_is_held_against_what_memory_gave_at_the_time_of_each_turn() -> None:
    """90 MB take 5 ms at 0.9 of 20 GB/s and 2.5 at 0.9 of 40."""
    slow, fast = (7.0, 4, 20.0, 20.0), (3.0, 4, 40.0, 40.0)
    for rounds, floor, above in (
        ([[slow]], 5.0, 2.0),
        ([[fast, fast]], 2.5, 0.5),
        ([[slow, fast]], 3.75, 1.25),
        ([[slow], [slow], [fast]], 5.0, 2.0),
        ([[slow, (3.0, 2, 40.0, 40.0)]], 25 / 6, 1.5),  # turns count by their tokens
        ([[(7.0, 4, 18.2, 21.8)]], 5.0, 2.0),
    ):
        row = a_row(*rounds)
        assert (row.floor_ms, row.above_floor_ms, row.steady_turns) == pytest.approx((floor, above, 1.0))
        assert row.share_of_stream == pytest.approx(0.9 * (1 - above / row.ms_per_token), rel=1e-6)


def test_turns_during_which_memory_changed_its_pace_say_nothing_of_the_floor() -> None:
    steady, changed = (7.0, 4, 20.0, 20.0), (30.0, 4, 20.0, 24.1)
    row = a_row([steady, changed], [changed, changed], [steady, steady])
    assert (row.above_floor_ms, row.share_of_stream) == pytest.approx((2.0, 0.9 * 5 / 7))
    assert row.steady_turns == 0.5
    assert row.ms_per_token == pytest.approx(18.5)
    assert [(turn.round, turn.steady) for turn in row.turns] == [
        (1, True), (1, False), (2, False), (2, False), (3, True), (3, True),
    ]  # fmt: skip
    assert (row.turns[1].ms_per_token, row.turns[1].stream_gigabytes_per_second) == pytest.approx((30.0, 22.05))
    row = a_row([changed], [changed])
    assert (row.above_floor_ms, row.share_of_stream, row.steady_turns) == (None, None, 0.0)
    assert row.floor_ms == pytest.approx(90 / (0.9 * 22.05))


@pytest.mark.usefixtures("short_stream")
def test_memory_is_read_between_turns(sparse_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paces, ran = iter(np.arange(1, 1000) * 1e9), []
    go_on = Text.go_on
    monkeypatch.setattr(settings, "pace_of", lambda *_: lambda: ran.append("pace") or next(paces))
    monkeypatch.setattr(Text, "go_on", lambda text: ran.append("turn") or go_on(text))
    report = bench(sparse_engine, densities=[Density(0.5, 0.5)], rounds=1, tokens=6, skip_zeros=False)
    # both prompts, then two turns of the twin and of the engine
    assert ran == ["turn", "turn", "pace", *["turn", "pace"] * 4]
    for row, turns in zip(report.rows, (((1.5, 4), (3.5, 2)), ((2.5, 4), (4.5, 2))), strict=True):
        assert [turn.stream_gigabytes_per_second for turn in row.turns] == pytest.approx([pace for pace, _ in turns])
        assert row.floor_ms == pytest.approx(
            sum(tokens * row.megabytes_per_token / (0.9 * pace) for pace, tokens in turns) / 6
        )


@pytest.mark.usefixtures("short_stream")
def test_weights_that_caches_may_hold_are_held_against_the_stream_of_the_round(
    sparse_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = {"densities": [Density(0.5, 0.5)], "rounds": 2, "tokens": 5, "skip_zeros": False}
    report = bench(sparse_engine, **quick)
    for row in report.rows:
        assert [turn.stream_gigabytes_per_second for turn in row.turns] == pytest.approx(
            np.repeat(report.stream_by_round, 2).tolist()
        )
        assert row.steady_turns == 1
    monkeypatch.setattr(settings, "LEAST_WEIGHTS", 1)
    paces = {turn.stream_gigabytes_per_second for row in bench(sparse_engine, **quick).rows for turn in row.turns}
    assert len(paces) == 8  # each turn has its own


@pytest.mark.usefixtures("short_stream")
def test_what_masks_cost_is_density_1_beside_the_twin_of_the_same_rounds(sparse_engine: Path) -> None:
    report = bench(sparse_engine, densities=[Density(1, 1)], rounds=2, tokens=3, skip_zeros=False)
    (twin, whole) = report.rows
    added = [own / base - 1 for own, base in zip(whole.ms_by_round, twin.ms_by_round, strict=True)]
    cost = report.break_even[0].mask_cost
    assert cost is not None
    assert (cost.least, cost.share, cost.most) == pytest.approx((min(added), median(added), max(added)))


@pytest.mark.usefixtures("short_stream")
def test_bench_reads_a_prompt_with_every_variant_and_once_behind_loading(sequence_engine: Path) -> None:
    report = bench(sequence_engine, densities=[Density(0.5, 0.5)], rounds=2, tokens=3, prompt_tokens=20)
    assert [row.label for row in report.prompts] == [
        "dense twin",
        "dense twin, skip zeros",
        "a mask per token",
        "a mask per token, skip zeros",
        "a mask per sequence",
        "a mask per sequence, skip zeros",
    ]
    for row in report.prompts:
        assert 0 < row.ms_lowest <= row.first_token_ms <= row.ms_highest
        assert row.tokens_per_second > 20 / (row.ms_highest / 1e3)  # the pass is a part of what is waited for
    assert report.load_to_first_token_seconds > 0
    assert report.prompt_tokens == 20


@pytest.mark.usefixtures("short_stream")
@pytest.mark.parametrize("flag", [False, True])
def test_bench_measures_one_way_of_treating_zeros_alone(sparse_engine: Path, flag: bool) -> None:
    report = bench(sparse_engine, densities=[Density(0.5, 0.5)], rounds=1, tokens=3, skip_zeros=flag)
    assert [row.skip_zeros for row in report.rows] == [flag, flag]
    assert report.rows[0].speedup == 1
    assert [row.skip_zeros for row in report.break_even] == [flag]
    assert len(report.prompts) == 2


@pytest.mark.parametrize("tokens", [0, 64])
def test_a_prompt_that_leaves_no_room_is_refused_before_anything_is_loaded(sparse_engine: Path, tokens: int) -> None:
    with pytest.raises(InputError, match="takes 1 to 63 and one new one") as caught:
        bench(sparse_engine, densities=[Density()], prompt_tokens=tokens)
    assert caught.value.hint == "--prompt-tokens 33"


def test_more_tokens_than_the_context_holds_are_refused_before_anything_is_loaded(sparse_engine: Path) -> None:
    with pytest.raises(
        InputError, match=r"47 tokens are to be timed; behind a prompt of 16 .* has room for 46"
    ) as caught:
        bench(sparse_engine, densities=[Density()], tokens=47)
    assert caught.value.hint == "--tokens 46"


@pytest.mark.usefixtures("short_stream")
def test_progress_ends_when_everything_ran(sequence_engine: Path) -> None:
    seen: list[Event] = []
    densities = [Density(0.5, 0.5), Density(0.2, 0.2)]
    bench(
        sequence_engine, densities=densities, rounds=1, tokens=3, skip_zeros=False, progress=EventProgress(seen.append)
    )
    counts = [(event.done, event.total) for event in seen if event.total]
    assert counts[-1][0] == counts[-1][1]
    assert counts == sorted(counts)
