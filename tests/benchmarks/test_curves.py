# SPDX-License-Identifier: Apache-2.0
"""Curves: what is a point, what the table says, what is left out, and that the plots are drawn."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.curves import __main__ as curves
from benchmarks.curves import drawing
from benchmarks.curves.series import Series, series, table
from benchmarks.decoding import Round
from benchmarks.rounds import Asked, Ledger
from shadowc.spec.errors import SetupError
from tests.benchmarks.samples import sample

SETTINGS = ("dense", "1/1", "0.2/0.2", "0.5/0.5", "0.5/0.2")
ASKED = Asked("int8", "token", SETTINGS, tokens=4, threads=2)
PNG = b"\x89PNG\r\n\x1a\n"
DENSE_BYTES = {"opt-a": 126e6, "opt-b": 1319e6, "opt-c": 2690e6, "opt-d": 6710e6}
SHARES = {"dense": 1.0, "1/1": 1.02, "0.2/0.2": 0.4, "0.5/0.5": 0.65, "0.5/0.2": 0.5}


@pytest.fixture
def drawable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Curves are measured as if they could be drawn, with or without matplotlib."""
    monkeypatch.setattr(curves.plot, "require", lambda: None)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """Two rounds of four models at 30 GB/s, each token 1.2 times as long as its bytes at 0.9 of the stream."""
    made = Ledger(tmp_path / "curves.json", ASKED)
    for model, size in DENSE_BYTES.items():
        for noise in (1.0, 1.1):
            samples = {
                text: sample(1.2 * noise * share * size / (0.9 * 30e9) * 1e3, share * size)
                for text, share in SHARES.items()
            }
            made.add(model, Round(30e9, 0.99, samples))
    return made


def test_the_ladder_has_equal_shares_in_order(ledger: Ledger) -> None:
    found = series("opt-b", ledger)
    assert [share for share, _ in found.ladder()] == [0.2, 0.5, 1.0]
    assert list(found.at) == ["1/1", "0.2/0.2", "0.5/0.5", "0.5/0.2"]
    assert found.twin.size == DENSE_BYTES["opt-b"]


def test_the_table_has_the_distance_to_the_floor_and_the_speed_over_the_twin(ledger: Ledger) -> None:
    text = table([series("opt-a", ledger)], ledger).markdown
    (row,) = [line.split(" | ") for line in text.splitlines() if "| 0.5/0.2 |" in line]
    above = (1.2 * 1.05 - 1) * 63 / (0.9 * 30)  # 1.2 times the mean of 1 and 1.1; MB at GB/s
    assert row[-2:] == [f"{above:.2f}", "2.00x |"]  # half of the bytes
    assert "2 of opt-a" in text


@pytest.mark.usefixtures("drawable")
def test_a_model_that_is_not_handled_is_left_out_and_named(tmp_path: Path) -> None:
    model = tmp_path / "opt-gelu"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "opt", "activation_function": "gelu"}))
    arguments = ["--models", str(model), "--out", str(tmp_path), "--densities", "0.5/0.5"]
    with pytest.raises(SystemExit):  # nothing is measured
        curves.main(arguments)
    left = Ledger(tmp_path / "curves.json", Asked("int8", "token", ("dense", "0.5/0.5"), 16, curves.threads_of(None)))
    left.add("opt-x", Round(30e9, None, {"dense": sample(1.0, 1e6), "0.5/0.5": sample(1.0, 1e6)}))
    assert f"{model} is left out: " in table([series("opt-x", left)], left).markdown


@pytest.mark.usefixtures("drawable")
def test_rounds_that_are_there_are_not_measured_again(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(drawing, "against_density", lambda *_: drawn.append("density"))
    monkeypatch.setattr(drawing, "against_size", lambda *_: drawn.append("size"))
    monkeypatch.setattr(curves, "measure", lambda *_: pytest.fail("it was measured"))
    monkeypatch.setattr(curves, "threads_of", lambda _: 2)
    arguments = ["--models", "opt-a,opt-b", "--rounds", "2", "--tokens", "4", "--densities", ",".join(SETTINGS[1:])]
    assert curves.main([*arguments, "--out", str(ledger.path.parent)]) == 0
    assert drawn == ["density", "size"]
    assert capsys.readouterr().out.count("| opt-b |") == len(SETTINGS)


@pytest.mark.usefixtures("drawable")
def test_an_engine_that_the_disk_has_no_room_for_is_refused_before_it_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(curves.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 5 * 10**9})())
    monkeypatch.setattr(curves, "compile_dummy", lambda *_, **__: pytest.fail("it was compiled"))
    with pytest.raises(SystemExit):
        curves.main(["--models", "opt-6.7b", "--out", str(tmp_path)])
    assert "has 5.0 GB free, expected 9.5" in capsys.readouterr().err


@pytest.mark.parametrize("models", [1, 4])
def test_both_plots_are_pictures(ledger: Ledger, tmp_path: Path, models: int) -> None:
    pytest.importorskip("matplotlib", reason="the plots need matplotlib: pip install 'shadowc[plot]'")
    found: list[Series] = [series(model, ledger) for model in list(DENSE_BYTES)[:models]]
    for draw in (drawing.against_density, drawing.against_size):
        draw(found, "a machine, loaded", tmp_path / "plot.png")
        assert (tmp_path / "plot.png").read_bytes().startswith(PNG)
        (tmp_path / "plot.png").unlink()


def test_a_plot_without_matplotlib_names_the_command(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SetupError, match="matplotlib is not installed") as raised:
        drawing.against_size([series("opt-a", ledger)], "", tmp_path / "plot.png")
    assert "shadowc[plot]" in str(raised.value.hint)


def test_curves_that_cannot_be_drawn_are_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit):
        curves.main(["--models", "opt-125m", "--out", str(tmp_path / "curves")])
    assert "matplotlib is not installed: pip install" in capsys.readouterr().err
    assert not (tmp_path / "curves").exists()
