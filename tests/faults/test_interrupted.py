# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C, and a signal to stop: what is kept and how to go on is said, and nothing half done stays."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.faults.process import STAGES, Ended, Moment, Place, entries, incomplete, moments
from tests.faults.test_killed import with_cache_up_to

SAID = (
    "interrupted; no engine is left half written, and finished stages stay in the cache\n"
    "next: type the same command again, it goes on from there\n"
)


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(whole_tiny: Place, tmp_path: Path) -> None:
    place = Place(tmp_path / "run", whole_tiny.model)
    with_cache_up_to("emit", whole_tiny, place)
    ended = place.run(Moment("emit", 5, signal=signal.SIGINT))
    assert (ended.code, ended.errors, ended.output) == (130, SAID, "")
    assert place.left() == {}
    assert place.leftovers() == []
    assert dict(entries(place.cache)) == dict(entries(whole_tiny.cache))


@pytest.mark.slow
def test_a_signal_to_stop_says_the_same(whole_tiny: Place, tmp_path: Path) -> None:
    place = Place(tmp_path / "run", whole_tiny.model)
    with_cache_up_to("emit", whole_tiny, place)
    ended = place.run(Moment("emit", 5, signal=signal.SIGTERM))
    assert (ended.code, ended.errors) == (143, SAID.replace("interrupted", "stopped"))
    assert place.leftovers() == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", STAGES)
def test_opt_mini_interrupted_at_seeded_moments_of_a_stage(
    whole_mini: tuple[Place, Ended], tmp_path: Path, stage: str
) -> None:
    whole, undisturbed = whole_mini
    place = Place(tmp_path / "run", whole.model)
    with_cache_up_to(stage, whole, place)
    for number, moment in enumerate(moments(undisturbed, stage, 2, seed=1, signal=signal.SIGINT)):
        ended = place.run(moment)
        if number == 0 or ended.code:  # the second one may come when all is done
            assert (ended.code, ended.errors) == (130, SAID)
            assert ended.stage == stage or number
        assert place.left() in ({}, whole.left())
        assert place.leftovers() == []
        assert incomplete(place.cache) == []
