# SPDX-License-Identifier: Apache-2.0
"""The stage cache: made once, whole or not at all, never stale."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from shadowc import stage_cache
from shadowc.spec.errors import InternalError, SetupError
from shadowc.stage_cache import StageCache, default_root

KEY = {"checkpoint": "abc", "options": {"seed": 0, "rate": 0.001}}
PATIENCE = 20.0
"""Seconds a test waits for another process."""


def write_result(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "result").write_text("42")


def unexpected(folder: Path) -> None:
    raise AssertionError(f"made again in {folder}")


def leftovers(root: Path) -> list[str]:
    return [path.name for path in root.rglob(".tmp-*")]


@pytest.fixture
def cache(tmp_path: Path) -> StageCache:
    return StageCache(tmp_path / "cache")


def test_entry_is_made_once_and_then_found(cache: StageCache) -> None:
    assert cache.entry("collect", KEY) is None
    made, found = cache.get_or_make("collect", KEY, write_result)
    assert not found
    assert (made / "sub" / "result").read_text() == "42"
    assert cache.get_or_make("collect", KEY, unexpected) == (made, True)
    assert cache.entry("collect", KEY) == made


def test_entry_survives_in_a_new_cache_of_the_same_folder(cache: StageCache) -> None:
    made, _ = cache.get_or_make("collect", KEY, write_result)
    assert StageCache(cache.root).entry("collect", KEY) == made


def test_order_of_the_key_does_not_matter(cache: StageCache) -> None:
    made, _ = cache.get_or_make("collect", KEY, write_result)
    assert cache.entry("collect", dict(reversed(KEY.items()))) == made


@pytest.mark.parametrize("other", [{**KEY, "checkpoint": "abd"}, {**KEY, "more": None}, {"checkpoint": "abc"}])
def test_other_key_is_another_entry(cache: StageCache, other: dict[str, object]) -> None:
    made, _ = cache.get_or_make("collect", KEY, write_result)
    assert cache.entry("collect", other) is None
    assert cache.get_or_make("collect", other, write_result)[0] != made


def test_other_stage_version_or_schema_is_another_entry(cache: StageCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.get_or_make("collect", KEY, write_result)
    assert cache.entry("train", KEY) is None
    with monkeypatch.context() as patch:
        patch.setattr(stage_cache, "SCHEMA", stage_cache.SCHEMA + 1)
        assert cache.entry("collect", KEY) is None
    monkeypatch.setattr(stage_cache, "__version__", "99")
    assert cache.entry("collect", KEY) is None


def test_key_is_written_beside_the_result(cache: StageCache) -> None:
    made, _ = cache.get_or_make("collect", KEY, write_result)
    content = json.loads((made / "key.json").read_text())
    assert content["of"]["key"] == KEY
    assert content["files"] == {"sub/result": 2}


@pytest.mark.parametrize("error", [ValueError("broken"), KeyboardInterrupt()])
def test_nothing_is_left_when_making_fails(cache: StageCache, error: BaseException) -> None:
    def fail(folder: Path) -> None:
        write_result(folder)
        raise error

    with pytest.raises(type(error)):
        cache.get_or_make("collect", KEY, fail)
    assert cache.entry("collect", KEY) is None
    assert not leftovers(cache.root)
    assert cache.get_or_make("collect", KEY, write_result)[1] is False


def damage_by_removing_the_key(folder: Path) -> None:
    (folder / "key.json").unlink()


def damage_by_emptying_the_key(folder: Path) -> None:
    (folder / "key.json").write_text("")


def damage_by_another_key(folder: Path) -> None:
    text = (folder / "key.json").read_text()
    (folder / "key.json").write_text(text.replace("abc", "xyz"))


def damage_by_removing_a_file(folder: Path) -> None:
    (folder / "sub" / "result").unlink()


def damage_by_cutting_a_file(folder: Path) -> None:
    (folder / "sub" / "result").write_text("4")


@pytest.mark.parametrize(
    "damage",
    [
        damage_by_removing_the_key,
        damage_by_emptying_the_key,
        damage_by_another_key,
        damage_by_removing_a_file,
        damage_by_cutting_a_file,
    ],
)
def test_damaged_entry_is_made_again(cache: StageCache, damage) -> None:
    made, _ = cache.get_or_make("collect", KEY, write_result)
    damage(made)
    assert cache.entry("collect", KEY) is None
    assert cache.get_or_make("collect", KEY, write_result) == (made, False)
    assert (made / "sub" / "result").read_text() == "42"


def test_file_in_the_place_of_an_entry_is_replaced(cache: StageCache) -> None:
    made, _ = cache.get_or_make("collect", KEY, write_result)
    (made / "sub" / "result").unlink()
    (made / "sub").rmdir()
    (made / "key.json").unlink()
    made.rmdir()
    made.write_text("not a folder")
    assert cache.get_or_make("collect", KEY, write_result) == (made, False)


MAKER = """
import sys, time
from pathlib import Path
from shadowc.stage_cache import StageCache

