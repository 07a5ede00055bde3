# SPDX-License-Identifier: Apache-2.0
"""Progress: events in the right order, and views that stay quiet when work is short."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from shadowc.cli.views import LINE_SECONDS, QUIET_SECONDS, LiveLine, PlainLines, done_text
from shadowc.spec.progress import Event, EventProgress, NullProgress, Progress


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def work(progress: Progress) -> None:
    with progress.stage("outer"):
        progress.note("found", layers=8)
        with progress.stage("inner"):
            progress.advance(1, 4, "layers")


def test_events_carry_the_open_stages_in_order() -> None:
    events: list[Event] = []
    work(EventProgress(events.append, clock=Clock()))
    assert [(event.kind, event.stage) for event in events] == [
        ("begin", ("outer",)),
        ("note", ("outer",)),
        ("begin", ("outer", "inner")),
        ("advance", ("outer", "inner")),
        ("end", ("outer", "inner")),
        ("end", ("outer",)),
    ]
    assert events[1].fields == {"layers": 8}


def test_a_stage_that_raises_is_reported_as_failed_and_closed() -> None:
    events: list[Event] = []
    progress = EventProgress(events.append, clock=Clock())
    with pytest.raises(ValueError, match="no"), progress.stage("outer"):
        raise ValueError("no")
    progress.advance(1, 1)
    assert [(event.kind, event.stage) for event in events] == [
        ("begin", ("outer",)),
        ("failed", ("outer",)),
        ("advance", ()),
    ]


def test_null_progress_accepts_everything() -> None:
    work(NullProgress())


def plain() -> tuple[list[str], Clock, EventProgress]:
    lines: list[str] = []
    clock = Clock()
    return lines, clock, EventProgress(PlainLines(lines.append, clock).show, clock)


def test_plain_lines_say_nothing_about_short_work() -> None:
    lines, clock, progress = plain()
    with progress.stage("trace"):
        progress.advance(1, 2)
        clock.now += QUIET_SECONDS / 2
    assert lines == []


def test_plain_lines_name_each_long_outer_stage_once() -> None:
    lines, clock, progress = plain()
    with progress.stage("collect"), progress.stage("inner"):
        clock.now += 2 * QUIET_SECONDS
    assert lines == ["collect: 4.0 s"]


def test_plain_lines_give_a_sign_of_life() -> None:
    lines, clock, progress = plain()
    with progress.stage("collect"):
        for done in range(1, 5):
            clock.now += LINE_SECONDS / 2
            progress.advance(done * 1000, 4096, "positions")
    assert lines == ["collect: 2,000 of 4,096 positions", "collect: 4,000 of 4,096 positions", "collect: 30.0 s"]


def test_plain_lines_tell_where_a_long_stage_stopped() -> None:
    lines, clock, progress = plain()
    stage = progress.stage("collect")
    stage.__enter__()
    clock.now += 5
    stage.__exit__(ValueError, ValueError("no"), None)
    assert lines == ["collect: stopped after 5.0 s"]


def test_plain_lines_tell_what_a_stage_notes_at_once() -> None:
    lines, _, progress = plain()
    with progress.stage("trace"):
        progress.note("waits for another process")
    progress.note("no stage is open")
    assert lines == ["trace: waits for another process", "no stage is open"]


def test_live_line_leaves_nothing_behind_when_work_is_short() -> None:
    stream = io.StringIO()
    view = LiveLine(Console(file=stream, force_terminal=True, width=80))
    work(EventProgress(view.show))
    view.close()
    assert stream.getvalue() in ("", "\n")


def test_live_line_survives_unknown_totals_and_closing_without_work() -> None:
    view = LiveLine(Console(file=io.StringIO(), force_terminal=True, width=80))
    view.close()
    assert done_text(Event("advance", ("a",), done=1200)) == "1,200"
