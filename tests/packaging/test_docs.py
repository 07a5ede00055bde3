# SPDX-License-Identifier: Apache-2.0
"""Pages that repeat a fact are compared with the place where the fact lives."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest

from shadowc.cli import guard
from shadowc.cli.app import COMMANDS
from shadowc.spec import errors

TOP = Path(__file__).parents[2]
PAGES = sorted(path.relative_to(TOP / "docs").as_posix() for path in (TOP / "docs").rglob("*.md"))


@pytest.mark.parametrize("script", ["ops_page", "errors_page", "engine_page", "criteria_page"])
def test_generated_pages_are_what_their_scripts_write(script: str) -> None:
    spec = importlib.util.spec_from_file_location(script, TOP / "scripts" / f"{script}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), f"run scripts/{script}.py"


def test_page_of_errors_has_every_class_and_every_exit_code() -> None:
    page = (TOP / "docs" / "errors.md").read_text(encoding="utf-8")
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.ShadowcError)]
    assert len(kinds) == 7
    for kind in kinds:
        assert re.search(rf"^\| `{kind.__name__}` \| {kind.exit_code} \| [^|]+ \| [^|]+ \|$", page, re.MULTILINE), kind
    codes = [value for name, value in vars(guard).items() if name.isupper() and isinstance(value, int)]
    assert len(codes) == 3
    for code in codes:
        assert f"\n| {code} | " in page


def test_menu_of_the_site_has_every_page_once() -> None:
    menu = re.findall(r"^ +- .*: (\S+\.md)$", (TOP / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(menu) == PAGES


def test_site_is_built_with_pinned_packages() -> None:
    project = tomllib.loads((TOP / "pyproject.toml").read_text(encoding="utf-8"))
    needs = project["project"]["optional-dependencies"]["docs"]
    assert any(need.startswith("mkdocs-material==") for need in needs)
    assert all("==" in need for need in needs)


def test_every_decision_has_three_lines() -> None:
    entries = (TOP / "docs" / "decisions.md").read_text(encoding="utf-8").split("\n## ")[1:]
    assert entries
    for entry in entries:
        heading, *lines = entry.strip().splitlines()
        assert len([line for line in lines if line.strip()]) == 3, heading


def rows_with_tests(page: str) -> list[tuple[str, ...]]:
    """Cells of all rows whose last one is `file::test`."""
    rows = (TOP / "docs" / page).read_text(encoding="utf-8").splitlines()
    cells = [tuple(cell.strip() for cell in row.strip("|").split("|")) for row in rows if row.startswith("|")]
    return [row for row in cells if row[-1] not in ("test", "---")]


@pytest.mark.parametrize(("page", "fewest"), [("planted-defects.md", 129), ("faults.md", 35)])
def test_every_planted_defect_and_every_promise_names_a_test_that_exists(page: str, fewest: int) -> None:
    rows = rows_with_tests(page)
    assert len(rows) >= fewest
    for *said, test in rows:
        path, _, name = test.strip("`").partition("::")
        assert all(said), test
        assert re.search(rf"^def {re.escape(name)}\b", (TOP / path).read_text(encoding="utf-8"), re.MULTILINE), test


def rows_that_are_split(text: str) -> list[str]:
    """Rows of tables, outside code, whose cells are not as many as their heading's."""
    split, cells = [], 0
    for line in re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL).splitlines():
        found = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        split += [line] if cells and found not in (0, cells) else []
        cells = (cells or found) if found else 0
    return split


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{page}" for page in PAGES)])
def test_every_row_of_a_table_has_the_cells_of_its_heading(page: str) -> None:
    assert rows_that_are_split((TOP / page).read_text(encoding="utf-8")) == []


def test_a_bar_that_splits_a_row_would_be_noticed() -> None:
    table = "| a | b |\n| --- | --- |\n| `x \\| y` | 1 |\n"
    assert rows_that_are_split(table) == []
    assert rows_that_are_split(table + "| `x | y` | 1 |\n") == ["| `x | y` | 1 |"]


def test_readme_names_every_command() -> None:
    readme = (TOP / "README.md").read_text(encoding="utf-8")
    for name, _, _ in COMMANDS:
        assert f"| `shadowc {name}` |" in readme, name
    assert "make demo" in readme
    assert "make test" in readme


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{page}" for page in PAGES)])
def test_links_between_pages_lead_somewhere(page: str) -> None:
    path = TOP / page
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{page} links to {target}"
