# SPDX-License-Identifier: Apache-2.0
"""Fixtures of this folder: the tiny checkpoint resolved, and importance traces with planted contents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shadowc.checkpoint.models import resolve_model
from shadowc.checkpoint.opt import OptFacts
from shadowc.checkpoint.resolve import Checkpoint, ModelCheckpoint, resolve
from shadowc.sparsity.importance import ImportanceTrace, TraceWriter, relative, trace_layout

MakeTrace = Callable[..., ImportanceTrace]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny matrices: threads that wait for each other make the tests up to a hundred times slower on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    return resolve(str(tiny_checkpoint))


@pytest.fixture(scope="session")
def llama_checkpoint(llama_folder: Path) -> ModelCheckpoint:
    return resolve_model(str(llama_folder))


@pytest.fixture(scope="session")
def facts(checkpoint: Checkpoint) -> OptFacts:
    return checkpoint.facts


@pytest.fixture(scope="module", params=["opt", "llama"])
def family(request: pytest.FixtureRequest) -> str:
    """Both kinds of models, for tests that hold for either."""
    return str(request.param)


@pytest.fixture(scope="module")
def model(family: str, request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue({"opt": "tiny_model", "llama": "llama_model"}[family])


@pytest.fixture(scope="session")
def small_facts() -> OptFacts:
    """The shape of the planted traces."""
    return OptFacts("planted", 3, 16, 4, 4, 64, 320, 64, 2, 2, 1)


@pytest.fixture(scope="session")
def make_trace(tmp_path_factory: pytest.TempPathFactory, small_facts: OptFacts) -> MakeTrace:
    """Write a trace from arrays: context [M,E], heads [M,L,H], neurons [L,M,F], sequence [M]; inputs by name, [M,E]."""

    def make(
        context_ME: np.ndarray[Any, Any],
        heads_MLH: np.ndarray[Any, Any],
        neurons_LMF: np.ndarray[Any, Any],
        sequence_M: np.ndarray[Any, Any],
        inputs: Mapping[str, np.ndarray[Any, Any]] | None = None,
    ) -> ImportanceTrace:
        rows = len(context_ME)
        meta = {
            "facts": asdict(small_facts), "criterion": "plainact", "model": {"name": "planted", "identity": "0"},
            "text": {"sha256": "0" * 64, "paragraphs": [], "complete": True}, "source": "self", "seed": 0,
            "positions": rows, "loss": 0.0,
        }  # fmt: skip
        writer = TraceWriter(tmp_path_factory.mktemp("planted") / "trace", "")
        writer.begin(trace_layout(small_facts, rows, 1, 8), meta)
        writer.put("context", context_ME)
        writer.put("sequence", sequence_M)
        writer.put("heads", heads_MLH)
        pairs = [relative(neurons_MF.astype(np.float32)) for neurons_MF in neurons_LMF]
        for layer, (relative_MF, _) in enumerate(pairs):
            writer.put(f"neurons.{layer}", relative_MF)
        writer.put("neurons.scale", np.stack([scale_M for _, scale_M in pairs], axis=1))
        for name, input_ME in (inputs or {}).items():
            writer.put(name, input_ME)
        writer.commit(rows, meta)
        return writer.finish()

    return make


GROUPS = 4


@pytest.fixture(scope="session")
def plant(make_trace: MakeTrace) -> Callable[..., ImportanceTrace]:
    """Return traces in which four groups of units matter by turns.

    `dependent`: the context says whose turn it is; otherwise the turn is drawn without telling the context.
    Neuron n belongs to group n % 4 in every layer, head h to group h.
    """

    def make(*, dependent: bool, seed: int = 0, rows: int = 800) -> ImportanceTrace:
        rng = np.random.default_rng(seed)
        turn_M = rng.integers(GROUPS, size=rows)
        told_M = turn_M if dependent else rng.integers(GROUPS, size=rows)
        context_ME = rng.standard_normal((rows, 16)).astype(np.float32)
        context_ME[np.arange(rows), told_M] += 4
        surprise_M11 = np.exp(rng.standard_normal((rows, 1, 1)))

        def importance(units: int) -> np.ndarray[Any, Any]:
            """Quiet noise, the unit's own strength, and ten times that when its turn has come."""
            strength_U = 0.5 + np.arange(units) / units
            mine_MU = np.arange(units)[None] % GROUPS == turn_M[:, None]
            noise_MLU = rng.random((rows, 3, units)) + 0.5
            scores_MLU = (strength_U * np.where(mine_MU, 10, 1))[:, None] * noise_MLU * surprise_M11
            return scores_MLU.astype(np.float32)

        neurons_LMF = importance(64).transpose(1, 0, 2)
        return make_trace(context_ME, importance(GROUPS), neurons_LMF, np.arange(rows) // 40)

    return make
