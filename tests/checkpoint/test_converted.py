# SPDX-License-Identifier: Apache-2.0
"""Pickled checkpoints in a folder: converted once into the cache, never beside the user's files, never poisoned."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shadowc.checkpoint import pickled
from shadowc.checkpoint.converted import STAGE
from shadowc.checkpoint.finite import check_finite
from shadowc.checkpoint.opt import EMBEDDING, HEAD
from shadowc.checkpoint.resolve import Checkpoint, resolve
from shadowc.output import NoSpaceError
from shadowc.spec.errors import InputError, SetupError, ShadowcError, UnsupportedError
from tests.checkpoint.handmade import (
    FACTS,
    Tensors,
    as_torch,
    contents,
    save,
    some_tensors,
    write_pickled,
    write_pickled_shards,
    write_single,
)
from tests.checkpoint.test_tokenizer import slow_form

pytestmark = pytest.mark.usefixtures("no_network")

A_WEIGHT = "model.decoder.layers.1.fc1.weight"
WRITERS = [write_pickled, write_pickled_shards]


def cached(root: Path) -> list[Path]:
    """The finished and unfinished conversions in the cache."""
    return sorted(path for path in (root / STAGE).glob("*") if path.name != ".locks")


def refusal(folder: Path, kind: type[ShadowcError]) -> ShadowcError:
    before = contents(folder)
    with pytest.raises(kind) as caught:
        resolve(str(folder))
    assert type(caught.value) is kind
    assert caught.value.hint
    assert contents(folder) == before
    return caught.value


def assert_holds(checkpoint: Checkpoint, tensors: Tensors) -> None:
    assert checkpoint.weights.names() == tuple(sorted((*tensors, HEAD)))
    for name, tensor in tensors.items():
        assert np.array_equal(checkpoint.weights.tensor(name), tensor.astype(np.float32)), name


# What is read


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("kind", ["<f4", "<f2"])
def test_pickled_weights_are_read_as_those_that_were_saved(
    write: Callable[..., Path], kind: str, tmp_path: Path
) -> None:
    tensors = {name: tensor.astype(kind) for name, tensor in some_tensors().items()}
    checkpoint = resolve(str(write(tmp_path, tensors)))
    assert checkpoint.facts.layers == FACTS.layers
    assert_holds(checkpoint, tensors)
    check_finite(checkpoint)


def test_pickled_bfloat16_is_read_as_the_equal_float(tmp_path: Path) -> None:
    tensors = {name: (np.abs(tensor) * 100).astype("<u2") for name, tensor in some_tensors().items()}
    weights = resolve(str(write_pickled(tmp_path, tensors))).weights
    assert np.array_equal(weights.tensor(A_WEIGHT).view("<u4"), tensors[A_WEIGHT].astype("<u4") << 16)


@pytest.mark.parametrize("write", WRITERS)
def test_pickle_of_a_bare_model_is_read_under_canonical_names(write: Callable[..., Path], tmp_path: Path) -> None:
    bare = {name.removeprefix("model."): tensor for name, tensor in some_tensors().items()}
    assert_holds(resolve(str(write(tmp_path, bare | {"decoder.version": np.ones(1, "<f4")}))), some_tensors())


def test_older_format_is_read_as_well(tmp_path: Path) -> None:
    folder = write_pickled(tmp_path, some_tensors(), _use_new_zipfile_serialization=False)
    assert_holds(resolve(str(folder)), some_tensors())


def test_head_equal_to_the_embedding_is_read_whether_it_shares_its_memory_or_not(tmp_path: Path) -> None:
    tensors = some_tensors()
    write_pickled(tmp_path / "copy", tensors | {HEAD: tensors[EMBEDDING]})
    state = {name: as_torch(array) for name, array in tensors.items()}
    write_pickled(tmp_path / "tied", tensors)
    save(tmp_path / "tied" / "pytorch_model.bin", state | {HEAD: state[EMBEDDING]})
    for name in ("copy", "tied"):
        assert_holds(resolve(str(tmp_path / name)), tensors)


def test_head_that_differs_is_refused_with_the_users_file(tmp_path: Path) -> None:
    tensors = some_tensors()
    error = refusal(write_pickled(tmp_path, tensors | {HEAD: tensors[EMBEDDING] * 2}), UnsupportedError)
    assert f"{HEAD} in pytorch_model.bin differs from {EMBEDDING}" in error.message


def test_one_file_wins_over_an_index(tmp_path: Path) -> None:
    write_pickled_shards(tmp_path, some_tensors(seed=1))
    write_pickled(tmp_path, some_tensors(seed=2))
    assert_holds(resolve(str(tmp_path)), some_tensors(seed=2))


def test_what_training_left_beside_the_weights_is_not_opened(tmp_path: Path) -> None:
    class Arguments:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    write_pickled(tmp_path / "m", some_tensors())
    for name in ("training_args.bin", "optimizer.pt"):
        save(tmp_path / "m" / name, Arguments())
    assert_holds(resolve(str(tmp_path / "m")), some_tensors())
    assert not (tmp_path / "ran").exists()


def test_dummy_weights_open_no_pickle(tmp_path: Path, conversions: list[str]) -> None:
    assert resolve(str(write_pickled(tmp_path, some_tensors())), load_format="dummy").dummy
    assert conversions == []


# The cache


@pytest.mark.parametrize("write", WRITERS)
def test_users_folder_is_not_written_to(write: Callable[..., Path], tmp_path: Path, own_cache: Path) -> None:
    folder = slow_form(write(tmp_path, some_tensors()))
    before = contents(folder)
    resolve(str(folder))
    assert contents(folder) == before
    assert cached(own_cache)


def test_second_run_converts_nothing(tmp_path: Path, conversions: list[str]) -> None:
    folder = write_pickled_shards(tmp_path, some_tensors())
    first = resolve(str(folder))
    assert len(conversions) == 3
    assert resolve(str(folder)).identity == first.identity
    assert len(conversions) == 3


def test_conversion_is_found_wherever_the_same_file_lies(tmp_path: Path, conversions: list[str]) -> None:
    folder = write_pickled(tmp_path / "one", some_tensors())
    first = resolve(str(folder))
    (folder / "pytorch_model.bin").rename(write_single(tmp_path / "two", {}) / "pytorch_model.bin")
    (tmp_path / "two" / "model.safetensors").unlink()
    second = resolve(str(tmp_path / "two"))
    assert second.identity == first.identity
    assert conversions == ["pytorch_model.bin"]


def test_identity_changes_with_one_bit_of_a_pickled_weight(tmp_path: Path) -> None:
    tensors = some_tensors()
    first = resolve(str(write_pickled(tmp_path, tensors))).identity
    tensors[A_WEIGHT].view("<u4").flat[0] ^= 1
    second = resolve(str(write_pickled(tmp_path, tensors)))
    assert second.identity != first
    assert_holds(second, tensors)


KILLED = """
import os, signal, sys
from pathlib import Path
from shadowc.checkpoint.resolve import resolve
rename = Path.rename
def kill_before_the_conversion_is_in_place(self, target):
    if "safetensors" in str(self.parent):
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.rename = kill_before_the_conversion_is_in_place
resolve(sys.argv[1])
"""


def test_kill_between_conversion_and_rename_leaves_nothing_that_is_found(
    tmp_path: Path, own_cache: Path, conversions: list[str]
) -> None:
    folder = write_pickled(tmp_path, some_tensors())
    done = subprocess.run([sys.executable, "-c", KILLED, folder], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    (leftover,) = cached(own_cache)
    assert leftover.name.startswith(".tmp-")
    assert (leftover / "weights.safetensors").stat().st_size > 0
    (leftover / "weights.safetensors").write_bytes(b"half of a conversion")
    assert_holds(resolve(str(folder)), some_tensors())
    assert conversions == ["pytorch_model.bin"]
    assert [path.name.startswith(".tmp-") for path in cached(own_cache)] == [False]


def test_conversion_that_fails_leaves_nothing(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_pickled(tmp_path, some_tensors())
    with monkeypatch.context() as patch:
        patch.setattr(pickled.os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            resolve(str(folder))
    assert cached(own_cache) == []
    assert_holds(resolve(str(folder)), some_tensors())


def test_two_at_once_make_one_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_pickled(tmp_path, some_tensors())
    begun, go, done, original = threading.Event(), threading.Event(), [], pickled.convert

    def slow(path: Path, *others: object) -> None:
        done.append(path)
        begun.set()
        assert go.wait(60)
        original(path, *others)

    monkeypatch.setattr(pickled, "convert", slow)
    found: list[Checkpoint] = []
    threads = [threading.Thread(target=lambda: found.append(resolve(str(folder)))) for _ in range(2)]
    threads[0].start()
    assert begun.wait(60)
    threads[1].start()
    time.sleep(0.3)
    assert found == []
    go.set()
    for thread in threads:
        thread.join(60)
    assert len(done) == 1
    assert len(found) == 2
    for checkpoint in found:
        assert_holds(checkpoint, some_tensors())


def test_file_that_changes_while_it_is_read_is_not_kept_under_its_old_hash(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = some_tensors(seed=1), some_tensors(seed=2)
    folder = write_pickled(tmp_path, old)
    old_bytes, original = (folder / "pytorch_model.bin").read_bytes(), pickled.convert

    def overtaken(path: Path, *others: object) -> None:
        write_pickled(folder, new)
        original(path, *others)

    with monkeypatch.context() as patch:
        patch.setattr(pickled, "convert", overtaken)
        assert "changed while it was read" in refusal_of_change(folder)
    assert cached(own_cache) == []
    (folder / "pytorch_model.bin").write_bytes(old_bytes)
    assert_holds(resolve(str(folder)), old)


def refusal_of_change(folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        resolve(str(folder))
    return caught.value.message


def test_conversion_cut_short_in_the_cache_is_made_again(
    tmp_path: Path, own_cache: Path, conversions: list[str]
) -> None:
    folder = write_pickled(tmp_path, some_tensors())
    resolve(str(folder))
    (entry,) = cached(own_cache)
    (entry / "weights.safetensors").write_bytes(b"cut")
    assert_holds(resolve(str(folder)), some_tensors())
    assert len(conversions) == 2


def test_cache_that_cannot_be_written_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_pickled(tmp_path, some_tensors())
    monkeypatch.setenv("SHADOWC_CACHE", str(folder / "config.json" / "cache"))
    assert "SHADOWC_CACHE" in refusal(folder, SetupError).hint


def test_full_disk_is_named_and_leaves_nothing(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = write_pickled(tmp_path, some_tensors())
    monkeypatch.setattr(pickled.os, "fsync", full)
    error = refusal(folder, NoSpaceError)
    assert f"no space left on the disk of {own_cache}" in error.message
    assert cached(own_cache) == []


TORCH = "print('torch' in sys.modules)"


def test_safetensors_are_read_without_torch(tmp_path: Path) -> None:
    code = "import sys; from shadowc.checkpoint.resolve import resolve; resolve(sys.argv[1]); "
    folder = write_single(tmp_path, some_tensors())
    done = subprocess.run(
        [sys.executable, "-c", code + TORCH, folder], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == "False\n"


def test_progress_of_the_conversion_reaches_the_total_over_all_shards(tmp_path: Path) -> None:
    folder = write_pickled_shards(tmp_path, some_tensors())
    total = sum(path.stat().st_size for path in folder.glob("*.bin"))
    seen: list[tuple[int, int]] = []
    resolve(str(folder), advance=lambda done, of: seen.append((done, of)))
    converting = seen[: len(some_tensors())]
    assert {of for _, of in converting} == {total}
    assert converting == sorted(converting)
    assert converting[-1] == (total, total)
