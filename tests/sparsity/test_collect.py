# SPDX-License-Identifier: Apache-2.0
"""The importance trace: causal, exact, repeatable, resumable, and never half-written."""

from __future__ import annotations

import copy
import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shadowc.checkpoint.resolve import Checkpoint
from shadowc.sparsity import collect as module
from shadowc.sparsity import record
from shadowc.sparsity.collect import collect, sampled_positions
from shadowc.sparsity.importance import (
    META_FILE,
    ORIGIN_FILE,
    STATE_FILE,
    TENSORS_FILE,
    ImportanceTrace,
    Origin,
    TraceWriter,
    relative,
    trace_layout,
)
from shadowc.spec.errors import InputError, SetupError
from shadowc.spec.options import CollectOptions
from shadowc.spec.progress import EventProgress

FLOAT32 = 2e-5
HALF_STEP = 2.0**-11
SUBNORMAL_STEP = 2.0**-24
OPTIONS = CollectOptions(positions=48, length=16, fill="mean")


@pytest.fixture(scope="module")
def traces(checkpoint: Checkpoint, tiny_model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("traces")
    return {
        name: collect(checkpoint, OPTIONS.model_copy(update={"criterion": name}), folder / name, model=tiny_model)
        for name in ("plainact", "l2norm")
    }


def prefix_run(model: Any, ids_T: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], ...]:
    """The last token's layer-0 context, fc1 outputs and norm outputs, from the prefix alone with hooks of our own."""
    contexts: list[torch.Tensor] = []
    hidden: list[torch.Tensor] = []
    normed: list[torch.Tensor] = []
    layers = model.model.decoder.layers
    hooks = [layers[0].self_attn.out_proj.register_forward_pre_hook(lambda _, inputs: contexts.append(inputs[0]))]
    hooks += [layer.fc1.register_forward_hook(lambda _, __, output: hidden.append(output)) for layer in layers]
    hooks += [
        layer.self_attn.q_proj.register_forward_pre_hook(lambda _, inputs: normed.append(inputs[0])) for layer in layers
    ]
    with torch.no_grad():
        model(input_ids=torch.from_numpy(ids_T.astype(np.int64))[None])
    for hook in hooks:
        hook.remove()
    size = contexts[0].shape[-1]
    last = [np.stack([x.reshape(-1, x.shape[-1])[-1].numpy() for x in part]) for part in (hidden, normed)]
    return contexts[0].reshape(-1, size)[-1].numpy(), *last


def all_neurons(trace: ImportanceTrace) -> np.ndarray[Any, Any]:
    return np.stack([trace.neurons_MF(layer) for layer in range(trace.layers)], axis=1)


def assert_causal(trace: ImportanceTrace, model: Any) -> None:
    """Inputs depend on nothing after their token, and belong to the same token as the targets."""
    neurons_LMF = [trace.neurons_MF(layer) for layer in range(trace.layers)]
    inputs_LME = [trace.input_ME(layer) for layer in range(1, trace.layers)]
    for m in range(0, len(trace.position_M), 7):
        n, t = int(trace.sequence_M[m]), int(trace.position_M[m])
        context_E, hidden_LF, normed_LE = prefix_run(model, trace.tokens_NT[n, : t + 1])
        np.testing.assert_allclose(trace.context_ME[m], context_E, atol=FLOAT32)
        for input_ME, normed_E in zip(inputs_LME, normed_LE[1:], strict=True):
            np.testing.assert_allclose(input_ME[m], normed_E, atol=FLOAT32, rtol=HALF_STEP)
        if trace.meta["criterion"] == "l2norm":
            for layer, hidden_F in enumerate(hidden_LF):
                np.testing.assert_allclose(neurons_LMF[layer][m], np.abs(hidden_F), atol=2e-3)


@pytest.mark.parametrize("name", ["plainact", "l2norm"])
def test_inputs_and_targets_belong_to_one_token_and_see_no_later_one(
    traces: dict[str, Any], tiny_model: Any, name: str
) -> None:
    assert_causal(traces[name], tiny_model)


