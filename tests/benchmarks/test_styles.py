# SPDX-License-Identifier: Apache-2.0
"""Both styles side by side: who is compared, what the tables say, and that nothing is measured twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.decoding import Round
from benchmarks.rounds import Asked, Ledger
from benchmarks.styles import __main__ as styles
from benchmarks.styles import parts, quality, table
from benchmarks.styles.contestants import BLOCK, Contestant, contestants, timed
from shadowc.checkpoint.opt import OptFacts, published_config
from shadowc.compiler import compile as compile_engine
from shadowc.measure.evaluate import METHODS
from shadowc.sparsity.networks import BUDGET, byte_share, cost_share
from tests.benchmarks.samples import sample
from tests.conftest import TOKENIZER_TEXT
from tests.e2e import compiled
from tests.e2e.conftest import sparse_engine, stage_cache

__all__ = ["sparse_engine", "stage_cache"]

SETTINGS = ("dense", "0.5/0.5", "0.5/0.2")
ASKED = Asked("int8", "token", SETTINGS, tokens=4, threads=2)
NAMES = ["shadow-1024", "dejavu-1024", "dejavu-160", "shadow+-128"]
BYTES = {"shadow-1024": 17e6, "dejavu-1024": 109e6, "dejavu-160": 17e6, "shadow+-128": 33e6}
TWO = (Contestant("shadow", 32), Contestant("dejavu", 32))


@pytest.mark.parametrize(("name", "width"), [("opt-1.3b", 1024), ("opt-6.7b", 1024)])
def test_dejavu_runs_at_the_width_and_at_the_bytes_of_shadow(name: str, width: int) -> None:
    facts = OptFacts.from_config(published_config(name), name)
    shadow, wide, narrow = contestants(facts, width)
    assert (shadow.style, shadow.width, wide.style, wide.width) == ("shadow", width, "dejavu", width)
    share = cost_share(facts, BLOCK, width)
    assert cost_share(facts, BLOCK, narrow.width, "dejavu") == pytest.approx(share, rel=0.1)
    assert cost_share(facts, BLOCK, width, "dejavu") > 4 * share


def test_shadow_plus_is_timed_as_it_is_compiled_by_default() -> None:
    facts = OptFacts.from_config(published_config("opt-1.3b"), "opt-1.3b")
    *published, plus = timed(facts, 1024)
    assert tuple(published) == contestants(facts, 1024)
    assert (plus.style, plus.block) == ("shadow+", 1)
    assert byte_share(facts, 1, plus.width) <= BUDGET < byte_share(facts, 1, plus.width + 32)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Two rounds; a predictor's bytes cost what they cost at 30 GB/s."""
    made = Ledger(tmp_path / "opt-1.3b.json", ASKED)
    for name in NAMES:
        made.note(
            name, predictor_bytes=BYTES[name], dense_bytes=1300e6,
            parts={text: {"predictor": 0.1, "selection": 0.02, "ms_per_token": 25.0} for text in SETTINGS[1:]},
        )  # fmt: skip
        for _ in range(2):
            times = {"dense": 40.0, "0.5/0.5": 25 + BYTES[name] / 30e6, "0.5/0.2": 15 + BYTES[name] / 30e6}
            made.add(name, Round(30e9, None, {text: sample(ms, 1e9) for text, ms in times.items()}))
    return made


def test_the_table_holds_bytes_times_and_parts(ledger: Ledger) -> None:
    lines = table.speed(NAMES, ledger, "opt-1.3b").splitlines()
    (wide,) = [line.split(" | ") for line in lines if line.startswith("| dejavu-1024")]
    assert wide[1:6] == ["109.0", "8.4%", "40.00", "28.63 (1.40x)", "18.63 (2.15x)"]
    assert wide[6] == "10.0% + 2.0% (3.00 ms)"


def test_what_is_there_is_not_measured_again(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("measure", "_compile"):
        monkeypatch.setattr(styles, name, lambda *_: pytest.fail("it was made again"))
    monkeypatch.setattr(parts, "in_process", lambda *_: pytest.fail("it was profiled again"))
    monkeypatch.setattr(styles, "threads_of", lambda _: 2)
    arguments = ["--only", "speed", "--rounds", "2", "--tokens", "4", "--out", str(ledger.path.parent)]
    assert styles.main(arguments) == 0
    written = (ledger.path.parent / "styles.md").read_text()
    assert capsys.readouterr().out == written
    assert all(f"| {name} |" in written for name in NAMES)


def test_parts_of_a_token_are_profiled_at_every_setting(sparse_engine: Path) -> None:
    found = parts.profiled(sparse_engine, SETTINGS[1:], threads=1)
    assert list(found) == ["0.5/0.5", "0.5/0.2"]
    assert all(one["predictor"] > 0 and one["selection"] > 0 and one["other"] == 0 for one in found.values())


def test_quality_of_both_styles_is_found_once_and_shown_beside_the_controls(
    tiny_checkpoint: Path, stage_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quick(taught: quality.Taught, model: str, out: Path) -> Any:
        contestant = taught.contestant
        learning = {"style": contestant.style, "labels": taught.labels, "width": contestant.width, "epochs": 1}
        collecting = compiled.COLLECT.model_copy(update={"criterion": taught.criterion})
        train = compiled.TRAIN.model_copy(update=learning)
        return compiled.options(model, out, scope=taught.scope, train=train, collect=collecting)

    made = []
    monkeypatch.setattr(quality, "options_of", quick)
    text, said = " ".join(TOKENIZER_TEXT), []
    monkeypatch.setattr(quality.shadowc, "compile", lambda options: made.append(1) or compile_engine(options))
    for _ in range(2):
        content = quality.measure(str(tiny_checkpoint), TWO, text, SETTINGS[1:], tmp_path, said.append)
    assert len(made) == len(said) == len(content["rows"]) == 6
    shown = table.quality(content)
    # controls of the ranking over all layers, and of the one within layers
    for method in METHODS[1:]:
        assert shown.count(f"| {method} | - |") == 2
    assert shown.count("| dejavu-32 | top, activation | local |") == 1
    assert "| layer 3 |" in shown
    rows = json.loads((tmp_path / "quality.json").read_text())["rows"]
    sizes = {name.split("-")[0]: row["predictor_bytes"] for name, row in rows.items()}
    factors = 3 * (2 * 32 + 4 + 16)  # of rows, which the operator of a layer has
    assert sizes["dejavu"] - sizes["shadow"] == (2 * 2 * (32 * 64 + 32) + factors) * 4
    with pytest.raises(ValueError, match="name another --out"):
        quality.measure(str(tiny_checkpoint), TWO, "another text", SETTINGS[1:], tmp_path, said.append)
