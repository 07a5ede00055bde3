# SPDX-License-Identifier: Apache-2.0
"""One round of decoding, and the file that keeps rounds: what is measured, what is not measured twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import decoding
from benchmarks.decoding import Round, Setting, one_round
from benchmarks.rounds import Asked, Ledger, LedgerError, above, figures, measure, surroundings
from shadowc.measure import settings
from shadowc.runtime.load import read_manifest
from shadowc.spec.density import Density
from tests.benchmarks.samples import sample
from tests.e2e.conftest import sequence_engine, sparse_engine, stage_cache

__all__ = ["sequence_engine", "sparse_engine", "stage_cache"]

ASKED = Asked("fp32", "token", ("dense", "0.5/0.2"), tokens=4, threads=1)
ROUNDING = 1e-9


@pytest.fixture(autouse=True)
def short_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of this process measure the stream over 1 MiB: its speed is no matter here."""
    monkeypatch.setattr(decoding, "STREAM_BYTES", 1 << 20)


def a_round(stream: float, **samples: tuple[float, float]) -> Round:
    return Round(stream, None, {name: sample(*each, (stream, stream)) for name, each in samples.items()})


@pytest.mark.parametrize(
    ("text", "density", "skip_zeros"),
    [
        ("dense", None, False),
        ("dense+zeros", None, True),
        ("0.5/0.2", Density(0.5, 0.2), False),
        ("1/0+zeros", Density(1.0, 0.0), True),
    ],
)
def test_a_setting_is_the_twin_or_a_density(text: str, density: Density | None, skip_zeros: bool) -> None:
    assert Setting.parse(text) == Setting(density, skip_zeros)


@pytest.mark.parametrize("text", ["", "0.5", "0.5/1.1", "dense/0.5", "0.5/0.5+zero", "sparse"])
def test_what_is_no_setting_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected dense or HEADS/NEURONS"):
        Setting.parse(text)


@pytest.mark.parametrize("engine", ["sparse_engine", "sequence_engine"])
def test_a_round_has_the_bytes_of_each_setting(engine: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(engine)
    found = one_round(folder, ["dense", "1/1", "0.5/0.2", "dense+zeros"], turn=0, tokens=4, threads=1)
    fixed = read_manifest(folder).bytes_per_token
    sizes = {name: sample.size for name, sample in found.samples.items()}
    assert sizes["dense"] == fixed.records + fixed.lm_head + fixed.other
    assert sizes["0.5/0.2"] < sizes["1/1"]
    assert sizes["dense+zeros"] < sizes["dense"]
    assert min(sample.ms for sample in found.samples.values()) > 0
    assert found.stream > 0


def test_settings_of_a_large_model_take_turns_and_each_has_the_pace_of_its_moment(
    sparse_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"turn": 0, "tokens": 6, "threads": 1}
    at_once = one_round(sparse_engine, ["dense"], **asked).samples["dense"]
    assert [turn.tokens for turn in at_once.turns] == [6]
    monkeypatch.setattr(settings, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(settings, "PACE_BYTES", 1 << 20)
    found = one_round(sparse_engine, ["dense", "0.5/0.2"], **asked)
    dense, sparse = (found.samples[name].turns for name in ("dense", "0.5/0.2"))
    assert [turn.tokens for turn in dense] == [turn.tokens for turn in sparse] == [4, 2]
    assert [dense[0].paces[1], sparse[0].paces[1], dense[1].paces[1]] == [
        sparse[0].paces[0], dense[1].paces[0], sparse[1].paces[0],
    ]  # fmt: skip
    assert found.samples["dense"].size == at_once.size


def test_more_tokens_than_there_is_room_for_are_refused(sparse_engine: Path) -> None:
    with pytest.raises(ValueError, match=r"47 tokens behind 16: .* has room for 64 in all"):
        one_round(sparse_engine, ["dense"], turn=0, tokens=47)


def test_every_round_has_a_prompt_of_its_own(sparse_engine: Path) -> None:
    sizes = {
        one_round(sparse_engine, ["dense+zeros"], turn=turn, tokens=8).samples["dense+zeros"].size for turn in (0, 1, 2)
    }
    assert len(sizes) > 1  # other tokens, other zeros


def test_a_round_in_a_process_of_its_own_is_the_same(sparse_engine: Path) -> None:
    here = one_round(sparse_engine, ASKED.settings, turn=3, tokens=4, threads=1)
    there = measure(sparse_engine, ASKED, 3, "env SHADOWC_UNUSED=1")
    assert {name: one.size for name, one in there.samples.items()} == {
        name: one.size for name, one in here.samples.items()
    }


def test_a_round_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"round 2 of .* failed \(exit status 1\): .*no engine"):
        measure(tmp_path, ASKED, 1)


def test_rounds_are_found_again(tmp_path: Path) -> None:
    first = a_round(10e9, dense=(4.0, 2e6))
    second = a_round(20e9, dense=(3.0, 2e6))
    Ledger(tmp_path / "x.json", ASKED).add("opt-x", first)
    Ledger(tmp_path / "x.json", ASKED).add("opt-x", second)
    assert Ledger(tmp_path / "x.json", ASKED).rounds("opt-x") == [first, second]
    assert Ledger(tmp_path / "x.json", ASKED).rounds("opt-y") == []


@pytest.mark.parametrize(
    "changed", [{"tokens": 5}, {"mask": "sequence"}, {"settings": ("dense",)}, {"weights": "int8"}]
)
def test_rounds_of_other_options_are_not_mixed(tmp_path: Path, changed: dict[str, object]) -> None:
    Ledger(tmp_path / "x.json", ASKED).add("opt-x", a_round(10e9, dense=(4.0, 2e6)))
    with pytest.raises(LedgerError, match="name another --out"):
        Ledger(tmp_path / "x.json", replace(ASKED, **changed))  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["machine", "launcher", "library"])
