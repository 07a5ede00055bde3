# SPDX-License-Identifier: Apache-2.0
"""Training: the model is OPT, a resumed run is the same run, the exported folder loads in transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

import export
import kneser_ney
import opt_model
import report
import run_state
import train
from optimiser import orthogonalise, schedule

SHAPE = opt_model.Shape(layers=2, hidden=32, heads=2, neurons=64, vocab=400, positions=32)
FP32_TOLERANCE = 1e-5
FP16_WEIGHTS_TOLERANCE = 2e-2


def test_model_equals_transformers_opt_when_given_the_same_weights() -> None:
    params = opt_model.init_params(SHAPE, seed=3)
    params = {name: p + 0.05 * torch.randn_like(p) for name, p in params.items()}  # biases and norms off their start
    reference = OPTForCausalLM(OPTConfig(**opt_model.hf_config(SHAPE))).eval()
    reference.load_state_dict(opt_model.to_hf(params, torch.float32), strict=False)
    reference.tie_weights()
    ids = torch.randint(4, SHAPE.vocab, (2, 17))
    states = opt_model.hidden_states(params, ids, SHAPE.heads, torch.float32)
    with torch.no_grad():
        expected = reference(input_ids=ids).logits
    assert torch.allclose(states @ params["embed"].T, expected, atol=FP32_TOLERANCE)


def test_run_is_bit_identical_when_interrupted_and_resumed(tiny_run: train.Options, tmp_path: Path) -> None:
    options = replace(tiny_run, out=tmp_path)
    assert not train.train(replace(options, stop_after=6))
    assert train.train(replace(options, resume=True))
    whole, parts = (load_file(folder / run_state.FINAL) for folder in (tiny_run.out, tmp_path))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_run_goes_on_from_before_its_decay_when_resumed_after_the_end(tiny_run: train.Options) -> None:
    _, plateau = run_state.load_state(tiny_run.out / run_state.STATE)
    _, end = run_state.load_state(tiny_run.out / run_state.FINAL)
    assert plateau.step < end.step == 12


def test_run_ends_with_a_decay_phase_when_the_finish_file_exists(tiny_run: train.Options, tmp_path: Path) -> None:
    (tmp_path / "FINISH").touch()
    assert train.train(replace(tiny_run, out=tmp_path, steps=None, control=tmp_path))
    assert run_state.Log.read(tmp_path / run_state.LOG)[-1]["phase"] == "end"
    assert not (tmp_path / "FINISH").exists()


def test_run_starts_from_published_weights_where_their_run_left_the_text(
    tiny_run: train.Options, tmp_path: Path
) -> None:
    published, run = tmp_path / "published", tmp_path / "run"
    export.export(tiny_run.out, published, tiny_run.shape)
    (published / "report.json").write_text(json.dumps({"tokens_seen": 96 * 32, "training_seconds": 60}))
    assert not train.train(replace(tiny_run, out=run, init=published, stop_after=1))
    _, at = run_state.load_state(run / run_state.STATE)
    assert (at.step, at.windows) == (1, 96 + tiny_run.micro_batch * tiny_run.accumulate)
    assert at.seconds > 60
    tokenizers = [(folder / "tokenizer.json").read_text() for folder in (tiny_run.out, run)]
    assert json.loads(tokenizers[0]) == json.loads(tokenizers[1])


def test_checkpoint_names_read_back_what_they_wrote() -> None:
    params = {name: torch.randn_like(p) for name, p in opt_model.init_params(SHAPE, seed=3).items()}
    back = opt_model.from_hf(opt_model.to_hf(params, torch.float32), SHAPE)
    assert all(torch.equal(back[name], params[name]) for name in params)


def test_log_forgets_steps_after_the_resumed_state(tmp_path: Path) -> None:
    log = run_state.Log(tmp_path / "log.jsonl", 0)
    for step in (1, 2, 3):
        log.append({"step": step})
    run_state.Log(log.path, keep_steps=2)
    assert [line["step"] for line in run_state.Log.read(log.path)] == [1, 2]


def test_windows_visit_every_part_of_the_stream_once_a_pass() -> None:
    windows = run_state.Windows(np.arange(1000, dtype=np.uint16), 10, seed=5)
    firsts = windows.take(0, windows.per_pass)[:, 0]
    assert len(set(firsts.tolist())) == windows.per_pass
    assert len(set((firsts % 10).tolist())) == 1
    assert torch.equal(windows.take(7, 3)[1], windows.take(8, 1)[0])


def test_orthogonalise_returns_singular_values_near_one() -> None:
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, 16, 64)))
    assert values.min() > 0.5
    assert values.max() < 1.4


def test_schedule_rises_stays_and_falls_to_near_zero() -> None:
    assert schedule(0, 10, None, 0) == 0.1
    assert schedule(500, 10, None, 0) == 1.0
    fall = [schedule(step, 10, 500, 50) for step in range(500, 550)]
    assert fall == sorted(fall, reverse=True)
    assert 0 < fall[-1] < 0.02


def test_exported_folder_loads_in_transformers(tiny_run: train.Options, tmp_path: Path) -> None:
    export.export(tiny_run.out, tmp_path, tiny_run.shape)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    text = "Ann saw a red boat."
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0, 0] == opt_model.EOS_ID
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == text
    model = OPTForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, local_files_only=True).eval()
    params = load_file(tiny_run.out / run_state.FINAL)
    states = opt_model.hidden_states(params, ids, tiny_run.shape.heads, torch.float32)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert torch.allclose(states @ params["embed"].T, logits, atol=FP16_WEIGHTS_TOLERANCE)
    names = load_file(tmp_path / "model.safetensors")
    assert all(name.startswith("model.decoder.") for name in names)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]


def test_report_windows_score_every_token_once() -> None:
    for count in (2, 31, 32, 33, 48, 100):
        ids = np.arange(count, dtype=np.uint16)
        scored = [int(i) for window, first in report.windows(ids, 32, 16) for i in window[first:]]
        assert scored == list(range(1, count))


def test_report_holds_model_and_baseline_over_the_same_bytes(
    tiny_run: train.Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export.export(tiny_run.out, tmp_path, tiny_run.shape)
    same = ["--text", str(tiny_run.text[0]), "--run", str(tiny_run.out)]
    monkeypatch.setattr("sys.argv", ["kneser_ney.py", *same, "--out", str(tmp_path / "kn.json")])
    kneser_ney.main()
    command = ["report.py", "--model", str(tmp_path), *same, "--kneser-ney", str(tmp_path / "kn.json")]
    monkeypatch.setattr(
        "sys.argv", [*command, "--out", str(tmp_path / "report.json"), "--stride", "32", "--threads", "1"]
    )
    report.main()
    found = json.loads((tmp_path / "report.json").read_text())
    bits = found["bits_per_byte"]
    assert bits["opt-mini"].keys() == bits["kneser-ney-5"].keys() == {*found["heldout_bytes"], "all"}
    assert all(0 < value < 20 for table in bits.values() for value in table.values())
    assert all(0 < share < 1 for share in found["relu_by_layer"]["zeros"])
    assert found["curve"][-1]["phase"] == "end"


def test_report_bits_do_not_depend_on_batching(tiny_run: train.Options, tmp_path: Path) -> None:
    export.export(tiny_run.out, tmp_path, tiny_run.shape)
    model = OPTForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    rng = np.random.default_rng(0)
    documents = [np.array([2, *rng.integers(4, 400, n)], dtype=np.uint16) for n in (5, 90, 17)]
    together = report.model_bits(model, documents, None, 16)
    apart = sum(report.model_bits(model, [ids], None, 16) for ids in documents)
    assert abs(together - apart) < 1e-3 * apart
