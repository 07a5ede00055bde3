# SPDX-License-Identifier: Apache-2.0
"""`shadowc bench`: its tables, its JSON, its plot, and what it refuses before it measures."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import pytest

from shadowc.cli import bench_tables
from shadowc.measure import settings
from shadowc.runtime.library import OpLibrary
from tests.cli.conftest import Shadowc

QUICK = ("--rounds", "1", "--tokens", "3")
SUFFIX = ", skip zeros"


@pytest.fixture(autouse=True)
def short_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast the stream is does not matter here."""
    monkeypatch.setattr(settings, "STREAM_BYTES", 1 << 20)


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where a measurement starts."""
    monkeypatch.setattr("shadowc.measure.bench.bench", lambda *_, **__: pytest.fail("it was measured"))


def test_bench_measures_every_density_with_and_without_skipping_zeros(shadowc: Shadowc, engine: Path) -> None:
    result = shadowc("bench", engine, "--densities", "1,0.5", *QUICK, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [(row["label"].split(",")[0], row["skip_zeros"]) for row in found["rows"]] == [
        (label, flag) for label in ("dense twin", "1 heads", "0.5 heads") for flag in (False, True)
    ]
    assert found["rows"][0]["speedup"] == 1.0
    assert found["rows"][4]["megabytes_per_token"] < found["rows"][0]["megabytes_per_token"]


def test_json_holds_everything_that_is_shown(shadowc: Shadowc, engine: Path) -> None:
    found = json.loads(shadowc("bench", engine, "--densities", "0.5", *QUICK, "--json").stdout)
    row = found["rows"][0]
    assert {"floor_ms", "above_floor_ms", "ms_by_round", "mask"} <= row.keys()
    parts = ("predictor", "selection", "attention", "ffn", "lm_head", "framework", "other")
    assert sum(row["shares"][part] for part in parts) == pytest.approx(1)
    assert found["prompt_tokens"] == 33
    assert found["prompts"][0].keys() == {
        "label", "skip_zeros", "mask", "first_token_ms", "ms_lowest", "ms_highest", "tokens_per_second",
    }  # fmt: skip
    assert found["load_to_first_token_seconds"] > 0
    assert {one["skip_zeros"] for one in found["break_even"]} == {False, True}
    assert found["break_even"][0]["break_even"].keys() == {"kind", "density"}
    assert found["break_even"][0]["mask_cost"] is None  # density 1 was not measured
    assert {"warning", "other_processes", "steal", "spread", "stream_spread"} <= found["noise"].keys()


def test_the_first_line_tells_how_far_two_threads_are_apart(
    shadowc: Shadowc, engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shadowc.runtime.library.OpLibrary.round_trip", lambda _: 70.4)
    monkeypatch.setattr(settings, "usable_cores", lambda: 2)
    arguments = ("bench", engine, "--densities", "0.5", "--no-skip-zeros", *QUICK)
    assert "GB/s here, two threads are 70 ns apart\n" in shadowc(*arguments, "--threads", "2").stdout
    assert "ns apart" not in shadowc(*arguments, "--threads", "1").stdout


def test_tables_show_floor_parts_first_token_and_break_even(shadowc: Shadowc, engine: Path) -> None:
    result = shadowc("bench", engine, "--densities", "0.5", "--no-skip-zeros", *QUICK)
    assert result.exit_code == 0, result.output
    for word in ("floor, ms", "above it", "LM head", "framework", "prompt of 33 tokens", "first token, ms"):
        assert word in result.stdout
    assert "floor: the bytes at 0.9 of the stream of the same round" in result.stdout
    assert "from loading the engine to the first token" in result.stdout
    assert "largest density that is faster than the dense twin" in result.stdout
    assert "0.5, the" in result.stdout
    assert "not profiled" not in result.stdout
    assert "in no column" not in result.stdout
    assert SUFFIX not in result.stdout


def test_density_1_beside_the_dense_twin_shows_what_masks_cost(shadowc: Shadowc, engine: Path) -> None:
    result = shadowc("bench", engine, "--densities", "1,0.5", "--no-skip-zeros", *QUICK)
    assert result.exit_code == 0, result.output
    assert "predictor and selection, not profiled" in result.stdout


def test_operators_that_nothing_is_known_about_are_shown(
    shadowc: Shadowc, engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shadowc.measure import shares

    monkeypatch.setattr(shares, "FRAMEWORK", shares.FRAMEWORK - {"LayerNormalization"})
    result = shadowc("bench", engine, "--densities", "0.5", "--no-skip-zeros", *QUICK)
    assert "in no column: LayerNormalization, up to " in result.stdout


def test_noise_is_one_line(shadowc: Shadowc, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shadowc.measure import noise

    arguments = ("bench", engine, "--densities", "0.5", "--no-skip-zeros", *QUICK)
    for name in ("SPREAD", "OTHERS", "STEAL"):
        monkeypatch.setattr(noise, name, float("inf"))
    assert "not quiet" not in shadowc(*arguments).stdout
    monkeypatch.setattr(noise, "OTHERS", -1.0)
    (line,) = [line for line in shadowc(*arguments).stdout.splitlines() if line.startswith("not quiet: ")]
    assert "other processes took" in line


@pytest.mark.parametrize(
    ("speeds", "memory", "few_large_pages", "told"),
    [
        ([1e3, 1e3], "shared", 0.0, True),
        ([1e3, 1e14], "shared", 0.0, False),
        ([1e3, 1e3], "private", 0.0, False),
        ([1e3, 1e3], "shared", 2.0, False),  # small pages are why
    ],
)
def test_weights_in_slow_memory_are_told(
    shadowc: Shadowc, engine: Path, monkeypatch: pytest.MonkeyPatch,
    speeds: list[float], memory: str, few_large_pages: float, told: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(settings, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(bench_tables, "ENOUGH_LARGE_PAGES", few_large_pages)
    left = iter(speeds)
    pace = settings.PACE_BYTES  # that of a moment is of other memory
    monkeypatch.setattr(OpLibrary, "stream_over", lambda *given: 1e9 if given[1].size == pace else next(left))
    quick = ("--rounds", "2", "--tokens", "3")
    result = shadowc("bench", engine, "--densities", "0.5", "--no-skip-zeros", "--memory", memory, *quick)
    assert result.exit_code == 0, result.output
    assert f"read at {sum(speeds) / 2e9:.1f} GB/s" in result.stdout
    assert (
        "of a stream before and behind each turn; above it, of stream: where both agree within a fifth" in result.stdout
    )
    assert "(100.0 % of the turns)" in result.stdout
    assert ("slower memory than the stream: compare with --memory private" in result.stdout) == told


def test_a_sweep_has_ten_densities(shadowc: Shadowc, engine: Path) -> None:
    result = shadowc("bench", engine, "--sweep", "--skip-zeros", *QUICK, "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [row["label"].removesuffix(SUFFIX) for row in rows[:2]] == ["dense twin", "1 heads, 1 neurons"]
    shares = [row["density_heads"] for row in rows[1:]]
    assert shares == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert shares == [row["density_neurons"] for row in rows[1:]]
    assert all(row["skip_zeros"] for row in rows)


@pytest.mark.usefixtures("nothing_runs")
def test_a_sweep_and_densities_exclude_each_other(shadowc: Shadowc, engine: Path) -> None:
    result = shadowc("bench", engine, "--sweep", "--densities", "0.5")
    assert result.exit_code == 2
    assert "--densities has no effect beside --sweep" in result.stderr


def test_a_plot_is_a_picture(shadowc: Shadowc, engine: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="a plot needs matplotlib: pip install 'shadowc[plot]'")
    picture = tmp_path / "curve.png"
    result = shadowc("bench", engine, "--densities", "1,0.5,0.5/0.2", *QUICK, "--plot", picture, "--json")
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert json.loads(result.stdout)["rows"]


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--plot", "curve.txt"), "a plot is a file .png"),
        (("--plot", "nowhere/curve.png"), "there is no folder nowhere"),
        (("--plot", "curve.png", "--densities", "0.5/0.2"), "as many heads as neurons"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_it_is_measured(
    shadowc: Shadowc,
    engine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = shadowc("bench", engine, *arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert "next: " in result.stderr


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("closed", ["", "curve.png"], ids=["folder", "file"])
def test_a_plot_where_nothing_may_be_written_is_refused_before_it_is_measured(
    shadowc: Shadowc, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: str
) -> None:
    plot = tmp_path / "curve.png"
    if closed:
        plot.touch()
    monkeypatch.setattr(os, "access", lambda path, mode: not (mode & os.W_OK and Path(path) == tmp_path / closed))
    result = shadowc("bench", engine, "--plot", plot)
    assert result.exit_code == 2
    assert f"cannot write {plot}: Permission denied" in result.stderr


def test_a_plot_that_cannot_be_written_in_the_end_is_told_behind_what_was_measured(
    shadowc: Shadowc, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("shadowc.measure.plot.check", lambda *_, **__: None)
    monkeypatch.setattr("shadowc.measure.plot.against_density", full)
    result = shadowc("bench", engine, "--densities", "0.5", *QUICK, "--plot", tmp_path / "curve.png", "--json")
    assert result.exit_code == 2
    assert "curve.png: No space left on device" in result.stderr
    assert json.loads(result.stdout)["rows"]


@pytest.mark.usefixtures("nothing_runs")
def test_a_plot_without_matplotlib_names_the_command(
    shadowc: Shadowc, engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = shadowc("bench", engine, "--plot", tmp_path / "curve.png")
    assert result.exit_code == 6
    assert "next: pip install 'shadowc[plot]'" in result.stderr
