# SPDX-License-Identifier: Apache-2.0
"""What bad input gets: one sentence, the next command, a stable exit code; nothing is overwritten or half-written."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from shadowc.checkpoint.resolve import resolve
from shadowc.sparsity.predictor import Predictor
from shadowc.spec.manifest import MANIFEST_FILE, MODEL_FILE, SCHEMA, WEIGHTS_FILE
from tests.cli.conftest import Shadowc

INPUT, UNSUPPORTED, INCOMPATIBLE, VERIFICATION, SETUP = 2, 3, 4, 5, 6


def refused(shadowc: Shadowc, code: int, *arguments: object, says: str, hint: bool = True) -> str:
    """Run a command that must be refused; returns what it said."""
    result = shadowc(*arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines[0].startswith("error: "), result.stderr
    assert says in result.stderr
    assert not hint or lines[-1].startswith("next: "), result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture
def broken(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "broken"))


@pytest.fixture
def damaged(engine: Path, tmp_path: Path) -> Path:
    """A copy of the engine that a test may damage."""
    return Path(shutil.copytree(engine, tmp_path / "damaged"))


def compile_refused(shadowc: Shadowc, code: int, model: object, out: Path, *flags: str, says: str) -> str:
    text = refused(shadowc, code, "compile", "--model", model, "--out", out, *flags, says=says)
    assert not out.exists(), "an engine was left"
    assert not list(out.parent.glob(f".{out.name}.*")), "a temporary folder was left"
    return text


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_unknown_model_names_the_nearest(shadowc: Shadowc, tmp_path: Path) -> None:
    text = compile_refused(shadowc, INPUT, "opt-1.3", tmp_path / "e", says="opt-1.3b")
    assert "opt-1.3" in text


def test_hub_model_offline_says_what_to_do(shadowc: Shadowc, tmp_path: Path) -> None:
    compile_refused(shadowc, SETUP, "facebook/opt-125m", tmp_path / "e", "--offline", says="opt-125m")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"activation_function": "gelu"}, "gelu"),
        ({"enable_bias": False}, "enable_bias"),
    ],
    ids=["not OPT", "not ReLU", "no biases"],
)
def test_other_models_are_not_supported(
    shadowc: Shadowc, broken: Path, tmp_path: Path, change: dict[str, object], says: str
) -> None:
    change_config(broken, **change)
    compile_refused(shadowc, UNSUPPORTED, broken, tmp_path / "e", says=says)


def test_missing_weights(shadowc: Shadowc, broken: Path, tmp_path: Path) -> None:
    (broken / "model.safetensors").unlink()
    compile_refused(shadowc, INPUT, broken, tmp_path / "e", says="model.safetensors")


def test_truncated_weights(shadowc: Shadowc, broken: Path, tmp_path: Path) -> None:
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    compile_refused(shadowc, INPUT, broken, tmp_path / "e", says="model.safetensors")


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=["NaN", "Inf"])
def test_weights_that_are_not_finite(shadowc: Shadowc, broken: Path, tmp_path: Path, value: float) -> None:
    path = broken / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if name.endswith("fc1.weight"))
    tensors[name][3, 5] = value
    save_file(tensors, path, metadata={"format": "pt"})
    compile_refused(shadowc, INPUT, broken, tmp_path / "e", says="fc1.weight")


@pytest.mark.parametrize("flags", [("--head-density", "1.5"), ("--neuron-density", "-0.1"), ("--head-density", "nan")])
def test_density_outside_0_to_1(
    shadowc: Shadowc, tiny_checkpoint: Path, tmp_path: Path, flags: tuple[str, str]
) -> None:
    compile_refused(shadowc, INPUT, tiny_checkpoint, tmp_path / "e", *flags, says="from 0 to 1")


def test_run_refuses_a_density_outside_0_to_1(shadowc: Shadowc, engine: Path) -> None:
    refused(shadowc, INPUT, "run", engine, "text", "--density", "2", says="from 0 to 1")


def test_output_folder_that_is_not_an_engine_stays_as_it_is(
    shadowc: Shadowc, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "letters"
    out.mkdir()
    (out / "letter.txt").write_text("dear", encoding="utf-8")
    refused(shadowc, INPUT, "compile", "--model", tiny_checkpoint, "--out", out, says="not an engine")
    assert [path.name for path in tmp_path.iterdir()] == ["letters"]
    assert (out / "letter.txt").read_text(encoding="utf-8") == "dear"


def test_empty_calibration_text(shadowc: Shadowc, tiny_checkpoint: Path, tmp_path: Path) -> None:
    text = tmp_path / "empty.txt"
    text.write_text("", encoding="utf-8")
    compile_refused(shadowc, INPUT, tiny_checkpoint, tmp_path / "e", "--data", str(text), says="empty.txt")


def test_missing_calibration_text(shadowc: Shadowc, tiny_checkpoint: Path, tmp_path: Path) -> None:
    compile_refused(shadowc, INPUT, tiny_checkpoint, tmp_path / "e", "--data", "no.txt", says="no.txt")


def test_unknown_criterion_names_the_known_ones(shadowc: Shadowc, tiny_checkpoint: Path, tmp_path: Path) -> None:
    compile_refused(shadowc, INPUT, tiny_checkpoint, tmp_path / "e", "--criterion", "magic", says="plainact")


def test_unknown_target(shadowc: Shadowc, tiny_checkpoint: Path, tmp_path: Path) -> None:
    result = shadowc("compile", "--model", tiny_checkpoint, "--out", tmp_path / "e", "--target", "toaster")
    assert result.exit_code in (INPUT, UNSUPPORTED)
    assert "toaster" in result.stderr
    assert "cpu" in result.stderr


def test_predictor_that_is_missing_or_of_another_shape(
    shadowc: Shadowc, broken: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = tmp_path / "p"
    compile_refused(shadowc, INPUT, tiny_checkpoint, tmp_path / "e", "--predictor", str(out), says=str(out))
    facts = resolve("opt-125m", load_format="dummy").facts
    Predictor.dummy(facts, 16, 8).save(out)
    compile_refused(shadowc, INPUT, tiny_checkpoint, tmp_path / "e", "--predictor", str(out), says="does not fit")


def test_engine_that_is_not_there(shadowc: Shadowc, tmp_path: Path) -> None:
    for command in (("run", tmp_path / "none", "text"), ("inspect", tmp_path / "none"), ("verify", tmp_path / "none")):
        refused(shadowc, INPUT, *command, says="none")


def test_folder_that_is_no_engine(shadowc: Shadowc, tmp_path: Path) -> None:
    refused(shadowc, INPUT, "run", tmp_path, "text", says=MANIFEST_FILE)


def test_changed_file_is_named(shadowc: Shadowc, damaged: Path) -> None:
    path = damaged / WEIGHTS_FILE
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for command in (("run", damaged, "text"), ("verify", damaged)):
        refused(shadowc, VERIFICATION, *command, says=f"{WEIGHTS_FILE} has changed")


def test_missing_files_are_all_named(shadowc: Shadowc, damaged: Path) -> None:
    for name in (WEIGHTS_FILE, "tokenizer.json"):
        (damaged / name).unlink()
    text = refused(shadowc, VERIFICATION, "verify", damaged, says=f"{WEIGHTS_FILE} is missing")
    assert "tokenizer.json is missing" in text


@pytest.mark.parametrize(
    ("written", "instead"),
    [(rb"^.+$", b"\xff" * 64), (rb"^.+$", b""), (rb"(length\x12.)\d", rb"\1x")],
    ids=["no message", "empty", "a length that is no number"],
)
def test_a_damaged_graph_is_named(shadowc: Shadowc, damaged: Path, written: bytes, instead: bytes) -> None:
    content, changed = re.subn(written, instead, (damaged / MODEL_FILE).read_bytes(), flags=re.DOTALL)
    assert changed
    (damaged / MODEL_FILE).write_bytes(content)
    text = refused(shadowc, VERIFICATION, "inspect", damaged, says=f"{damaged / MODEL_FILE} is damaged")
    assert "compile the engine again" in text


def test_newer_schema_is_incompatible(shadowc: Shadowc, damaged: Path) -> None:
    path = damaged / MANIFEST_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": SCHEMA + 1}))
    for command in (("run", damaged, "text"), ("inspect", damaged), ("verify", damaged)):
        refused(shadowc, INCOMPATIBLE, *command, says="newer")


def test_inspect_shows_an_engine_whose_record_of_parity_holds_no_numbers(shadowc: Shadowc, damaged: Path) -> None:
    path = damaged / MANIFEST_FILE
    found = json.loads(path.read_text())
    for changed in ({"logits": "small"}, {"layers": ["small"]}):
        path.write_text(json.dumps({**found, "parity": {**found["parity"], **changed}}))
        result = shadowc("inspect", damaged)
        assert result.exit_code == 0, result.output
        assert "not recorded" in result.stdout


def test_missing_op_library(shadowc: Shadowc, engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHADOWC_ORT_LIBRARY", "/nowhere/libshadowc_ort.so")
    refused(shadowc, SETUP, "run", engine, "text", says="/nowhere/libshadowc_ort.so")


def test_prompt_longer_than_the_context(shadowc: Shadowc, engine: Path) -> None:
    refused(shadowc, INPUT, "run", engine, "zebra " * 100, says="context", hint=False)


def test_train_without_trace_and_model(shadowc: Shadowc) -> None:
    refused(shadowc, INPUT, "train", says="needs a trace or a model")


def test_flags_without_effect_are_refused_all_at_once(shadowc: Shadowc, tmp_path: Path) -> None:
    mini = ("compile", "--model", "opt-mini")
    refused(shadowc, INPUT, "train", "--trace", tmp_path, "--data", "self", says="--data has no effect with --trace")
    refused(
        shadowc, INPUT, *mini, "--predictor", "none", "--width", "32", "--scope", "local",
        says="--width, --scope have no effect with --predictor none",
    )  # fmt: skip
    refused(shadowc, INPUT, *mini, "--predictor", tmp_path, "--positions", "64", says="--positions has no effect")
    refused(shadowc, INPUT, *mini, "--load-format", "dummy", "--criterion", "l2norm", says="--criterion has no effect")


def test_train_on_what_is_no_trace(shadowc: Shadowc, tmp_path: Path) -> None:
    refused(shadowc, INPUT, "train", "--trace", tmp_path, says="not an importance trace")


def test_eval_of_a_missing_text(shadowc: Shadowc, engine: Path) -> None:
    refused(shadowc, INPUT, "eval", engine, "--text", "no.txt", says="no.txt")


def test_eval_of_an_unknown_method(shadowc: Shadowc, engine: Path, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("words", encoding="utf-8")
    refused(shadowc, INPUT, "eval", engine, "--text", text, "--methods", "psychic", says="'psychic'")


def test_unknown_flag_is_a_usage_error(shadowc: Shadowc) -> None:
    result = shadowc("compile", "--moddel", "opt-mini")
    assert result.exit_code == INPUT
    assert "--moddel" in result.output


def test_train_takes_one_source(shadowc: Shadowc, tmp_path: Path) -> None:
    refused(shadowc, INPUT, "train", "--trace", tmp_path, "--model", "opt-mini", says="not both")


def test_collect_refuses_weights_that_are_not_finite_and_leaves_nothing(
    shadowc: Shadowc, broken: Path, tmp_path: Path
) -> None:
    path = broken / "model.safetensors"
    tensors = load_file(path)
    tensors["model.decoder.layers.1.fc1.weight"][3, 5] = np.nan
    save_file(tensors, path, metadata={"format": "pt"})
    out = tmp_path / "out" / "t"
    refused(shadowc, INPUT, "collect", "--model", broken, "--out", out, says="layers.1.fc1.weight")
    assert not out.parent.exists()


@pytest.mark.parametrize("command", ["collect", "train"])
def test_a_folder_of_somebody_else_is_refused_before_the_model_is_looked_for(
    shadowc: Shadowc, tmp_path: Path, command: str
) -> None:
    (tmp_path / "thesis.txt").write_text("precious", encoding="utf-8")
    refused(shadowc, INPUT, command, "--model", "no-such-model", "--out", tmp_path, says="nothing was written")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("command", ["collect", "train"])
def test_a_folder_as_calibration_text_is_refused_before_the_model_is_looked_for(
    shadowc: Shadowc, tmp_path: Path, command: str
) -> None:
    refused(shadowc, INPUT, command, "--model", "no-such-model", "--data", tmp_path, says="is a folder")
