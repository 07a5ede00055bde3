# SPDX-License-Identifier: Apache-2.0
"""What the tutorial and the how-tos tell a reader to run does run."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest

from shadowc.sparsity.criteria import registry
from tests.docs.blocks import RUN, blocks, run

DOCS = Path(__file__).parents[2] / "docs"
SLOW = (
    "tutorial.md",
    "how-to/fine-tune.md",
    "how-to/add-a-pass.md",
    "how-to/generate-and-look.md",
    "how-to/evaluate.md",
)
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in (DOCS / "tutorial.md", *(DOCS / "how-to").glob("*.md")))


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An empty folder, a cache of its own, no network; what a page registers is forgotten."""
    folder = tmp_path / "reader"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    wanted = {"SHADOWC_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    for name, value in wanted.items():
        monkeypatch.setenv(name, value)
    return wanted


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else []) for page in PAGES]
)
def test_blocks_of_a_page_run_in_order(page: str, environment: dict[str, str]) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    expected = sum(text.count(f"\n```{language}\n") for language in RUN)
    assert run(text, page, environment) == expected > 0


@pytest.mark.parametrize("language", RUN)
def test_a_block_that_fails_is_noticed_with_its_place(language: str, environment: dict[str, str]) -> None:
    wrong = {"sh": "shadowc compile --model no-such-model --offline", "python": "assert 1 == 2"}[language]
    page = f"# Page\n\n```{language}\ntrue=1\n{wrong}\n```\n"
    with pytest.raises(AssertionError) as caught:
        run(page, "page.md", environment)
    if language == "sh":
        assert str(caught.value).startswith("page.md:4: ")  # where the block begins
    else:
        last = traceback.extract_tb(caught.value.__traceback__)[-1]
        assert (last.filename, last.lineno) == ("page.md", 5)


def test_every_fence_of_a_page_has_a_language_that_is_known() -> None:
    for page in PAGES:
        for block in blocks((DOCS / page).read_text(encoding="utf-8")):
            assert block.language in (*RUN, "console", "text"), f"{page}:{block.line}"