@pytest.mark.parametrize("shifted", ["context", "target", "inputs"])
def test_the_causality_check_catches_a_shift_by_one_token(
    checkpoint: Checkpoint, tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shifted: str
) -> None:
    """Planted defect: the input of t is taken from t + 1, or the target is."""
    original = module.record_batch

    def shift(model: Any, facts: Any, criterion: Any, ids_BT: Any, positions: Any, *means: Any) -> Any:
        rows = original(model, facts, criterion, ids_BT, positions, *means)
        later = original(model, facts, criterion, ids_BT, [p + 1 for p in positions], *means)
        if shifted == "context":
            rows.context_ME = later.context_ME
        elif shifted == "inputs":
            rows.inputs_LME = later.inputs_LME
        else:
            rows.heads_MLH, rows.neurons_LMF = later.heads_MLH, later.neurons_LMF
        return rows

    monkeypatch.setattr(module, "record_batch", shift)
    options = OPTIONS.model_copy(update={"criterion": "l2norm"})
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_causal(collect(checkpoint, options, tmp_path / "t", model=tiny_model), tiny_model)


def test_trace_says_what_it_is(traces: dict[str, Any], checkpoint: Checkpoint) -> None:
    trace = traces["plainact"]
    assert trace.meta["criterion"] == "plainact"
    model = trace.meta["model"]
    assert (model["name"], model["identity"]) == (checkpoint.facts.name, checkpoint.identity)
    assert len(model["weights"]) == len(model["tokenizer"]) == 64
    assert trace.meta["source"] == "self"
    assert trace.meta["positions"] == len(trace.context_ME) == 48
    assert trace.meta["seed"] == 0
    assert len(trace.meta["text"]["sha256"]) == 64
    assert trace.heads_MLH.shape == (48, 4, 4)
    assert all_neurons(trace).shape == (48, 4, 256)
    assert trace.facts == checkpoint.facts
    assert trace.origin == Origin(checkpoint.facts.name)


def test_trace_holds_the_dense_models_mean_loss(traces: dict[str, Any], tiny_model: Any) -> None:
    trace = traces["plainact"]
    ids_NT = torch.from_numpy(trace.tokens_NT.astype(np.int64))
    with torch.no_grad():
        loss = float(tiny_model(input_ids=ids_NT, labels=ids_NT).loss)
    assert trace.meta["loss"] == pytest.approx(loss, rel=1e-4)


def test_importance_is_finite_never_negative_and_not_all_zero(traces: dict[str, Any]) -> None:
    for trace in traces.values():
        for values in (trace.heads_MLH, all_neurons(trace)):
            assert np.isfinite(values).all()
            assert (values >= 0).all()
            assert (values.max(axis=2) > 0).all()


@given(
    st.integers(1, 40), st.integers(3, 30), st.integers(1, 600), st.integers(0, 9)
)  # sequences, length, positions, seed
def test_sampled_positions_are_inner_distinct_and_as_many_as_asked(
    count: int, length: int, wanted: int, seed: int
) -> None:
    positions = sampled_positions(count, length, wanted, seed)
    assert len(positions) == count
    assert sum(map(len, positions)) == min(wanted, count * (length - 2))
    assert max(map(len, positions)) - min(map(len, positions)) <= 1
    for of_sequence in positions:
        assert (np.diff(of_sequence) > 0).all()
        assert ((of_sequence >= 1) & (of_sequence <= length - 2)).all()


@given(
    hnp.arrays(np.float32, (3, 20), elements=st.floats(0, 1e6, width=32, allow_subnormal=False)),
)
def test_stored_neuron_scores_are_exact_to_half_precision_of_their_rows_largest(neurons_MF: Any) -> None:
    relative_MF, scale_M = relative(neurons_MF)
    restored_MF = relative_MF.astype(np.float32) * scale_M[:, None]
    bound_MF = np.maximum(HALF_STEP * neurons_MF, SUBNORMAL_STEP * scale_M[:, None]) * 1.01
    assert (np.abs(restored_MF - neurons_MF) <= bound_MF).all()


def test_collecting_twice_gives_the_same_bytes(
    checkpoint: Checkpoint, tiny_model: Any, traces: dict[str, Any], tmp_path: Path
) -> None:
    again = collect(checkpoint, OPTIONS, tmp_path / "again", model=tiny_model)
    for name in (TENSORS_FILE, META_FILE):
        assert (again.folder / name).read_bytes() == (traces["plainact"].folder / name).read_bytes()


class InterruptedRunError(Exception):
    """Stands for a killed run."""


