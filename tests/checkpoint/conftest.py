# SPDX-License-Identifier: Apache-2.0
"""Every test of the checkpoint stage has a cache of its own and no network."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The stage cache of this test; not below tmp_path, so that tests may compare all of that."""
    root = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("SHADOWC_CACHE", str(root))
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    return root


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening any socket or looking up any name fails the test."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were really converted."""
    from shadowc.checkpoint import pickled

    done, original = [], pickled.convert

    def count(path: Path, *others: object) -> None:
        done.append(path.name)
        original(path, *others)

    monkeypatch.setattr(pickled, "convert", count)
    return done
