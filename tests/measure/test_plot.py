# SPDX-License-Identifier: Apache-2.0
"""What is drawn: curves, floors and the twin of each panel, by a figure that notes it. No matplotlib is needed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shadowc.measure import plot
from shadowc.measure.bench import BenchReport, BenchRow
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError


class Panel:
    """Notes what is drawn, by label."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, list[float], list[float]]] = []
        self.levels: dict[str, float] = {}
        self.title = ""

    def plot(self, shares: list[float], values: list[float], *_: str, label: str, **__: object) -> None:
        self.lines.append((label, shares, values))

    def axhline(self, level: float, *, label: str, **_: object) -> None:
        self.levels[label] = level

    def set(self, *, title: str, **_: object) -> None:
        self.title = title

    def fill_between(self, *_: object, **__: object) -> None: ...

    def set_ylim(self, **_: object) -> None: ...

    def legend(self, **_: object) -> None: ...


class Figure:
    """Notes its panels and its note."""

    made: Figure

    def __init__(self, **_: object) -> None:
        Figure.made = self

    def subplots(self, rows: int, columns: int, **_: object) -> Any:
        self.panels = [Panel() for _ in range(rows * columns)]
        return SimpleNamespace(flat=self.panels)

    def supxlabel(self, note: str, **_: object) -> None:
        self.note = note

    def get_figwidth(self) -> float:
        return 100.0

    def savefig(self, path: Path) -> None:
        path.write_text("drawn")


def a_row(mask: str, share: float, ms: float, *, neurons: float | None = None, zeros: bool = False) -> BenchRow:
    return BenchRow(
        label="", density_heads=share, density_neurons=share if neurons is None else neurons, skip_zeros=zeros,
        mask=mask, ms_per_token=ms, ms_lowest=ms - 1, ms_highest=ms + 1, ms_by_round=(ms,), megabytes_per_token=1.0,
        floor_ms=ms / 2, above_floor_ms=ms / 2, gigabytes_per_second=1.0, share_of_stream=0.5, steady_turns=1.0,
        turns=(), speedup=1.0, shares=None,
    )  # type: ignore[arg-type] # fmt: skip


def a_report(*rows: BenchRow) -> BenchReport:
    found: Any = SimpleNamespace(
        model="opt-x", weights="int8", threads=2, isa="some", rounds=3, tokens=4, batch=8, rows=rows,
        stream_gigabytes_per_second=30.0, stream_by_round=(29.0, 30.0, 31.0),
        noise=SimpleNamespace(warning="not quiet: a neighbour"),
    )  # fmt: skip
    report: BenchReport = found
    return report


@pytest.fixture(autouse=True)
def noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "_figure_type", lambda: Figure)


def test_a_panel_has_each_mask_with_its_floor_and_the_twin(tmp_path: Path) -> None:
    rows = [a_row("none", 1.0, 40.0), a_row("token", 1.0, 42.0), a_row("token", 0.2, 12.0)]
    rows += [a_row("token", 0.5, 18.0, neurons=0.2), a_row("sequence", 0.2, 10.0)]
    plot.against_density(a_report(*rows), tmp_path / "plot.png")
    (panel,) = Figure.made.panels
    assert panel.levels == {"dense twin": 40.0}
    assert panel.lines == [
        ("a mask per token", [0.2, 1.0], [12.0, 42.0]),
        ("bytes at 0.9 of the stream", [0.2, 1.0], [6.0, 21.0]),
        ("a mask per sequence", [0.2], [10.0]),
        ("bytes at 0.9 of the stream", [0.2], [5.0]),
    ]
    assert panel.title == "opt-x, int8"
    assert "some, 2 threads; batch 8, 4 tokens a sample" in Figure.made.note
    assert (tmp_path / "plot.png").read_text() == "drawn"


def test_skipped_zeros_have_a_panel_and_a_twin_of_their_own(tmp_path: Path) -> None:
    rows = [a_row(mask, 1.0, 40.0 - 5 * zeros, zeros=zeros) for mask in ("none", "token") for zeros in (False, True)]
    plot.against_density(a_report(*rows), tmp_path / "plot.png")
    assert [panel.levels["dense twin"] for panel in Figure.made.panels] == [40.0, 35.0]
    assert [panel.title for panel in Figure.made.panels] == ["opt-x, int8", "opt-x, int8, skip zeros"]


def test_the_note_says_where_it_was_measured_and_that_it_was_not_quiet(tmp_path: Path) -> None:
    plot.against_density(a_report(a_row("token", 1.0, 40.0)), tmp_path / "plot.png")
    for word in ("some, 2 threads", "medians of 3", "30.0 GB/s (29.0 to 31.0)", "not quiet: a neighbour"):
        assert word in Figure.made.note


def test_a_dense_engine_has_no_curve(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a dense engine has no densities"):
        plot.check(tmp_path / "plot.png", [Density()], sparse=False)
    plot.check(tmp_path / "plot.png", [Density()], sparse=True)
