# SPDX-License-Identifier: Apache-2.0
"""Medians, ratios and what stays in memory; the lineup; the machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.peers import machine
from benchmarks.peers.figures import Result, Sample, allowed_ms, common_first_tokens, residents, row
from benchmarks.peers.lineup import entrants
from benchmarks.peers.machine import physical_cores

STREAMS = (10e9, 20e9, 40e9)
ROUNDING = 1e-9


def result(
    name: str, times: tuple[float, ...], *, first: tuple[int, ...] = (7, 7, 7), size: float | None = None
) -> Result:
    samples = zip(times, first, STREAMS, strict=True)
    made = (Sample(100.0, ms, 256.0, token, size, 2_000_000_000, (stream, stream)) for ms, token, stream in samples)
    return Result(name, "dense", tuple(made))


def test_the_ratio_is_taken_within_each_round() -> None:
    base = result("base", (10.0, 20.0, 100.0))
    own = result("own", (20.0, 10.0, 50.0))
    figures = row(own, base, [7, 7, 7], 512)
    assert figures.ratio == pytest.approx(0.5, abs=ROUNDING)  # of 2, 0.5 and 0.5; the medians alone would say 1
    assert (figures.decode.median, figures.decode.lowest, figures.decode.highest) == (20.0, 10.0, 50.0)


def test_a_base_that_failed_gives_no_ratio() -> None:
    failed = Result("base", "dense", (), "why")
    assert row(result("own", (1.0, 2.0, 3.0)), failed, [7, 7, 7], 512).ratio is None
    assert row(result("own", (1.0, 2.0, 3.0)), None, [7, 7, 7], 512).ratio is None


def test_what_a_token_may_cost_follows_the_stream_beside_each_sample() -> None:
    assert allowed_ms(900e6, 10e9) == pytest.approx(101.0, abs=ROUNDING)
    figures = row(result("own", (111.0, 50.0, 28.0), size=900e6), None, [7, 7, 7], 512)
    assert figures.allowed_ms == pytest.approx(51.0, abs=ROUNDING)
    assert figures.steady == 3
    assert figures.above_ms is not None  # 10, -1 and 2: the medians alone would say -1
    above = (figures.above_ms.median, figures.above_ms.lowest, figures.above_ms.highest)
    assert above == pytest.approx((2.0, -1.0, 10.0), abs=ROUNDING)
    assert figures.megabytes_per_token == pytest.approx(900.0, abs=ROUNDING)


def test_samples_during_which_memory_changed_its_pace_are_held_against_no_stream() -> None:
    own = result("own", (111.0, 50.0, 28.0), size=900e6)
    changed = replace(own.samples[0], streams=(8e9, 12e9))
    figures = row(replace(own, samples=(changed, *own.samples[1:])), None, [7, 7, 7], 512)
    assert figures.steady == 2
    assert figures.above_ms is not None
    assert figures.above_ms.highest == pytest.approx(2.0, abs=ROUNDING)
    assert figures.allowed_ms == pytest.approx(51.0, abs=ROUNDING)
    all_changed = replace(own, samples=(changed,) * 3)
    assert row(all_changed, None, [7, 7, 7], 512).above_ms is None


def test_prefill_counts_the_tokens_of_the_long_prompt() -> None:
    figures = row(result("own", (1.0, 1.0, 1.0)), None, [7, 7, 7], 512)
    assert figures.prefill_tokens_per_second == pytest.approx(2000.0, abs=ROUNDING)


def test_a_contestant_that_computes_another_model_agrees_in_no_round() -> None:
    results = [result("a", (1.0,) * 3), result("b", (1.0,) * 3), result("other", (1.0,) * 3, first=(8, 9, 8))]
    common = common_first_tokens(results, 3)
    assert common == [7, 7, 7]
    assert [row(one, None, common, 512).agreeing for one in results] == [3, 3, 0]


def test_settings_of_one_contestant_have_one_vote() -> None:
    crowd = [
        Result("ours", setting, result("", (1.0,) * 3, first=(8, 8, 8)).samples) for setting in ("dense", "x", "y")
    ]
    others = [result("a", (1.0,) * 3), result("b", (1.0,) * 3)]
    assert common_first_tokens([*crowd, *others], 3) == [7, 7, 7]


@pytest.mark.parametrize(
    ("budget", "kept"),
    # 10 + 5 + 1; then 1 beside 10; then not even that
    [(16, {"a", "b", "c"}), (15, {"a"}), (11, {"a"}), (10, set()), (0, set())],
)
def test_residents_leave_room_for_the_largest_that_is_loaded_beside_them(budget: int, kept: set[str]) -> None:
    assert residents({"c": 10, "b": 5, "a": 1}, budget) == kept


@pytest.mark.parametrize("item", ["vllm:int8", "openvino:fp32", "openvino", ""])
def test_the_lineup_refuses_what_it_does_not_have(item: str) -> None:
    with pytest.raises(ValueError, match=r"expected one of .*openvino:int8"):
        entrants([item], [], ["0.5/0.5"])


@pytest.mark.parametrize("density", ["dense", "0.5", "0.5/1.1", "0.5/0.2/0.1", "50/20", "0.5/"])
def test_the_lineup_refuses_what_is_no_density(density: str) -> None:
    with pytest.raises(ValueError, match="expected HEADS/NEURONS"):
        entrants(["shadowc:int8"], [], ["0.5/0.5", density])


def test_the_lineup_gives_densities_to_our_engines_only(tmp_path: Path) -> None:
    found = entrants(["openvino:int8", "shadowc:int8"], [f"tuned={tmp_path}"], ["0.5/0.2"])
    assert [(one.label, one.settings) for one in found] == [
        ("openvino:int8", ("dense",)),
        ("shadowc:int8", ("dense", "0.5/0.2")),
        ("shadowc:tuned", ("dense", "0.5/0.2")),
    ]
    assert found[2].engine == tmp_path


@pytest.mark.parametrize(("engines", "said"), [(["x=/nowhere"], "LABEL=FOLDER"), (["int8=."], "named twice")])
def test_the_lineup_refuses_engines_that_it_cannot_name(engines: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        entrants(["shadowc:int8"], engines, [])


def test_two_threads_of_a_core_are_one_core() -> None:
    processors = [{"processor": str(number), "physical id": "0", "core id": str(number // 2)} for number in range(8)]
    assert physical_cores(processors, set(range(8))) == 4
    assert physical_cores(processors, {0, 1, 2}) == 2
    assert physical_cores([{"processor": "0"}, {"processor": "1"}], {0, 1}) == 2


def test_a_race_waits_for_the_load_to_fall_and_is_doubtful_if_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    loads = iter([2.0, 1.0, 0.6, 9.0])
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (next(loads), 0.0, 0.0))
    monkeypatch.setattr(machine.time, "sleep", lambda _: None)
    assert machine.noise(2) == ""
    assert next(loads) == 9.0  # it asked three times
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (2.0, 0.0, 0.0))
    assert "load average 2.0 on 2 cores" in machine.noise(2, patience=0.0)
