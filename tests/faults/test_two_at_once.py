# SPDX-License-Identifier: Apache-2.0
"""Two compiles of the same thing at the same time: one result, and both end well."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from shadowc.stages import Stages
from tests.faults.process import Place, entries


def test_two_that_write_the_same_engine_make_it_once(whole_tiny: Place, tmp_path: Path) -> None:
    place = Place(tmp_path / "run", whole_tiny.model)
    shutil.copytree(whole_tiny.cache, place.cache)
    ended = [started.wait() for started in (place.start(), place.start())]
    assert [run.code for run in ended] == [0, 0], [run.errors for run in ended]
    assert sorted(f"{place.out} is up to date\n" in run.output for run in ended) == [False, True]
    assert place.left() == whole_tiny.left()
    assert place.leftovers() == []


def test_an_engine_that_another_process_finished_while_this_one_traced_is_not_written_again(
    whole_tiny: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(tmp_path / "run", whole_tiny.model)
    shutil.copytree(whole_tiny.cache, place.cache)
    found = Stages.programs
    written: list[int] = []

    def overtaken(stages: Stages, *given: Any) -> Any:
        """The trace of this process, within which all of the other one takes place."""
        monkeypatch.setattr(Stages, "programs", found)
        programs = stages.programs(*given)
        place.run_here()
        written.append((place.out / "engine.json").stat().st_ino)
        return programs

    monkeypatch.setattr(Stages, "programs", overtaken)
    place.run_here()
    assert written == [(place.out / "engine.json").stat().st_ino]
    assert place.left() == whole_tiny.left()


@pytest.mark.slow
def test_two_that_begin_with_an_empty_cache_make_every_stage_once(whole_tiny: Place, tmp_path: Path) -> None:
    place = Place(tmp_path / "run", whole_tiny.model)
    ended = [started.wait() for started in (place.start(), place.start())]
    assert [run.code for run in ended] == [0, 0], [run.errors for run in ended]
    assert sorted(f"{place.out} is up to date\n" in run.output for run in ended) == [False, True]
    assert place.left() == whole_tiny.left()
    assert dict(entries(place.cache)) == dict(entries(whole_tiny.cache))
    assert place.leftovers() == []


@pytest.mark.slow
def test_two_with_caches_of_their_own_leave_one_whole_engine(whole_tiny: Place, tmp_path: Path) -> None:
    """They do not know of each other; the later one's folder stays, and it has the same bytes."""
    place = Place(tmp_path / "run", whole_tiny.model)
    caches = [shutil.copytree(whole_tiny.cache, tmp_path / name) for name in ("one", "two")]
    ended = [run.wait() for run in [place.start(SHADOWC_CACHE=str(cache)) for cache in caches]]
    assert [run.code for run in ended] == [0, 0], [run.errors for run in ended]
    assert place.left() == whole_tiny.left()
    assert place.leftovers() == []