def test_an_interrupted_run_leaves_no_trace_and_is_continued(
    checkpoint: Checkpoint,
    tiny_model: Any,
    traces: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, calls = module.record_batch, 0

    def count(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise InterruptedRunError
        return original(*arguments)

    monkeypatch.setattr(module, "record_batch", count)
    monkeypatch.setattr(record, "BATCH_BYTES", 1)  # one sequence a batch
    with pytest.raises(InterruptedRunError):
        collect(checkpoint, OPTIONS, tmp_path / "t", model=tiny_model)
    assert not (tmp_path / "t").exists()

    events: list[Any] = []
    trace = collect(checkpoint, OPTIONS, tmp_path / "t", EventProgress(events.append), model=tiny_model)

    assert calls == 4 + len(trace.tokens_NT) - 3
    assert [event.kind for event in events] == ["advance"] * (len(trace.tokens_NT) - 3)  # no text was sampled again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t"]
    whole = traces["plainact"]
    assert trace.meta["loss"] == pytest.approx(whole.meta["loss"])
    np.testing.assert_array_equal(trace.position_M, whole.position_M)
    np.testing.assert_allclose(trace.heads_MLH, whole.heads_MLH, rtol=1e-3, atol=FLOAT32)


def test_an_interrupted_run_of_other_options_is_not_continued(
    checkpoint: Checkpoint, tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise InterruptedRunError

    with monkeypatch.context() as patched:
        patched.setattr(module, "record_batch", fail)
        with pytest.raises(InterruptedRunError):
            collect(checkpoint, OPTIONS, tmp_path / "t", model=tiny_model)
    other = collect(checkpoint, OPTIONS.model_copy(update={"seed": 7}), tmp_path / "t", model=tiny_model)
    assert other.meta["seed"] == 7


def test_a_torn_state_file_means_a_new_start(checkpoint: Checkpoint, tiny_model: Any, tmp_path: Path) -> None:
    partial = tmp_path / ".t.partial"
    partial.mkdir()
    (partial / STATE_FILE).write_text('{"key": ')
    assert len(collect(checkpoint, OPTIONS, tmp_path / "t", model=tiny_model).context_ME) == 48


def test_a_folder_that_is_no_trace_is_left_alone(checkpoint: Checkpoint, tiny_model: Any, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="exists and is not an importance trace"):
        collect(checkpoint, OPTIONS, tmp_path / "mine", model=tiny_model)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "letter.txt"]


def test_a_trace_with_files_of_somebody_else_is_left_alone(
    checkpoint: Checkpoint, tiny_model: Any, tmp_path: Path
) -> None:
    options = CollectOptions(positions=16, length=8, criterion="l2norm")
    folder = collect(checkpoint, options, tmp_path / "t", model=tiny_model).folder
    (folder / "notes.txt").write_text("precious")
    with pytest.raises(InputError, match=r"notes\.txt"):
        collect(checkpoint, options, tmp_path / "t", model=tiny_model)
    assert (folder / "notes.txt").read_text() == "precious"


def test_how_the_model_was_typed_is_kept_beside_the_trace_and_not_in_it(
    checkpoint: Checkpoint, tiny_model: Any, tmp_path: Path
) -> None:
    options = CollectOptions(positions=16, length=8, criterion="l2norm")
    typed = [Origin("./my model"), Origin("someone/model", "dummy", 3)]
    traces = [
        collect(checkpoint, options, tmp_path / name, model=tiny_model, origin=origin)
        for name, origin in zip("ab", typed, strict=True)
    ]
    assert [trace.origin for trace in traces] == typed
    assert [origin.flags for origin in typed] == [
        "--model './my model'", "--model someone/model --load-format dummy --seed 3",
    ]  # fmt: skip
    for name in (META_FILE, TENSORS_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert ORIGIN_FILE in {path.name for path in (tmp_path / "a").iterdir()}


def begun(tmp_path: Path, facts: Any) -> TraceWriter:
    writer = TraceWriter(tmp_path / "t", "key")
    writer.begin(trace_layout(facts, 50, 2, 8), {})
    return writer


def test_a_full_disk_is_told_before_anything_is_recorded(
    small_facts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(SetupError, match="no space left") as caught:
        begun(tmp_path, small_facts)
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("reservation", ["by the system", "refused", "unknown"])
def test_a_trace_has_all_of_its_blocks_from_the_beginning(
    small_facts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reservation: str
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    if reservation == "refused":
        monkeypatch.setattr(os, "posix_fallocate", refuse)
    elif reservation == "unknown":
        monkeypatch.delattr(os, "posix_fallocate")
    writer = begun(tmp_path, small_facts)
    status = (tmp_path / ".t.partial" / TENSORS_FILE).stat()
    assert status.st_blocks * 512 >= status.st_size > 50 * 64 * 2 * small_facts.layers
    assert not writer.read("neurons.2").any()


def test_a_trace_in_a_place_that_cannot_be_written_is_an_input_error(small_facts: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Not a directory"):
        begun(tmp_path / "file", small_facts)


def test_an_older_trace_is_replaced(checkpoint: Checkpoint, tiny_model: Any, tmp_path: Path) -> None:
    for positions in (32, 16):
        options = CollectOptions(positions=positions, length=8, criterion="l2norm")
        trace = collect(checkpoint, options, tmp_path / "t", model=tiny_model)
        assert len(trace.context_ME) == positions


def test_weights_that_are_not_finite_are_refused_by_layer(
    checkpoint: Checkpoint, tiny_model: Any, tmp_path: Path
) -> None:
    broken = copy.deepcopy(tiny_model)
    path = tmp_path / "a.txt"
    path.write_text("the lazy dog jumps over the quick brown fox " * 80)
    with torch.no_grad():
        broken.model.decoder.layers[2].fc1.bias[0] = torch.inf
    options = CollectOptions(data=str(path), positions=16, length=16, criterion="l2norm")
    with pytest.raises(InputError, match="layer 2 is not finite"):
        collect(checkpoint, options, tmp_path / "t", model=broken)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_file_is_remembered_by_its_fingerprint(checkpoint: Checkpoint, tiny_model: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(("the lazy dog jumps over the quick brown fox " * 8 + "\n\n") * 12)
    options = CollectOptions(data=str(path), positions=16, length=16, criterion="l2norm")
    trace = collect(checkpoint, options, tmp_path / "t", model=tiny_model)
    assert trace.meta["source"] == "a.txt"
    assert len(trace.meta["text"]["paragraphs"]) == 1


def write_facts(folder: Path, **changes: object) -> None:
    meta = json.loads((folder / META_FILE).read_text())
    write_told(folder, facts=meta["facts"] | changes)


def write_told(folder: Path, **changes: object) -> None:
    meta = json.loads((folder / META_FILE).read_text())
    (folder / META_FILE).write_text(json.dumps(meta | changes))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / META_FILE).unlink(), f"has no {META_FILE}"),
        (lambda folder: (folder / META_FILE).write_text("{"), "is damaged"),
        (lambda folder: (folder / META_FILE).write_text('{"schema": 99}'), "does not have schema 4"),
        (lambda folder: (folder / META_FILE).write_text("[]"), "does not have schema 4"),
        (lambda folder: (folder / META_FILE).write_text("[" * 100_000), "is damaged"),
        (lambda folder: (folder / META_FILE).write_text('{"schema": 4}'), "tell criterion, model, text"),
        (lambda folder: write_told(folder, model=[]), "does not tell model"),
        (lambda folder: write_facts(folder, fnn=3), "lacks facts"),
        (lambda folder: write_facts(folder, ffn="3"), "lacks facts"),
        (lambda folder: write_facts(folder, layers=9), "are of two models"),
        (lambda folder: (folder / TENSORS_FILE).unlink(), "missing or damaged"),
        (
            lambda folder: (folder / TENSORS_FILE).write_bytes((folder / TENSORS_FILE).read_bytes()[:-100]),
            "missing or damaged",
        ),
    ],
)
def test_a_damaged_trace_is_refused(
    checkpoint: Checkpoint, tiny_model: Any, tmp_path: Path, damage: Any, message: str
) -> None:
    options = CollectOptions(positions=16, length=8, criterion="l2norm")
    folder = collect(checkpoint, options, tmp_path / "t", model=tiny_model).folder
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        ImportanceTrace.load(folder)
    assert "shadowc collect" in caught.value.hint


def test_the_model_is_loaded_when_none_is_given(checkpoint: Checkpoint, traces: dict[str, Any], tmp_path: Path) -> None:
    trace = collect(checkpoint, OPTIONS, tmp_path / "t")
    np.testing.assert_allclose(trace.context_ME, traces["plainact"].context_ME, atol=FLOAT32)
