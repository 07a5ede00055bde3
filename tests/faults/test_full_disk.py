# SPDX-License-Identifier: Apache-2.0
"""No room for the engine or for the cache: the place, what is needed and what is free are said; nothing half stays."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults.process import Place, entries, incomplete

FIGURES = r"at least [\d,.]+ MB needed, [\d,.]+ MB free"

Disk = Callable[[Path, int], None]


@pytest.fixture
def disk() -> Iterator[Disk]:
    """Mounts a disk of so many bytes at a folder, or gives the one that is there another size."""
    mounted: list[Path] = []

    def mount(folder: Path, size: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        how = f"remount,size={size}" if folder in mounted else f"size={size}"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(folder)], capture_output=True, text=True, check=False
        )
        if done.returncode and not mounted:
            pytest.skip(f"no permission to mount a small disk: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        mounted.append(folder)

    if shutil.which("mount") is None:
        pytest.skip("there is no mount here")
    yield mount
    for folder in set(mounted):
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Limit what this process may write into one file, as `ulimit -f` does."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def place(whole_tiny: Place, tmp_path: Path) -> Place:
    """All stages are cached, the engine is to be written."""
    place = Place(tmp_path / "run", whole_tiny.model)
    shutil.copytree(whole_tiny.cache, place.cache)
    return place


def test_engine_that_will_not_fit_is_refused_before_it_is_written(place: Place, disk: Disk) -> None:
    disk(place.out.parent, 500_000)
    said = place.refused_here()
    assert re.search(rf"no space left on the disk of {place.out.parent}: {FIGURES}; no engine was written", said)
    assert list(place.out.parent.iterdir()) == []


def test_disk_that_is_full_in_the_middle_leaves_nothing(place: Place, disk: Disk, whole_tiny: Place) -> None:
    """The weights fit, what comes after them does not."""
    disk(place.out.parent, len(whole_tiny.left()["weights.bin"]) + 300_000)
    said = place.refused_here()
    assert re.search(rf"no space left on the disk of {place.out.parent}: {FIGURES}; no engine was written", said)
    assert "next: free some space, or use another disk" in said
    assert list(place.out.parent.iterdir()) == []


@pytest.mark.parametrize("stage", ["collect", "train", "trace"])
def test_full_cache_says_what_the_stage_needed_and_keeps_the_others(
    place: Place, disk: Disk, whole_tiny: Place, stage: str
) -> None:
    shutil.rmtree(place.cache)
    disk(place.cache, 1 << 26)
    shutil.copytree(whole_tiny.cache, place.cache, dirs_exist_ok=True)
    shutil.rmtree(place.cache / stage)
    before = dict(entries(place.cache))
    used = shutil.disk_usage(place.cache).used
    disk(place.cache, used + 5 * os.sysconf("SC_PAGE_SIZE"))
    said = place.refused_here()
    assert re.search(rf"no space left on the disk of {place.cache}: {FIGURES}; stage {stage} was not kept", said)
    assert "SHADOWC_CACHE" in said
    assert place.leftovers() == []
    assert incomplete(place.cache) == []
    assert dict(entries(place.cache)) == before
    disk(place.cache, 1 << 26)
    place.run_here()
    assert place.left() == whole_tiny.left()


def test_limit_on_the_size_of_files_is_named(place: Place) -> None:
    with largest_file(500_000):
        said = place.refused_here()
    assert re.search(rf"a file in {place.out.parent} would be larger than this process may write", said)
    assert "ulimit -f: 0.5 MB" in said
    assert re.search(FIGURES, said)
    assert list(place.out.parent.iterdir()) == []


def test_limit_on_the_size_of_files_in_the_cache_is_named(place: Place) -> None:
    shutil.rmtree(place.cache / "collect")
    with largest_file(20_000):
        said = place.refused_here()
    assert re.search(rf"a file in {place.cache} would be larger than this process may write", said)
    assert "stage collect was not kept" in said
    assert place.leftovers() == []