def make(folder):
    (folder / "started").write_text("")
    with open(sys.argv[2], "a") as log:
        log.write("made\\n")
    time.sleep(float(sys.argv[3]))
    (folder / "result").write_text("42")

folder, found = StageCache(Path(sys.argv[1])).get_or_make("collect", {"a": 1}, make)
print((folder / "result").read_text(), found)
"""


def start_maker(root: Path, log: Path, seconds: float) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", MAKER, str(root), str(log), str(seconds)]
    place = Path(stage_cache.__file__).parents[1]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=place)


def wait_until_made(root: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not list(root.glob("collect/.tmp-*/started")):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_processes_make_an_entry_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    makers = [start_maker(tmp_path / "cache", log, 0.3) for _ in range(2)]
    outputs = sorted(maker.communicate(timeout=PATIENCE)[0].strip() for maker in makers)
    assert outputs == ["42 False", "42 True"]
    assert log.read_text() == "made\n"


def test_killed_maker_leaves_only_a_temporary_folder_that_the_next_run_removes(tmp_path: Path) -> None:
    cache, log = StageCache(tmp_path / "cache"), tmp_path / "log"
    maker = start_maker(cache.root, log, PATIENCE)
    wait_until_made(cache.root)
    os.kill(maker.pid, signal.SIGKILL)
    maker.communicate(timeout=PATIENCE)
    assert cache.entry("collect", {"a": 1}) is None
    assert len(leftovers(cache.root)) == 1
    cache.get_or_make("collect", KEY, write_result)  # another key of the same stage
    assert not leftovers(cache.root)


def test_temporary_folder_of_a_living_maker_is_left_alone(tmp_path: Path) -> None:
    cache, log = StageCache(tmp_path / "cache"), tmp_path / "log"
    maker = start_maker(cache.root, log, 1.0)
    wait_until_made(cache.root)
    cache.get_or_make("collect", KEY, write_result)
    assert len(leftovers(cache.root)) == 1
    assert maker.communicate(timeout=PATIENCE)[0].strip() == "42 False"


def test_waiting_for_another_maker_is_told_once(cache: StageCache) -> None:
    entered, leave, told = threading.Event(), threading.Event(), []

    def make_slowly(folder: Path) -> None:
        entered.set()
        assert leave.wait(PATIENCE)
        write_result(folder)

    other = threading.Thread(target=cache.get_or_make, args=("collect", KEY, make_slowly))
    other.start()
    assert entered.wait(PATIENCE)

    def on_wait() -> None:
        told.append("waiting")
        leave.set()

    assert cache.get_or_make("collect", KEY, unexpected, on_wait=on_wait)[1]
    other.join(PATIENCE)
    assert told == ["waiting"]


def test_one_process_after_the_other_does_what_a_name_stands_for(cache: StageCache) -> None:
    entered, leave, order = threading.Event(), threading.Event(), []

    def first() -> None:
        with cache.alone("/out/mini.engine"):
            entered.set()
            assert leave.wait(PATIENCE)
            order.append("first")

    other = threading.Thread(target=first)
    other.start()
    assert entered.wait(PATIENCE)
    with StageCache(cache.root).alone("/out/other.engine", lambda: order.append("waited for nothing")):
        pass
    with StageCache(cache.root).alone("/out/mini.engine", leave.set):
        order.append("second")
    other.join(PATIENCE)
    assert order == ["first", "second"]


def test_nobody_waits_where_the_cache_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with StageCache(tmp_path / "file" / "cache").alone("/out/mini.engine"):
        assert not (tmp_path / "file").is_dir()


def test_full_disk_is_told_with_what_was_needed_and_is_free(cache: StageCache) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_bytes(bytes(3_000_000))
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        SetupError, match=r"at least 3\.0 MB needed, [\d,.]+ MB free; stage train was not kept"
    ) as caught:
        cache.get_or_make("train", KEY, fail)
    assert str(cache.root) in caught.value.message
    assert "SHADOWC_CACHE" in caught.value.hint


def test_file_system_without_locks_is_a_setup_error(cache: StageCache, monkeypatch: pytest.MonkeyPatch) -> None:
    import filelock

    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock; use SoftFileLock instead")

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with pytest.raises(SetupError, match="has no locks") as caught:
        cache.get_or_make("collect", KEY, unexpected)
    assert "SHADOWC_CACHE" in caught.value.hint


def test_maker_may_use_the_cache_itself(cache: StageCache) -> None:
    def make(folder: Path) -> None:
        inner, _ = cache.get_or_make("trace", KEY, write_result)
        (folder / "copy").write_text((inner / "sub" / "result").read_text())

    assert (cache.get_or_make("collect", KEY, make)[0] / "copy").read_text() == "42"


def test_root_is_the_folder_that_the_environment_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHADOWC_CACHE", str(tmp_path / "named"))
    assert default_root() == StageCache().root == tmp_path / "named"


def test_root_is_the_users_cache_folder_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHADOWC_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert StageCache().root == tmp_path / "shadowc"


def test_user_without_home_is_told_to_name_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SHADOWC_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what it does for a user without an account
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SetupError, match="no home folder") as caught:
        StageCache().get_or_make("collect", KEY, unexpected)
    assert "SHADOWC_CACHE" in caught.value.hint
    assert not list(tmp_path.iterdir())


def test_home_that_cannot_be_written_to_is_a_setup_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="cannot be written to") as caught:
        StageCache(tmp_path / "file" / "cache").get_or_make("collect", KEY, unexpected)
    assert "SHADOWC_CACHE" in caught.value.hint
    assert caught.value.exit_code == 6


def test_error_of_the_maker_is_not_taken_for_one_of_the_cache(cache: StageCache) -> None:
    def fail(folder: Path) -> None:
        raise FileNotFoundError(2, "No such file", str(folder / "text"))

    with pytest.raises(FileNotFoundError):
        cache.get_or_make("collect", KEY, fail)


@pytest.mark.parametrize(
    ("number", "says"),
    [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "no space left"), (errno.EACCES, "cannot be written to")],
)
def test_refusal_to_write_inside_the_maker_is_explained(cache: StageCache, number: int, says: str) -> None:
    def fail(folder: Path) -> None:
        raise OSError(number, os.strerror(number), str(folder / "sub" / "trace"))

    with pytest.raises(SetupError, match=says) as caught:
        cache.get_or_make("collect", KEY, fail)
    assert str(cache.root) in caught.value.message
    assert "SHADOWC_CACHE" in caught.value.hint
    assert not leftovers(cache.root)


def test_refusal_elsewhere_is_not_blamed_on_the_cache(cache: StageCache, tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "weights"))

    with pytest.raises(SetupError, match=r"weights cannot be used: Permission denied"):
        cache.get_or_make("collect", KEY, fail)


@pytest.mark.parametrize("stage", ["", "..", "a/b", "A", "a_b", "-a"])
def test_stage_that_is_no_name_is_a_bug(cache: StageCache, stage: str) -> None:
    with pytest.raises(InternalError):
        cache.entry(stage, KEY)


@pytest.mark.parametrize("value", [Path("a"), float("nan"), {1, 2}, b"a"])
def test_key_that_is_not_plain_json_is_a_bug(cache: StageCache, value: object) -> None:
    with pytest.raises(InternalError, match="plain JSON"):
        cache.entry("collect", {"a": value})