def test_rounds_of_another_machine_launcher_or_library_are_not_mixed(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x.json"
    ledger = Ledger(path, ASKED)
    ledger.require_same("chrt -f 50")
    ledger.add("opt-x", a_round(10e9, dense=(4.0, 2e6)))
    Ledger(path, ASKED).require_same("chrt -f 50")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, what: "another"}))
    with pytest.raises(LedgerError, match=f"has rounds of {what} another; here it is"):
        Ledger(path, ASKED).require_same("chrt -f 50")
    del content[what]  # as files of before have none
    path.write_text(json.dumps(content))
    Ledger(path, ASKED).require_same("chrt -f 50")


def test_ratios_and_floors_are_taken_within_each_round() -> None:
    rounds = [
        a_round(10e9, dense=(10.0, 9e6), sparse=(20.0, 9e6)),
        a_round(20e9, dense=(20.0, 9e6), sparse=(10.0, 9e6)),
        a_round(40e9, dense=(90.0, 9e6), sparse=(45.0, 9e6)),
    ]
    found = figures(rounds, "sparse", "dense")
    assert found.ratio == pytest.approx(0.5, abs=ROUNDING)  # of 2, 0.5, 0.5; the medians alone would say 1
    assert found.floor_ms == pytest.approx(0.5, abs=ROUNDING)  # 9 MB at 0.9 of 20 GB/s
    assert (found.ms, found.lowest, found.highest) == (20.0, 10.0, 45.0)


def test_the_floor_is_of_each_turn_and_what_is_above_it_of_turns_at_a_steady_pace() -> None:
    found = Round(10e9, None, {"dense": sample(3.0, 9e6, (10e9, 10e9), (10e9, 30e9), (5e9, 5e9))})
    shown = figures([found], "dense", "dense")
    assert shown.floor_ms == pytest.approx((1 + 0.5 + 2) / 3, abs=ROUNDING)
    assert shown.above_ms == pytest.approx((2 + 1) / 2, abs=ROUNDING)
    moved = Round(10e9, None, {"dense": sample(3.0, 9e6, (10e9, 30e9))})
    assert above(figures([moved], "dense", "dense")) == ""


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    Ledger(tmp_path / "x.json", ASKED).add("opt-x", a_round(10e9, dense=(4.0, 2e6)))
    content = json.loads((tmp_path / "x.json").read_text())
    del content["format"]
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(LedgerError, match="was written by another version: name another --out"):
        Ledger(tmp_path / "x.json", ASKED)


def test_the_foot_of_a_table_has_the_streams_of_all_engines(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "x.json", ASKED)
    ledger.add("opt-x", a_round(10e9, dense=(4.0, 2e6)))
    ledger.add("opt-y", a_round(30e9, dense=(4.0, 2e6)))
    assert "20.0 GB/s (10.0 to 30.0)" in surroundings(ledger)
