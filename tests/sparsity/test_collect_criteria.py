# SPDX-License-Identifier: Apache-2.0
"""What collect does with every kind of criterion: per token, per sequence, per text; zeros, and sequences it drops."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shadowc.checkpoint.resolve import Checkpoint
from shadowc.sparsity import record, workflow
from shadowc.sparsity.collect import collect, sampled_positions
from shadowc.sparsity.criteria import criterion_names, find_criterion
from shadowc.sparsity.families import decoder_of
from shadowc.sparsity.importance import ImportanceTrace, Origin
from shadowc.sparsity.rank import ranking_of
from shadowc.sparsity.text import chosen_sequences, rank_text
from shadowc.sparsity.train import train
from shadowc.sparsity.whole import whole_signals
from shadowc.spec.errors import InputError
from shadowc.spec.options import CollectOptions, TrainOptions

OPTIONS = CollectOptions(positions=96, length=16, fill="mean")
PER_TEXT = ("epenas", "jacov", "magnitude", "nwot", "random")
Collected = Callable[[str], ImportanceTrace]


@pytest.fixture(scope="module")
def collected(checkpoint: Checkpoint, tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Collected:
    folder = tmp_path_factory.mktemp("traces")
    data = folder / "text.txt"
    data.write_text("the lazy dog jumps over the quick brown fox and the dog sees the fox " * 60, encoding="utf-8")
    found: dict[str, ImportanceTrace] = {}

    def of(name: str) -> ImportanceTrace:
        if name not in found:
            options = OPTIONS.model_copy(update={"criterion": name, "data": str(data)})
            found[name] = collect(checkpoint, options, folder / name, model=tiny_model)
        return found[name]

    return of


def test_kinds_of_criteria_are_those_of_the_documentation() -> None:
    assert tuple(name for name in criterion_names() if find_criterion(name).per == "text") == PER_TEXT
    assert {name for name in criterion_names() if find_criterion(name).per == "sequence"} == {"plainact_weight", "snip"}


@pytest.mark.parametrize("name", ["fisher", "gradnorm", "grasp", "plainact_weight", "snip", "taylor"])
def test_scores_in_a_trace_are_the_criterions_at_their_positions(
    collected: Collected, tiny_model: Any, name: str
) -> None:
    trace = collected(name)
    one = find_criterion(name)
    ids = torch.from_numpy(trace.tokens_NT[3:4].astype(np.int64))
    signals, _ = whole_signals(decoder_of(tiny_model), ids, curvature=True, rows=True)
    rows = np.flatnonzero(trace.sequence_M == 3)
    assert len(rows) >= 3
    for layer in (0, 2):
        seen = signals[layer]  # the scores of a skipped head count from what it leaves
        if layer:
            seen = replace(seen, context_BTHD=seen.context_BTHD - torch.from_numpy(trace.means()[layer]))
        heads, neurons = (values.numpy() for values in one.score(seen))
        at = (0, trace.position_M[rows]) if one.per == "token" else (np.zeros(len(rows), int),)
        np.testing.assert_allclose(trace.heads_MLH[rows, layer], heads[at], rtol=1e-3, atol=1e-5)
        found = trace.neurons_MF(layer)[rows]
        np.testing.assert_allclose(found, neurons[at], rtol=2e-3, atol=1e-3 * np.abs(neurons[at]).max())
    assert (trace.heads_MLH < 0).any() == (name in ("grasp", "taylor"))


@pytest.mark.parametrize("name", PER_TEXT)
def test_a_text_gives_one_row_which_ranks_the_units(collected: Collected, name: str) -> None:
    trace = collected(name)
    assert (trace.meta["per"], trace.meta["positions"]) == ("text", 1)
    kinds = ["heads"] if name in ("epenas", "jacov") else ["heads", "neurons"]
    assert trace.meta["kinds"] == kinds
    assert trace.heads_MLH.shape == (1, 4, 4)
    assert all(len(np.unique(trace.heads_MLH[0, layer])) == 4 for layer in range(4))
    assert (np.ptp(trace.neurons_MF(2)) > 0) == ("neurons" in kinds)


def test_a_ranking_is_the_criterion_of_the_recorded_positions(collected: Collected, tiny_model: Any) -> None:
    trace = collected("nwot")
    ids_NT = trace.tokens_NT.astype(np.int64)
    positions = sampled_positions(len(ids_NT), 16, 96, 0)
    signs = []
    for n, position in enumerate(positions):
        signals, _ = whole_signals(decoder_of(tiny_model), torch.from_numpy(ids_NT[n : n + 1]))
        signs.append(signals[1].preactivation_BTF[0, position][: min(map(len, positions)), 7] > 0)
    kernel = np.array([[float((a == b).sum()) for a in signs] for b in signs])
    wanted = np.linalg.slogdet(kernel + np.eye(len(signs)))[1]
    assert trace.neurons_MF(1)[0, 7] == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("name", ["nwot", "jacov"])
def test_batches_change_no_ranking(collected: Collected, tiny_model: Any, name: str) -> None:
    trace = collected("nwot")
    ids_NT = trace.tokens_NT.astype(np.int64)
    positions = sampled_positions(len(ids_NT), 16, 96, 0)
    one, several = (
        rank_text(tiny_model, find_criterion(name), ids_NT, positions, batch, seed=0) for batch in (1, len(ids_NT))
    )
    for mine, theirs in zip(one, several, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            np.testing.assert_allclose(mine, theirs, rtol=1e-2)


def test_sequences_of_a_ranking_are_spread_over_the_text() -> None:
    assert chosen_sequences(5).tolist() == [0, 1, 2, 3, 4]
    assert chosen_sequences(128).tolist() == list(range(0, 128, 2))
    assert len(chosen_sequences(0)) == 0


@pytest.mark.parametrize("name", PER_TEXT)
def test_training_on_a_ranking_is_refused_with_what_works(collected: Collected, name: str) -> None:
    trace = collected(name)
    with pytest.raises(InputError, match=f"criterion {name} gives one ranking") as caught:
        train(trace, trace.facts, TrainOptions(epochs=1))
    assert (
        "activation, fisher, gradnorm, grasp, l2norm, plainact, plainact_weight, snip, taylor" in caught.value.message
    )
    assert "--ranking" in caught.value.hint


def test_rankings_are_controls_beside_the_predictors_own(collected: Collected, tmp_path: Path) -> None:
    trace, others = collected("plainact"), [collected("magnitude"), collected("jacov"), collected("fisher")]
    options = TrainOptions(epochs=1, neuron_block=4, width=16)
    predictor = train(trace, trace.facts, options, tmp_path / "p", rankings=others)
    assert set(predictor.controls) == {"static", "normalised", "static-magnitude", "static-jacov", "static-fisher"}
    heads, neurons = predictor.controls["static-magnitude"]
    np.testing.assert_array_equal(heads, others[0].heads_MLH[0, 1:])
    order_F = predictor.orders_LF[1]
    np.testing.assert_allclose(neurons[1], others[0].neurons_MF(2)[0][order_F].reshape(-1, 4).sum(1), rtol=1e-5)
    # jacov has no formula for neurons: theirs are the trace's own.
    np.testing.assert_array_equal(predictor.controls["static-jacov"][1], predictor.controls["static"][1])
    np.testing.assert_array_equal(predictor.controls["static-jacov"][0], others[1].heads_MLH[0, 1:])
    assert "static-jacov" in predictor.report["found"]["heads"]["local"]["0.5"]
    whole = ranking_of(others[2], predictor.orders_LF, 4, predictor.controls["static"])
    np.testing.assert_allclose(whole[0], others[2].heads_MLH[:, 1:].mean(0), rtol=1e-6)


def test_a_signed_criterion_trains_and_the_importance_it_finds_is_a_share(collected: Collected) -> None:
    trace = collected("taylor")
    predictor = train(trace, trace.facts, TrainOptions(epochs=1, neuron_block=4, width=16))
    for kind in ("heads", "neurons"):
        for by_density in predictor.report["found"][kind].values():
            for by_method in by_density.values():
                assert all(0 <= found["mass"] <= 1 for found in by_method.values()), kind


def test_a_ranking_of_another_checkpoint_is_refused(collected: Collected) -> None:
    trace, other = collected("plainact"), copy.deepcopy(collected("magnitude"))
    other.meta["model"] = {"name": "other", "identity": "f" * 64}
    with pytest.raises(InputError, match=r"another checkpoint: other ffffffffffff, the trace in .* is of"):
        train(trace, trace.facts, TrainOptions(epochs=1), rankings=[other])
    other.meta["model"] = {**trace.meta["model"], "identity": "f" * 64, "tokenizer": "e" * 64}
    with pytest.raises(InputError, match=r"what differs: tokenizer eeeeeeeeeeeeeeee and "):
        train(trace, trace.facts, TrainOptions(epochs=1), rankings=[other])


def test_two_rankings_of_one_criterion_are_refused(collected: Collected) -> None:
    trace, other = collected("plainact"), collected("magnitude")
    with pytest.raises(InputError, match=r"found magnitude in .* and ") as caught:
        train(trace, trace.facts, TrainOptions(epochs=1), rankings=[other, collected("fisher"), other])
    assert "fisher" not in caught.value.message


@pytest.mark.parametrize("fill", ["mean", "zero"])
def test_a_ranking_measured_from_something_else_than_skipped_heads_leave_is_refused(
    collected: Collected, fill: str
) -> None:
    trace, other, whole = (copy.deepcopy(collected(name)) for name in ("plainact", "fisher", "magnitude"))
    trace.meta["fill"], other.meta["fill"] = fill, "zero" if fill == "mean" else "mean"
    with pytest.raises(InputError, match=f"was measured from {other.meta['fill']}, but heads") as caught:
        train(trace, trace.facts, TrainOptions(epochs=1), rankings=[whole, other])
    assert caught.value.hint.endswith(f"--criterion fisher --fill {fill}")


@pytest.mark.parametrize("name", PER_TEXT)
def test_means_beside_a_ranking_of_a_whole_text_are_refused_before_anything_long(name: str) -> None:
    options = CollectOptions(criterion=name, fill="mean")
    with pytest.raises(InputError, match=f"criterion {name} gives one ranking .* nothing for a skipped head to leave"):
        workflow.record(Origin("opt-mini", "auto", 0), options)


def test_share_of_exact_zeros_is_counted_before_storage(collected: Collected, tiny_model: Any) -> None:
    trace = collected("plainact")
    firing = []
    for n in np.unique(trace.sequence_M):
        ids = torch.from_numpy(trace.tokens_NT[n : n + 1].astype(np.int64))
        signals, _ = whole_signals(decoder_of(tiny_model), ids)
        at = trace.position_M[trace.sequence_M == n]
        firing += [(of_layer.hidden_BTF[0, at] == 0).float().mean() for of_layer in signals]
    assert trace.meta["zeros"]["neurons"] == pytest.approx(float(torch.stack(firing).mean()), abs=1e-3)
    assert 0.2 < trace.meta["zeros"]["neurons"] < 0.8
    assert collected("l2norm").meta["zeros"]["neurons"] < 0.01


def broken_in(sequence: int, layer: int, neuron: int, original: Any) -> Any:
    """`whole_signals`' and `stream_signals`' place: one number of one sequence is not one."""
    seen = []

    def stream(decoder: Any, ids_BT: Any, give: Any, **options: Any) -> Any:
        def broken(at: int, signals: Any) -> None:
            row = sequence - sum(seen)
            if at == layer and 0 <= row < len(ids_BT):
                signals.preactivation_BTF[row, :, neuron] = torch.nan
            give(at, signals)

        losses = original(decoder, ids_BT, broken, **options)
        seen.append(len(ids_BT))
        return losses

    return stream


@pytest.mark.parametrize("bytes_at_once", [1, 1 << 30])
def test_a_sequence_that_is_not_finite_is_left_out_and_named(
    checkpoint: Checkpoint, tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_at_once: int
) -> None:
    options = OPTIONS.model_copy(update={"criterion": "l2norm"})
    whole = collect(checkpoint, options, tmp_path / "whole", model=tiny_model)
    monkeypatch.setattr(record, "BATCH_BYTES", bytes_at_once)
    monkeypatch.setattr(record, "stream_signals", broken_in(5, 2, 9, record.stream_signals))
    trace = collect(checkpoint, options, tmp_path / "broken", model=tiny_model)
    kept_M = whole.sequence_M != 5
    assert 0 < kept_M.sum() < 96
    assert trace.meta["dropped"] == [{"sequence": 5, "place": "importance of neuron 9 in layer 2 is not finite"}]
    assert trace.meta["positions"] == kept_M.sum()
    np.testing.assert_array_equal(trace.sequence_M, whole.sequence_M[kept_M])
    np.testing.assert_allclose(trace.heads_MLH, whole.heads_MLH[kept_M], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(trace.neurons_MF(2), whole.neurons_MF(2)[kept_M], rtol=2e-3, atol=1e-4)
    np.testing.assert_allclose(trace.input_ME(1), whole.input_ME(1)[kept_M], rtol=2e-3, atol=1e-4)
    assert np.isfinite(trace.meta["loss"])
    again = ImportanceTrace.load(trace.folder)
    assert (again.sequence_M != 5).all()
    assert len(again.neurons_MF(0)) == kept_M.sum()
