# SPDX-License-Identifier: Apache-2.0
"""Pages that repeat a fact are compared with the place where the fact lives."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from shadowc.cli.app import COMMANDS

TOP = Path(__file__).parents[2]


def test_page_of_operators_is_generated_from_the_table() -> None:
    spec = importlib.util.spec_from_file_location("ops_page", TOP / "scripts" / "ops_page.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (TOP / "docs" / "ops.md").read_text(encoding="utf-8") == script.page(), "run scripts/ops_page.py"


def test_every_decision_has_three_lines() -> None:
    entries = (TOP / "docs" / "decisions.md").read_text(encoding="utf-8").split("\n## ")[1:]
    assert entries
    for entry in entries:
        heading, *lines = entry.strip().splitlines()
        assert len([line for line in lines if line.strip()]) == 3, heading


def planted_defects() -> list[tuple[str, ...]]:
    rows = (TOP / "docs" / "planted-defects.md").read_text(encoding="utf-8").splitlines()
    cells = [tuple(cell.strip() for cell in row.strip("|").split("|")) for row in rows if row.startswith("|")]
    return cells[2:]


def test_every_planted_defect_names_a_test_that_exists() -> None:
    for defect, gate, test in planted_defects():
        path, _, name = test.strip("`").partition("::")
        assert gate, defect
        assert re.search(rf"^def {re.escape(name)}\b", (TOP / path).read_text(encoding="utf-8"), re.MULTILINE), test


def test_readme_names_every_command() -> None:
    readme = (TOP / "README.md").read_text(encoding="utf-8")
    for name, _, _ in COMMANDS:
        assert f"| `shadowc {name}` |" in readme, name
    assert "make demo" in readme
    assert "make test" in readme


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in sorted((TOP / "docs").glob("*.md")))])
def test_links_between_pages_lead_somewhere(page: str) -> None:
    path = TOP / page
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{page} links to {target}"
