# SPDX-License-Identifier: Apache-2.0
"""Calibration text: sampling from the model, reading files, and what bad files get."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shadowc.checkpoint.opt import OptFacts
from shadowc.checkpoint.resolve import Checkpoint
from shadowc.sparsity import calibration
from shadowc.sparsity.calibration import calibration_text, check_data, pack, read_text, sample_text, sequence_count
from shadowc.spec.errors import InputError
from shadowc.spec.options import CollectOptions
from shadowc.spec.progress import EventProgress

SENTENCE = "One neuron is one record, one head is one record, and a record that is not read costs nothing. "
FREQUENCY = 0.03  # 2000 draws: standard error of a share is at most 0.011


def test_sampled_text_is_the_same_for_the_same_seed_and_differs_for_another(tiny_model: Any, facts: OptFacts) -> None:
    first, again, other = (sample_text(tiny_model, facts, 4, 24, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert (first[:, 0] == facts.bos).all()
    assert len({row.tobytes() for row in first}) == 4


def test_sampled_text_does_not_depend_on_the_batch(
    tiny_model: Any, facts: OptFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = sample_text(tiny_model, facts, 5, 16, 0)
    monkeypatch.setattr(calibration, "LARGEST_BATCH", 2)
    assert np.array_equal(sample_text(tiny_model, facts, 5, 16, 0), together)


def test_sampled_tokens_follow_the_models_own_probabilities(tiny_model: Any, facts: OptFacts) -> None:
    ids_NT = sample_text(tiny_model, facts, 2000, 2, 3)
    with torch.no_grad():
        logits_V = tiny_model(input_ids=torch.tensor([[facts.bos]])).logits[0, -1].double()
    logits_V[facts.pad] = -torch.inf
    expected_V = torch.softmax(logits_V, -1).numpy()
    found_V = np.bincount(ids_NT[:, 1], minlength=facts.vocab) / len(ids_NT)
    assert np.abs(found_V - expected_V).max() < FREQUENCY
    assert found_V[facts.pad] == 0


def test_sampling_refuses_logits_that_are_not_finite(tiny_model: Any, facts: OptFacts) -> None:
    broken = copy.deepcopy(tiny_model)
    with torch.no_grad():
        broken.model.decoder.final_layer_norm.weight[0] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        sample_text(broken, facts, 2, 8, 0)


def test_the_models_own_text_is_told_by_its_tokens(tiny_model: Any, checkpoint: Checkpoint) -> None:
    options = CollectOptions(positions=16, length=12)
    events: list[Any] = []
    text = calibration_text(tiny_model, checkpoint, options, EventProgress(events.append))
    assert text.source == "self"
    assert text.ids_NT.shape == (sequence_count(options, checkpoint.facts), 12)
    assert len(text.text.sha256) == 64
    assert events[-1].done == events[-1].total == len(text.ids_NT)


def test_a_length_beyond_the_context_is_cut_to_it(facts: OptFacts) -> None:
    assert calibration.sequence_length(CollectOptions(length=4096), facts) == facts.positions


def test_a_text_file_is_packed_into_sequences_that_start_with_bos(
    tiny_model: Any, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_text(SENTENCE * 60)
    options = CollectOptions(data=str(path), positions=16, length=16)
    text = calibration_text(tiny_model, checkpoint, options)
    assert text.source == "a.txt"
    assert text.ids_NT.shape == (8, 16)
    assert (text.ids_NT[:, 0] == checkpoint.facts.bos).all()
    assert not (text.ids_NT[:, 1:] == checkpoint.facts.bos).any()


def test_packing_spreads_over_the_whole_text_and_separates_documents(facts: OptFacts) -> None:
    documents = [list(range(100, 150)), list(range(200, 250))]
    ids_NT = pack(documents, facts, 2, 11, Path("a.txt"))
    assert ids_NT[0, 1:].tolist() == list(range(100, 110))
    assert ids_NT[1, 1:].tolist() == [facts.eos, *range(200, 209)]


def test_json_lines_give_their_field_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in ("one", " ", "two")) + "\n\n")
    assert read_text(path)[0] == ["one", "two"]


def test_only_the_text_has_to_be_encodable(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"text": "whole \ud83d\ude00", "title": "half \ud83d"}')
    assert read_text(path)[0] == ["whole \U0001f600"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\t\n", "holds no text"),
        ("a.jsonl", b"\n", "holds no text"),
        ("a.jsonl", b'{"text": ""}\n', "holds no text"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', "line 2 has no field 'text'"),
        ("a.jsonl", b'{"text": 3}\n', "line 1 has int in field 'text'"),
        ("a.jsonl", b'{"text": "x"\n', "line 1 is not JSON"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "a \\ud83d b"}\n',
            r"line 2 has half of a surrogate pair .* 'a \\ud83d b'",
        ),
        pytest.param("a.jsonl", b"[" * 100_000, "line 1 cannot be read", id="brackets without end"),
        pytest.param("a.jsonl", b'{"text": %s}' % (b"1" * 5000), "line 1 cannot be read", id="a very long number"),
        ("a.txt", b"ab\xff", "is not UTF-8 at byte 2"),
        ("a.csv", b"x", "ends in .txt or .jsonl"),
    ],
)
def test_a_file_without_usable_text_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_text(tmp_path / name)
    assert caught.value.hint


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        read_text(tmp_path / "none.txt")


def test_a_text_that_is_too_short_is_refused_with_what_was_needed_and_found(
    tiny_model: Any, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a b c")
    with pytest.raises(InputError, match=r"8 sequences of 16 tokens need 120 tokens, found \d+$"):
        calibration_text(tiny_model, checkpoint, CollectOptions(data=str(path), positions=16, length=16))


def test_a_file_needs_a_tokenizer(tiny_model: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(SENTENCE)
    without = dataclasses.replace(checkpoint, tokenizer=None)
    with pytest.raises(InputError, match="no tokenizer files"):
        calibration_text(tiny_model, without, CollectOptions(data=str(tmp_path / "a.txt")))


def test_a_text_file_and_self_pass_the_quick_check(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff is not UTF-8, and nobody has read it yet")
    check_data(str(tmp_path / "a.txt"))
    check_data("self")


@pytest.mark.parametrize(
    ("name", "says"),
    [(".", "is a folder"), ("a.md", "ends in .txt or .jsonl"), ("none.txt", "no file"), ("x" * 300, "looked at")],
)
def test_what_cannot_be_calibration_text_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, says: str
) -> None:
    (tmp_path / "a.md").write_text("text")
    monkeypatch.setattr(Path, "read_bytes", None)  # would fail if it were called
    with pytest.raises(InputError, match=says) as caught:
        check_data(str(tmp_path / name))
    assert caught.value.hint
