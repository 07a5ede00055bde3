# SPDX-License-Identifier: Apache-2.0
"""Results go to standard output, the talk to standard error, and logs stay plain."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from shadowc.cli import render

PACKAGE = Path(__file__).parents[2] / "shadowc"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (635_900_000, "635.9 MB"), (1.3e12, "1.3 TB")]
)
def test_size_is_in_powers_of_1000(count: float, text: str) -> None:
    assert render.size(count) == text


@pytest.mark.parametrize(("value", "text"), [(0.04, "0.0 s"), (99.94, "99.9 s"), (754.0, "12 min 34 s")])
def test_seconds_become_minutes_when_there_are_many(value: float, text: str) -> None:
    assert render.seconds(value) == text


def test_json_is_one_document_without_nan(capsys: pytest.CaptureFixture[str]) -> None:
    render.as_json({"bytes": float("nan"), "rows": [(1.0, float("inf"))], "path": Path("a/b")})
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"bytes": None, "rows": [[1.0, None]], "path": "a/b"}
    assert captured.err == ""


def test_talk_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    render.say("reading")
    render.facts({"speed": "9 tokens/s"}, talk=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "reading\n  speed  9 tokens/s\n"


def test_tables_are_plain_and_not_cut_when_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    name = "m" * 120
    render.table(("name", "MB"), [(name, "1"), ("b", "22")])
    out = capsys.readouterr().out
    assert name in out
    assert "\x1b" not in out
    assert [line.split() for line in out.splitlines()] == [["name", "MB"], [name, "1"], ["b", "22"]]


def test_a_terminal_that_is_too_narrow_cuts_no_figure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    row = ("a long name", "12345.67", "1234.56", "98.76 %")
    render.table(("name", "ms", "MB", "share"), [row])
    out = capsys.readouterr().out
    assert "\x1b" in out  # a terminal
    assert all(cell in out for cell in row)
    assert "…" not in out


def test_square_brackets_are_text_and_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    render.facts({"shape": "[red] [B, S]"})
    render.table(("a",), [("[bold]",)])
    out = capsys.readouterr().out
    assert "[red] [B, S]" in out
    assert "[bold]" in out


def test_only_the_renderer_prints() -> None:
    """print(), sys.stdout and rich's console appear in shadowc/cli/render.py and nowhere else in the package."""
    offenders = []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name == "render.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                offenders.append(f"{path.name}:{node.lineno} print")
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.stdout.write", "sys.stderr.write"):
                offenders.append(f"{path.name}:{node.lineno} {ast.unparse(node)}")
    assert offenders == []
