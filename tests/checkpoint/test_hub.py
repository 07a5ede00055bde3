# SPDX-License-Identifier: Apache-2.0
"""Downloads, against a hub of our own on this machine; nothing here leaves it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from shadowc.checkpoint import hub
from shadowc.checkpoint.opt import EMBEDDING
from shadowc.checkpoint.resolve import resolve
from shadowc.checkpoint.tokenizer import load_tokenizer
from shadowc.spec.errors import InputError, SetupError, ShadowcError, UnsupportedError
from tests.checkpoint.handmade import (
    FACTS,
    contents,
    some_tensors,
    write_pickled,
    write_pickled_shards,
    write_shards,
    write_single,
)
from tests.checkpoint.test_tokenizer import slow_form

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = "someone/small"
PATIENCE = 60.0
"""Seconds in which a deadline of 0.3 must have passed; without one nothing would end."""


class FakeHub(ThreadingHTTPServer):
    """As much of the hub's HTTP interface as a download needs: one repository, one commit."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.status = 200
        self.code = ""
        self.broken = ""
        self.broken_code = ""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def take(self, folder: Path) -> None:
        self.files = contents(folder)


class _Answers(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        self.server.asked.append(path)
        files = self.server.files
        if self.server.status != 200:
            self._send(self.server.status, b"{}", {"X-Error-Code": self.server.code})
        elif path.startswith(f"/api/models/{MODEL}/tree/"):
            entries = [{"type": "file", "path": n, "size": len(c), "oid": self._etag(c)} for n, c in files.items()]
            self._send(200, json.dumps(entries).encode())
        elif path in (f"/api/models/{MODEL}", f"/api/models/{MODEL}/revision/main"):
            siblings = [{"rfilename": name} for name in files]
            self._send(200, json.dumps({"id": MODEL, "sha": COMMIT, "siblings": siblings}).encode())
        elif self.server.broken and path.endswith(self.server.broken):
            self._send(403, b"{}", {"X-Error-Code": self.server.broken_code})
        elif path.startswith(f"/{MODEL}/resolve/") and path.split("/", 5)[5] in files:
            content = files[path.split("/", 5)[5]]
            self._send(200, content, {"ETag": f'"{self._etag(content)}"', "X-Repo-Commit": COMMIT})
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    @staticmethod
    def _etag(content: bytes) -> str:
        return hashlib.sha1(content, usedforsecurity=False).hexdigest()

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that serves nothing yet; its address and an empty cache are what shadowc sees."""
    from huggingface_hub import constants

    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def published(tmp_path: Path, fake_hub: FakeHub) -> FakeHub:
    """The fake hub with a sharded checkpoint, its tokenizer and files that nobody needs."""
    folder = slow_form(write_shards(tmp_path / "upload", some_tensors()))
    (folder / "README.md").write_text("# small")
    (folder / "flax_model.msgpack").write_bytes(b"flax")
    fake_hub.take(folder)
    return fake_hub


def refusal(kind: type[ShadowcError], model: str = MODEL, **options: object) -> ShadowcError:
    with pytest.raises(kind) as caught:
        resolve(model, **options)
    assert type(caught.value) is kind
    assert caught.value.hint
    return caught.value


def test_model_is_downloaded_checked_and_resolved(published: FakeHub) -> None:
    checkpoint = resolve(MODEL)
    assert checkpoint.facts == FACTS
    assert checkpoint.tokenizer is not None
    assert len(checkpoint.weights.names()) == len(some_tensors()) + 1


def test_only_needed_files_are_downloaded(published: FakeHub) -> None:
    folder = resolve(MODEL).folder
    assert folder is not None
    assert set(contents(folder)) == set(published.files) - {"README.md", "flax_model.msgpack"}


def test_dummy_weights_download_no_weights(published: FakeHub) -> None:
    checkpoint = resolve(MODEL, load_format="dummy")
    assert checkpoint.dummy
    assert checkpoint.folder is not None
    assert set(contents(checkpoint.folder)) == {"config.json", "vocab.json", "merges.txt"}


@pytest.mark.parametrize("by_environment", [False, True])
def test_downloaded_model_is_found_offline_without_asking(
    published: FakeHub, by_environment: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolve(MODEL)
    published.asked.clear()
    if by_environment:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    second = resolve(MODEL, offline=not by_environment)
    assert (second.identity, second.folder) == (first.identity, first.folder)
    assert published.asked == []


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", None])
@pytest.mark.usefixtures("no_network")
def test_model_that_was_not_downloaded_is_refused_offline(
    fake_hub: FakeHub, variable: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable:
        monkeypatch.setenv(variable, "1")
    error = refusal(SetupError, "opt-125m", offline=variable is None)
    assert "facebook/opt-125m is not in the local hub cache" in error.message
    assert "hf download facebook/opt-125m" in error.hint
    assert fake_hub.asked == []


def test_half_downloaded_model_is_refused_offline(published: FakeHub) -> None:
    resolve(MODEL, load_format="dummy")
    assert "not completely" in refusal(SetupError, offline=True).message


def test_model_in_another_format_is_refused_before_its_download(fake_hub: FakeHub, tmp_path: Path) -> None:
    folder = write_single(tmp_path / "upload", some_tensors())
    (folder / "model.safetensors").rename(folder / "tf_model.h5")
    fake_hub.take(folder)
    error = refusal(UnsupportedError)
    assert "tf_model.h5" in error.message
    assert f"from_pretrained('{MODEL}'" in error.hint
    assert not any("/resolve/" in path for path in fake_hub.asked)


UNNEEDED = ("flax_model.msgpack", "tf_model.h5", "pytorch_model.fp16.bin", "training_args.bin", "optimizer.pt")


def publish(fake_hub: FakeHub, folder: Path) -> None:
    """Publish a checkpoint, with the files that lie beside weights on the hub."""
    slow_form(folder)
    for name in UNNEEDED:
        (folder / name).write_bytes(b"not needed")
    fake_hub.take(folder)


@pytest.mark.parametrize("write", [write_pickled, write_pickled_shards])
def test_repository_with_pickles_alone_is_downloaded_and_read(
    write: Callable[..., Path], fake_hub: FakeHub, tmp_path: Path
) -> None:
    publish(fake_hub, write(tmp_path / "upload", some_tensors()))
    checkpoint = resolve(MODEL)
    assert np.array_equal(checkpoint.weights.tensor(EMBEDDING), some_tensors()[EMBEDDING])
    assert checkpoint.folder is not None
    assert set(contents(checkpoint.folder)) == set(fake_hub.files) - set(UNNEEDED)


@pytest.mark.parametrize("write", [write_pickled, write_pickled_shards])
def test_downloaded_pickles_are_found_offline_without_asking(
    write: Callable[..., Path], fake_hub: FakeHub, tmp_path: Path
) -> None:
    publish(fake_hub, write(tmp_path / "upload", some_tensors()))
    first = resolve(MODEL)
    fake_hub.asked.clear()
    assert resolve(MODEL, offline=True).identity == first.identity
    assert fake_hub.asked == []


@pytest.mark.parametrize("write", [write_pickled, write_pickled_shards])
def test_half_downloaded_pickles_are_refused_offline(
    write: Callable[..., Path], fake_hub: FakeHub, tmp_path: Path
) -> None:
    publish(fake_hub, write(tmp_path / "upload", some_tensors()))
    resolve(MODEL, load_format="dummy")
    assert "not completely" in refusal(SetupError, offline=True).message


def test_no_pickle_is_downloaded_where_there_are_safetensors(fake_hub: FakeHub, tmp_path: Path) -> None:
    folder = write_pickled_shards(write_pickled(tmp_path / "upload", some_tensors(seed=1)), some_tensors(seed=1))
    publish(fake_hub, write_single(folder, some_tensors(seed=2)))
    checkpoint = resolve(MODEL)
    assert np.array_equal(checkpoint.weights.tensor(EMBEDDING), some_tensors(seed=2)[EMBEDDING])
    assert not any(".bin" in path for path in fake_hub.asked if "/resolve/" in path)


def test_no_shard_is_downloaded_where_there_is_one_pickle(fake_hub: FakeHub, tmp_path: Path) -> None:
    folder = write_pickled_shards(tmp_path / "upload", some_tensors(seed=1))
    publish(fake_hub, write_pickled(folder, some_tensors(seed=2)))
    resolve(MODEL)
    assert not any("-of-" in path for path in fake_hub.asked)


def test_added_tokens_are_downloaded(fake_hub: FakeHub, tmp_path: Path) -> None:
    folder = write_single(tmp_path / "upload", some_tensors())
    (folder / "added_tokens.json").write_text(json.dumps({"<new>": FACTS.vocab - 1}))
    publish(fake_hub, folder)
    folder = resolve(MODEL).folder
    assert folder is not None
    assert load_tokenizer(folder)("<new>").input_ids == [2, FACTS.vocab - 1]


def test_model_that_the_hub_does_not_know_is_an_input_error(published: FakeHub) -> None:
    assert "someone/other" in refusal(InputError, "someone/other").message


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize(
    ("wrong", "right"),
    [("facebook/opt-1.3", "facebook/opt-1.3b"), ("facebok/opt-125m", "facebook/opt-125m")],
)
def test_mistyped_hub_id_is_answered_with_the_nearest_known_ones(
    published: FakeHub, wrong: str, right: str, offline: bool
) -> None:
    error = refusal(SetupError if offline else InputError, wrong, offline=offline)
    assert error.hint.startswith(f"did you mean {right}")


def test_name_unlike_any_known_one_gets_no_suggestion(published: FakeHub) -> None:
    assert "did you mean" not in refusal(InputError, "someone/other").hint


def test_model_behind_a_gate_asks_for_a_login(published: FakeHub) -> None:
    published.status, published.code = 403, "GatedRepo"
    assert "hf auth login" in refusal(SetupError).hint


def test_files_behind_a_gate_ask_for_a_login_too(published: FakeHub) -> None:
    published.broken, published.broken_code = "config.json", "GatedRepo"
    assert "hf auth login" in refusal(SetupError).hint


@pytest.mark.parametrize(
    ("number", "says", "hint"),
    [(errno.ENOSPC, "no space left on the disk of", "free some space"), (errno.EROFS, "cannot be kept in", "HF_HOME")],
)
def test_a_cache_that_takes_no_files_is_no_fault_of_the_network(
    published: FakeHub, monkeypatch: pytest.MonkeyPatch, number: int, says: str, hint: str
) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise OSError(number, os.strerror(number), "blobs")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(SetupError, match=says) as caught:
        resolve(MODEL)
    assert hint in caught.value.hint


def test_hub_that_fails_is_a_setup_error(published: FakeHub) -> None:
    published.status = 500
    error = refusal(SetupError)
    assert MODEL in error.message
    assert "\n" not in error.message


def test_download_that_breaks_off_is_a_setup_error(published: FakeHub) -> None:
    published.broken = "model-00002-of-00003.safetensors"
    assert "the download from the hub failed" in refusal(SetupError).message
    published.broken = ""
    assert resolve(MODEL).facts == FACTS


def test_hub_that_refuses_connections_is_a_setup_error_at_once(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        error = refusal(SetupError, "opt-125m")
    assert "could not be reached" in error.message
    assert "--offline" in error.hint
    assert "opt-mini" in error.hint


def test_silent_hub_is_given_up_after_the_deadline(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        error = refusal(SetupError, "opt-125m")
    assert time.monotonic() - started < PATIENCE
    assert "no answer within 0.3 seconds" in error.message


def test_deadline_is_below_twenty_seconds() -> None:
    assert hub.ANSWER_SECONDS < 20


def test_folder_of_that_name_wins_over_the_hub(
    published: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_single(tmp_path / MODEL, some_tensors())
    monkeypatch.chdir(tmp_path)
    assert resolve(MODEL).folder == Path(MODEL)
    assert published.asked == []


def test_no_other_module_imports_a_network_library() -> None:
    package = Path(hub.__file__).parents[1]
    words = ("huggingface_hub", "urllib.request", "import requests", "http.client", "httpx", "import socket")
    users = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if any(word in path.read_text(encoding="utf-8") for word in words)
    }
    assert users == {"checkpoint/hub.py"}
