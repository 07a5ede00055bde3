# SPDX-License-Identifier: Apache-2.0
"""Means of heads: what they are, what a skipped head leaves, and who carries them from the trace to the predictor.

Letters: B texts, T tokens, L layers, H heads, D head size.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from shadowc.checkpoint.resolve import ModelCheckpoint
from shadowc.sparsity import collect as module
from shadowc.sparsity import record
from shadowc.sparsity.collect import collect, sampled_positions
from shadowc.sparsity.families import decoder_of
from shadowc.sparsity.importance import META_FILE, TENSORS_FILE, ImportanceTrace
from shadowc.sparsity.means import head_means
from shadowc.sparsity.predictor import META_FILE as PREDICTOR_META
from shadowc.sparsity.predictor import TENSORS_FILE as PREDICTOR_TENSORS
from shadowc.sparsity.predictor import Predictor
from shadowc.sparsity.reference import MaskedModel
from shadowc.sparsity.train import train
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError
from shadowc.spec.options import CollectOptions, TrainOptions

OPTIONS = CollectOptions(positions=48, length=16, criterion="l2norm", fill="mean")
TRAIN = TrainOptions(neuron_block=16, width=32, epochs=1)
FLOAT32 = 2e-5


@pytest.fixture(scope="module")
def source(family: str, request: pytest.FixtureRequest) -> ModelCheckpoint:
    found: ModelCheckpoint = request.getfixturevalue({"opt": "checkpoint", "llama": "llama_checkpoint"}[family])
    return found


@pytest.fixture(scope="module")
def trace(source: ModelCheckpoint, model: Any, tmp_path_factory: pytest.TempPathFactory) -> ImportanceTrace:
    return collect(source, OPTIONS, tmp_path_factory.mktemp("means") / "t", model=model)


@pytest.fixture(scope="module")
def predictor(source: ModelCheckpoint) -> Predictor:
    """Random, with means that are no smaller than contexts are."""
    means_LHD = np.random.default_rng(5).standard_normal((3, 4, 16)).astype(np.float32)
    return replace(Predictor.dummy(source.facts, 16, 32), means_LHD=means_LHD)


def contexts(model: Any, ids_BT: torch.Tensor) -> list[torch.Tensor]:
    """Of every layer what its output projection reads, [B,T,H,D]."""
    seen: list[torch.Tensor] = []
    projections = [module for name, module in model.named_modules() if name.endswith(("out_proj", "o_proj"))]
    hooks = [one.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for one in projections]
    with torch.no_grad():
        model(input_ids=ids_BT)
    for hook in hooks:
        hook.remove()
    return [context.reshape(*ids_BT.shape, 4, 16) for context in seen]


def test_means_are_those_of_the_recorded_positions_and_of_no_others(trace: ImportanceTrace, model: Any) -> None:
    means = trace.means()
    assert sorted(means) == [1, 2, 3]
    ids_NT = torch.from_numpy(trace.tokens_NT.astype(np.int64))
    for layer, context_NTHD in enumerate(contexts(model, ids_NT)):
        if layer:
            wanted_HD = context_NTHD[trace.sequence_M, trace.position_M].mean(0).numpy()
            np.testing.assert_allclose(means[layer], wanted_HD, atol=FLOAT32)
            assert np.abs(means[layer] - context_NTHD.mean((0, 1)).numpy()).max() > 100 * FLOAT32


def test_importance_of_heads_is_measured_from_their_means_and_that_of_layer_0_from_zero(
    trace: ImportanceTrace, model: Any
) -> None:
    ids_NT = torch.from_numpy(trace.tokens_NT.astype(np.int64))
    for layer, context_NTHD in enumerate(contexts(model, ids_NT)):
        context_MHD = context_NTHD[trace.sequence_M, trace.position_M].numpy()
        from_HD = trace.means().get(layer, np.zeros((4, 16), np.float32))
        wanted_MH = np.linalg.norm(context_MHD - from_HD, axis=-1)
        np.testing.assert_allclose(trace.heads_MLH[:, layer], wanted_MH, atol=10 * FLOAT32)


def test_a_run_that_ended_while_means_were_taken_begins_anew(
    trace: ImportanceTrace, source: ModelCheckpoint, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "head_means", end)
        with pytest.raises(KeyboardInterrupt):
            collect(source, OPTIONS, tmp_path / "t", model=model)
    again = collect(source, OPTIONS, tmp_path / "t", model=model)
    assert (again.folder / TENSORS_FILE).read_bytes() == (trace.folder / TENSORS_FILE).read_bytes()


def test_fill_zero_collects_no_means_and_the_published_scores(
    source: ModelCheckpoint, model: Any, trace: ImportanceTrace, tmp_path: Path
) -> None:
    zero = collect(source, OPTIONS.model_copy(update={"fill": "zero"}), tmp_path / "t", model=model)
    assert (zero.means(), zero.meta["fill"]) == ({}, "zero")
    np.testing.assert_array_equal(zero.heads_MLH[:, 0], trace.heads_MLH[:, 0])
    assert np.abs(zero.heads_MLH[:, 1:] - trace.heads_MLH[:, 1:]).max() > 0.01
    for layer in range(zero.layers):
        np.testing.assert_array_equal(zero.neurons_MF(layer), trace.neurons_MF(layer))
    assert train(zero, source.facts, TRAIN).fill == "zero"


def test_a_run_that_was_interrupted_keeps_its_means(
    source: ModelCheckpoint, model: Any, trace: ImportanceTrace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = module.record_batch, 0

    def stop(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(record, "BATCH_BYTES", 1)  # one sequence a batch
    monkeypatch.setattr(module, "record_batch", stop)
    with pytest.raises(KeyboardInterrupt):
        collect(source, OPTIONS, tmp_path / "t", model=model)
    monkeypatch.setattr(module, "head_means", lambda *_: pytest.fail("means were made again"))
    again = collect(source, OPTIONS, tmp_path / "t", model=model)
    np.testing.assert_allclose(again.heads_MLH, trace.heads_MLH, atol=10 * FLOAT32)
    for layer, mean_HD in trace.means().items():
        np.testing.assert_array_equal(again.means()[layer], mean_HD)


def test_a_text_without_finite_contexts_is_left_out_of_the_means(tiny_model: Any) -> None:
    ids_NT = np.random.default_rng(0).integers(4, 320, (3, 12))
    positions = sampled_positions(3, 12, 30, 0)
    without = head_means(tiny_model, ids_NT[:2], positions[:2])
    block = decoder_of(tiny_model).blocks[2]

    def spoil(_: Any, inputs: Any) -> Any:
        spoils = torch.equal(last_T, torch.from_numpy(ids_NT[2]))
        return (inputs[0] * torch.nan,) if spoils else None

    last_T = torch.zeros(0)

    def remember(_: Any, inputs: Any) -> None:
        nonlocal last_T
        last_T = inputs[0][0]

    handles = [
        tiny_model.model.decoder.embed_tokens.register_forward_pre_hook(remember),
        block.layer.self_attn.v_proj.register_forward_pre_hook(spoil),
    ]
    try:
        found = head_means(tiny_model, ids_NT, positions)
    finally:
        for handle in handles:
            handle.remove()
    for layer, mean_HD in without.items():
        np.testing.assert_allclose(found[layer], mean_HD, atol=1e-7)


def test_skipped_heads_leave_exactly_their_means(model: Any, predictor: Predictor, source: ModelCheckpoint) -> None:
    """No head of a predicted layer is active: what the output projections read is known without running attention."""
    ids_BT = torch.randint(4, 320, (2, 10), generator=torch.Generator().manual_seed(1))
    masked = MaskedModel(model, predictor.plan("local"), predictor)
    projections = [block.context.module for block in decoder_of(model).blocks[1:]]
    handles = [
        one.register_forward_pre_hook(lambda _, inputs, mean_HD=mean_HD: (  # type: ignore[misc]
            torch.from_numpy(mean_HD).reshape(-1).expand(inputs[0].shape),
        ))
        for one, mean_HD in zip(projections, predictor.means.values(), strict=True)
    ]  # fmt: skip
    with torch.no_grad():
        wanted = model(input_ids=ids_BT).logits
    for handle in handles:
        handle.remove()
    result = masked.logits(ids_BT, density=Density(0.0, 1.0), masked_from=0)
    assert not result.mask_heads.any()
    torch.testing.assert_close(result.logits, wanted, rtol=0, atol=FLOAT32)
    zeroed = MaskedModel(model, predictor.plan("local"), replace(predictor, means_LHD=None))
    moved = zeroed.logits(ids_BT, density=Density(0.0, 1.0), masked_from=0).logits - wanted
    assert moved.abs().max() > 0.1


def test_active_heads_and_dense_tokens_know_nothing_of_means(model: Any, predictor: Predictor) -> None:
    ids_BT = torch.randint(4, 320, (2, 10), generator=torch.Generator().manual_seed(1))
    masked = MaskedModel(model, predictor.plan("local"), predictor)
    with torch.no_grad():
        dense = model(input_ids=ids_BT).logits
    full = masked.logits(ids_BT, density=Density(), masked_from=0).logits
    torch.testing.assert_close(full, dense, rtol=0, atol=FLOAT32)
    tail = masked.logits(ids_BT, density=Density(0.25, 1.0), masked_from=6).logits
    torch.testing.assert_close(tail[:, :6], dense[:, :6], rtol=0, atol=FLOAT32)
    assert (tail[:, 6:] - dense[:, 6:]).abs().max() > 0.1


def test_a_predictor_carries_the_traces_means_through_its_folder(
    source: ModelCheckpoint, trace: ImportanceTrace, tmp_path: Path
) -> None:
    train(trace, source.facts, TRAIN, tmp_path / "p")
    loaded = Predictor.load(tmp_path / "p", source.facts)
    assert (loaded.fill, loaded.plan(None).fill) == ("mean", "mean")
    for layer, mean_HD in trace.means().items():
        np.testing.assert_array_equal(loaded.means[layer], mean_HD)


def test_a_predictor_and_a_trace_from_before_there_were_means_load_and_leave_zero(
    source: ModelCheckpoint, trace: ImportanceTrace, predictor: Predictor, tmp_path: Path
) -> None:
    predictor.save(tmp_path / "p")
    tensors = load_file(tmp_path / "p" / PREDICTOR_TENSORS)
    save_file({k: v for k, v in tensors.items() if not k.startswith("mean.")}, tmp_path / "p" / PREDICTOR_TENSORS)
    assert Predictor.load(tmp_path / "p", source.facts).fill == "zero"

    old = tmp_path / "t"
    old.mkdir()
    tensors = load_file(trace.folder / TENSORS_FILE)
    save_file({k: v for k, v in tensors.items() if not k.startswith("mean.")}, old / TENSORS_FILE)
    meta = json.loads((trace.folder / META_FILE).read_text())
    del meta["fill"]
    (old / META_FILE).write_text(json.dumps(meta))
    assert train(ImportanceTrace.load(old), source.facts, TRAIN).fill == "zero"


def test_damaged_means_are_refused(source: ModelCheckpoint, predictor: Predictor, tmp_path: Path) -> None:
    predictor.save(tmp_path / "p")
    whole = load_file(tmp_path / "p" / PREDICTOR_TENSORS)
    assert (tmp_path / "p" / PREDICTOR_META).is_file()
    mean_HD = whole["mean.heads.2"]
    for damaged, message in (
        ({k: v for k, v in whole.items() if k != "mean.heads.2"}, "not a complete predictor.*mean.heads.2"),
        ({**whole, "mean.heads.2": mean_HD * np.float32(np.nan)}, "a mean of a head is not finite"),
        ({**whole, **{f"mean.heads.{n}": mean_HD[:3].copy() for n in (1, 2, 3)}}, r"shape \[3, 3, 16\]"),
        ({**whole, **{f"mean.heads.{n}": mean_HD[:, :8].copy() for n in (1, 2, 3)}}, "size of a head's mean 8"),
    ):
        save_file(damaged, tmp_path / "p" / PREDICTOR_TENSORS)
        with pytest.raises(InputError, match=message):
            Predictor.load(tmp_path / "p", source.facts)
