# SPDX-License-Identifier: Apache-2.0
"""What is called noise, on readings made by hand; and that readings count what other processes take."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from shadowc.measure.noise import APART, OTHERS, SPREAD, STEAL, Noise, Reading, noise

BEFORE = Reading(clock=100.0, cpus=4, own=10.0, busy=1000.0, steal=50.0, load=0.1)
AFTER = replace(BEFORE, clock=110.0, own=30.0, busy=1021.0, steal=50.1)
"""Ten seconds of four CPUs: twenty seconds of this process, one of others, a tenth stolen."""
STEADY = {"twin": (30.0, 31.0, 30.5), "half": (20.0, 20.4, 20.1)}
STREAM = (33.0, 34.0, 33.5)


def judged(
    *,
    before: Reading = BEFORE,
    after: Reading = AFTER,
    times: dict[str, tuple[float, ...]] = STEADY,
    stream: tuple[float, ...] = STREAM,
    round_trips: tuple[float, ...] = (),
) -> Noise:
    return noise(before, after, times, stream, round_trips)


def test_a_quiet_machine_is_not_mentioned() -> None:
    found = judged()
    assert found.warning is None
    assert found.other_processes == pytest.approx(1 / 40)
    assert found.steal == pytest.approx(0.1 / 40)


def test_time_of_this_process_is_nobody_elses() -> None:
    assert judged(after=replace(AFTER, own=49.0, busy=1039.0)).other_processes == 0
    assert judged(after=replace(AFTER, own=30.1, busy=1020.0)).other_processes == 0  # ticks are coarser


def test_other_processes_are_named_with_their_share() -> None:
    found = judged(after=replace(AFTER, busy=1020.0 + 1.01 * OTHERS * 40))
    assert found.warning is not None
    assert "other processes took 5% of the CPUs" in found.warning
    assert "end what else runs here" in found.warning


def test_stolen_time_is_the_hosts() -> None:
    found = judged(after=replace(AFTER, steal=50.0 + 1.01 * STEAL * 40))
    assert found.warning is not None
    assert "the host took 2% of the CPUs away" in found.warning
    assert "other processes" not in found.warning


def test_cores_that_changed_between_rounds_are_told_by_how_far_threads_were_apart() -> None:
    found = judged(round_trips=(68.0, 310.4, 70.0))
    assert found.warning is not None
    assert "two threads were 68 to 310 ns apart: their cores changed" in found.warning
    assert judged(round_trips=(100.0, 100.0 * APART - 1)).warning is None


def test_the_setting_whose_rounds_differ_most_is_named() -> None:
    found = judged(times={**STEADY, "half": (20.0, 20.0 * (1 + 2 * SPREAD), 20.0)})
    assert (found.spread_of, found.spread) == ("half", pytest.approx(2 * SPREAD))
    assert found.warning is not None
    assert "rounds of 'half' differ by 30%" in found.warning
    assert "more --rounds" in found.warning
    assert "twin" not in found.warning


def test_a_stream_that_drifts_is_noticed() -> None:
    found = judged(stream=(33.0, 33.0, 33.0 * (1 - 2 * SPREAD)))
    assert found.warning is not None
    assert "the stream's rounds differ by 30%" in found.warning


def test_one_line_has_everything_that_was_seen() -> None:
    found = judged(after=replace(AFTER, busy=1040.0, steal=54.0), times={"twin": (30.0, 60.0)}, stream=(10.0, 30.0))
    assert found.warning is not None
    assert "\n" not in found.warning
    for word in ("'twin'", "stream", "other processes", "host", "quote ratios only"):
        assert word in found.warning


def test_without_counters_the_load_before_is_what_tells() -> None:
    blind = {"busy": None, "steal": None}
    before, after = replace(BEFORE, **blind), replace(AFTER, **blind)
    assert judged(before=before, after=after).warning is None
    found = judged(before=replace(before, load=3.0), after=after)
    assert (found.other_processes, found.steal) == (None, None)
    assert found.warning is not None
    assert "load average was 3.0 on 4 CPUs" in found.warning
    assert judged(before=replace(BEFORE, load=3.0)).warning is None  # counters know better


STAT = """cpu  1000 100 500 9000 70 30 20 40 900 0
cpu0 500 50 250 4500 35 15 10 20 450 0
cpu1 500 50 250 4500 35 15 10 20 450 0
intr 12
"""


def test_a_reading_leaves_out_idle_and_guests_which_are_in_user(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text(STAT)
    found = Reading.now(tmp_path / "stat")
    tick = 1 / os.sysconf("SC_CLK_TCK")
    assert (found.cpus, found.busy, found.steal) == (2, pytest.approx(1650 * tick), pytest.approx(40 * tick))


@pytest.mark.parametrize("content", [None, "", "cpu  1 2 3\n"])
def test_a_system_that_does_not_tell_has_none(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "stat").write_text(content)
    found = Reading.now(tmp_path / "stat")
    assert (found.busy, found.steal) == (None, None)
    assert found.cpus >= 1
