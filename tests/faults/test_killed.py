# SPDX-License-Identifier: Apache-2.0
"""`kill -9` at any moment of a compile leaves its output absent or complete; the next run ends with the same bytes."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.faults.process import STAGES, Ended, Moment, Place, Tree, entries, incomplete, moments

SEED = 0
COUNTS = {"": 3, "checkpoint": 2, **dict.fromkeys(STAGES[1:-1], 4), "sample": 1}
"""Stage -> moments within it."""
AFTER = (Moment("sample", 1), Moment("sample", 1, 0.002), Moment("sample", 1, 0.01))
"""When the last stage has told its end: just before, during and after the rename."""


def killed(place: Place, wanted: Sequence[Moment], whole: Place, before: Tree, **environment: str) -> list[Ended]:
    """Run and kill once per moment; after every one, what is on disk is whole."""
    cached, expected = dict(entries(whole.cache)), whole.left()
    runs = []
    for moment in wanted:
        ended = place.run(moment, **environment)
        assert ended.code in (-signal.SIGKILL, 0), ended.errors
        assert place.left() in ((before, expected) if ended.code else (expected,))
        assert incomplete(place.cache) == []
        for name, content in entries(place.cache):
            assert cached[name] == content, f"{name} is not what an undisturbed run makes"
        runs.append(ended)
    return runs


def finished(place: Place, whole: Place) -> None:
    """The next run ends well, with the same bytes, and clears what the killed ones left."""
    ended = place.run()
    assert ended.code == 0, ended.errors
    assert place.left() == whole.left()
    assert dict(entries(place.cache)) == dict(entries(whole.cache))
    assert place.leftovers() == []


def with_cache_up_to(stage: str, whole: Place, place: Place) -> None:
    """Give the place what the whole run had cached before this stage, and the trace, which needs none of them."""
    later = STAGES[STAGES.index(stage) :] if stage in STAGES else STAGES if stage == "" else ()
    shutil.copytree(whole.cache, place.cache)
    for name in {"collect": ("collect", "train"), "": (), "checkpoint": ("finite",)}.get(stage, later):
        shutil.rmtree(place.cache / name, ignore_errors=True)


@pytest.mark.parametrize("stage", ["emit", "after"])
def test_compile_killed_while_it_writes_or_renames_goes_on_to_the_same_bytes(
    whole_tiny: Place, tmp_path: Path, stage: str
) -> None:
    place = Place(tmp_path / "run", whole_tiny.model)
    with_cache_up_to("emit", whole_tiny, place)
    (ended,) = killed(place, [Moment("emit", 5) if stage == "emit" else AFTER[0]], whole_tiny, before={})
    assert (ended.code, ended.stage) == (-signal.SIGKILL, stage)
    assert len(place.leftovers()) == 1
    if stage == "emit":
        finished(place, whole_tiny)


def test_an_engine_written_in_its_place_would_be_noticed(whole_tiny: Place, tmp_path: Path) -> None:
    place = Place(tmp_path / "run", whole_tiny.model)
    with_cache_up_to("emit", whole_tiny, place)
    with pytest.raises(AssertionError, match="left"):
        killed(place, [Moment("emit", 5)], whole_tiny, {}, PLANTED="written in its place")
    assert place.left()


def test_an_entry_of_the_cache_that_was_cut_would_be_noticed(whole_tiny: Place, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(whole_tiny.cache, cache)
    assert incomplete(cache) == []
    (graph,) = cache.glob("trace/*/model.onnx")
    graph.write_bytes(graph.read_bytes()[:-1])
    assert incomplete(cache) == [f"trace/{graph.parent.name}"]


def test_thirty_moments_lie_over_all_stages() -> None:
    assert sum(COUNTS.values()) == 30
    assert set(COUNTS) == {"", *STAGES}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", COUNTS, ids=lambda stage: stage or "start")
def test_opt_mini_killed_at_seeded_moments_of_a_stage(
    whole_mini: tuple[Place, Ended], tmp_path: Path, stage: str
) -> None:
    whole, undisturbed = whole_mini
    place = Place(tmp_path / "run", whole.model)
    with_cache_up_to(stage, whole, place)
    runs = killed(place, moments(undisturbed, stage, COUNTS[stage], SEED), whole, before={})
    assert runs[0].stage == stage
    assert runs[0].code == -signal.SIGKILL
    finished(place, whole)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_opt_mini_killed_while_it_replaces_an_older_engine(whole_mini: tuple[Place, Ended], tmp_path: Path) -> None:
    """The older engine or the new one stands there, never a mixture and never nothing."""
    whole, _ = whole_mini
    place = Place(tmp_path / "run", whole.model)
    shutil.copytree(whole.cache, place.cache)
    older = Place(tmp_path / "run", whole.model, width=64)
    assert older.run().code == 0
    with_older = dict(entries(place.cache))
    assert (before := older.left()) != whole.left()
    kept = shutil.copytree(place.out, tmp_path / "kept")
    for moment in AFTER:
        shutil.rmtree(place.out)
        shutil.copytree(kept, place.out)
        ended = place.run(moment)
        assert ended.code in (-signal.SIGKILL, 0), ended.errors
        assert ended.stage == "after"
        assert place.left() in (before, whole.left())
    assert place.run().code == 0
    assert place.left() == whole.left()
    assert place.leftovers() == []
    assert dict(entries(place.cache)) == with_older
