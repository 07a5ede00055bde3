# SPDX-License-Identifier: Apache-2.0
"""Two recordings of the same trace at once: one after the other, so that they do not write into each other."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from shadowc.checkpoint.resolve import Checkpoint
from shadowc.sparsity.collect import collect
from shadowc.sparsity.importance import Origin
from shadowc.sparsity.workflow import record
from shadowc.spec.options import CollectOptions
from shadowc.spec.progress import Event, EventProgress
from shadowc.stage_cache import StageCache

PATIENCE = 60.0


def test_a_recording_waits_for_one_to_the_same_place_and_says_so(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHADOWC_CACHE", str(tmp_path / "cache"))
    text, out = tmp_path / "text.txt", tmp_path / "tiny.trace"
    text.write_text("The dog reads one record, and the fox jumps over neurons. " * 60)
    entered, leave, order = threading.Event(), threading.Event(), []

    def other() -> None:
        with StageCache().alone(f"trace {out}"):
            entered.set()
            assert leave.wait(PATIENCE)
            order.append("other")

    def hear(event: Event) -> None:
        if event.kind == "note" and "waits for another process that records" in event.text:
            leave.set()
        if event.kind == "advance" and event.unit == "positions":
            order.append("ours")

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(PATIENCE)
    origin = Origin(str(tiny_checkpoint))
    trace = record(origin, CollectOptions(data=str(text), positions=32, length=32), out, EventProgress(hear))
    thread.join(PATIENCE)
    assert order[0] == "other"
    assert set(order[1:]) == {"ours"}
    assert trace.folder == out


@pytest.mark.parametrize(("seed", "again"), [(0, False), (1, True)], ids=["the same", "another seed"])
def test_what_the_other_has_recorded_is_not_recorded_again(
    checkpoint: Checkpoint,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
    again: bool,
) -> None:
    monkeypatch.setenv("SHADOWC_CACHE", str(tmp_path / "cache"))
    text, out = tmp_path / "text.txt", tmp_path / "tiny.trace"
    text.write_text("The dog reads one record, and the fox jumps over neurons. " * 60)
    options = CollectOptions(data=str(text), positions=32, length=32)
    entered, leave, recorded = threading.Event(), threading.Event(), []

    def other() -> None:
        with StageCache().alone(f"trace {out}"):
            entered.set()
            assert leave.wait(PATIENCE)
            collect(checkpoint, options.model_copy(update={"seed": seed}), out)

    def hear(event: Event) -> None:
        if event.kind == "note" and "waits for another process that records" in event.text:
            leave.set()
        if event.kind == "advance" and event.unit == "positions":
            recorded.append(event)

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(PATIENCE)
    trace = record(Origin(str(tiny_checkpoint)), options, out, EventProgress(hear))
    thread.join(PATIENCE)
    assert bool(recorded) is again
    assert trace.meta["seed"] == options.seed
    assert len(trace.position_M) == 32
