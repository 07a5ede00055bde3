# SPDX-License-Identifier: Apache-2.0
"""`verify --against`: an engine folder alone, with its checkpoint, is enough to check both parities."""

from __future__ import annotations

from pathlib import Path

import pytest

from shadowc.measure.against import verify_against
from shadowc.spec.errors import InputError, VerificationError


def test_engine_agrees_with_its_checkpoint_in_both_parities(sparse_engine: Path, tiny_checkpoint: Path) -> None:
    report = verify_against(sparse_engine, str(tiny_checkpoint), prompts=4, tokens=16)
    report.require()
    assert report.parity.selection == 0
    assert report.parity.scores is not None
    assert [(run.scope, run.density.heads) for run in report.runs] == [
        (scope, density) for scope in ("local", "global") for density in (1.0, 0.5, 0.2)
    ]
    assert all(run.tokens >= 16 for run in report.runs)


def test_int8_engine_is_held_to_parity_a_only(int8_engine: Path, tiny_checkpoint: Path) -> None:
    report = verify_against(int8_engine, str(tiny_checkpoint))
    report.require()
    assert report.parity.selection == 0
    assert report.runs == ()


def test_another_checkpoint_is_refused(sparse_engine: Path, tiny_checkpoint: Path) -> None:
    with pytest.raises(InputError, match="another checkpoint"):
        verify_against(sparse_engine, str(tiny_checkpoint), load_format="dummy")


def test_an_order_that_names_other_neurons_is_noticed(
    sparse_engine: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shadowc.runtime.engine import Engine

    sound = Engine.neuron_orders
    monkeypatch.setattr(Engine, "neuron_orders", lambda engine: {k: v[::-1].copy() for k, v in sound(engine).items()})
    with pytest.raises(VerificationError, match="does not compute"):
        verify_against(sparse_engine, str(tiny_checkpoint), prompts=1, tokens=2).require()
