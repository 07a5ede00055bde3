# SPDX-License-Identifier: Apache-2.0
"""`shadowc eval` from what was typed to what is shown, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner, Result

from shadowc.cli.app import app
from tests.eval.conftest import PROSE
from tests.eval.task_files import WIKITEXT, write_tasks


def shadowc(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def files(tmp_path: Path) -> Path:
    write_tasks(tmp_path / "tasks")
    (tmp_path / "text.txt").write_text(PROSE * 2, "utf-8")
    (tmp_path / "wiki.raw").write_text(WIKITEXT, "utf-8")
    return tmp_path


def test_a_checkpoint_and_an_engine_give_one_table(
    tiny_checkpoint: Path, predictor_folder: Path, engine_folders: dict[str, Path], files: Path
) -> None:
    what = ("--text", files / "text.txt", "--window", 24, "--densities", "0.5", "--json")
    ours = shadowc("eval", "--model", tiny_checkpoint, "--predictor", predictor_folder, *what)
    theirs = shadowc("eval", engine_folders["token"], *what)
    assert (ours.exit_code, theirs.exit_code) == (0, 0), ours.output + theirs.output
    pairs = zip(*(json.loads(one.stdout)["corpora"][0]["rows"] for one in (ours, theirs)), strict=True)
    for one, other in pairs:
        value = one["metrics"]["bits_per_byte"]["value"]
        assert value == pytest.approx(other["metrics"]["bits_per_byte"]["value"], rel=1e-5)
        assert one["method"] == other["method"]


def test_everything_at_once_is_shown_with_its_protocols(
    tiny_checkpoint: Path, predictor_folder: Path, files: Path
) -> None:
    result = shadowc(
        "eval", "--model", tiny_checkpoint, "--predictor", predictor_folder, "--text", files / "text.txt",
        "--wikitext", files / "wiki.raw", "--tasks", files / "tasks", "--task", "rte,copa", "--shots", "0,2",
        "--protocol", "decode,prompt,paper", "--scope", "local,global", "--methods", "predictor,random",
        "--densities", "0.5", "--limit", 3, "--sweep", files / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for word in ("word ppl", "copa, 2 shots: 3 examples", "± error", "not read", "under masks"):
        assert word in result.stdout
    for protocol, meaning in (("decode", "causal"), ("prompt", "one mask for all tokens"), ("paper", "not causal")):
        assert any(line.startswith(f"protocol {protocol}:") and meaning in line for line in result.stdout.splitlines())
    assert (files / "out" / "figures.csv").is_file()
    again = shadowc(
        "eval", "--model", tiny_checkpoint, "--predictor", predictor_folder, "--wikitext", files / "wiki.raw",
        "--densities", "0.5", "--limit", 3, "--sweep", files / "out", "--json",
    )  # fmt: skip
    assert again.exit_code == 0, again.output


def refused(result: Result, *words: str) -> None:
    assert result.exit_code in (2, 3), result.output
    shown = " ".join(result.output.split())
    for word in words:
        assert word in shown, shown


def test_what_does_not_go_together_is_refused(engine_folders: dict[str, Path], files: Path) -> None:
    engine, text = engine_folders["token"], ("--text", files / "text.txt")
    refused(shadowc("eval", *text), "an engine folder or a model, found neither", "--model MODEL")
    refused(shadowc("eval", engine, "--model", "opt-mini", *text), "found both")
    refused(shadowc("eval", engine), "something to evaluate on", "--tasks FOLDER")
    refused(shadowc("eval", engine, *text, "--predictor", "p"), "--predictor has no effect for an engine")
    refused(shadowc("eval", "--model", "opt-mini", *text, "--threads", 2), "--threads has no effect with --model")
    refused(shadowc("eval", engine, *text, "--shots", "5"), "--shots has no effect without --tasks")
    tasks = ("--tasks", files / "tasks", "--window", 24)
    refused(shadowc("eval", engine, *tasks), "--window has no effect on --tasks alone", "leave it out")
    refused(shadowc("eval", engine, *text, "--protocol", "paper"), "which no engine can do")


@pytest.mark.parametrize(
    ("flag", "value", "listed"),
    [
        (
            "--methods",
            "predictor,psychic",
            "predictor, static, normalised, random, calibrated, sensitivity, oracle, prompt",
        ),
        ("--protocol", "dense", "decode, prompt, paper"),
        ("--task", "boolq", "piqa, copa, openbookqa, winogrande, rte, hellaswag, arc_easy"),
        ("--shots", "few", "0,5"),
    ],
)
def test_a_name_that_is_not_known_is_refused_with_all_that_are(
    engine_folders: dict[str, Path], files: Path, flag: str, value: str, listed: str
) -> None:
    result = shadowc("eval", engine_folders["token"], "--tasks", files / "tasks", flag, value)
    refused(result, repr(value.rpartition(",")[2]), listed)


def test_an_unknown_scope_is_refused_with_both_that_are_known(files: Path) -> None:
    result = shadowc("eval", "--model", "opt-mini", "--tasks", files / "tasks", "--scope", "world")
    refused(result, "'world'", "local, global")


def test_a_predictor_of_another_checkpoint_is_refused_with_both_hashes(
    tiny_checkpoint: Path, predictor_folder: Path, files: Path
) -> None:
    other = files / "other.predictor"
    shutil.copytree(predictor_folder, other)
    meta = json.loads((other / "predictor.json").read_text())
    mine = meta["model"]["identity"]
    meta["model"]["identity"] = "0123456789abcdef0"
    (other / "predictor.json").write_text(json.dumps(meta))
    result = shadowc("eval", "--model", tiny_checkpoint, "--predictor", other, "--text", files / "text.txt")
    refused(result, "another checkpoint: model hash 0123456789abcdef (", f"has {mine[:16]}")
    refused(result, f"shadowc train --model {tiny_checkpoint}, or name")


@pytest.mark.parametrize("part", ["weights", "tokenizer"])
def test_what_differs_of_another_checkpoint_is_told(
    tiny_checkpoint: Path, predictor_folder: Path, files: Path, part: str
) -> None:
    other = Path(shutil.copytree(tiny_checkpoint, files / "other"))
    if part == "tokenizer":
        (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text("utf-8") + "\n", "utf-8")
    else:
        tensors = load_file(other / "model.safetensors")
        next(iter(tensors.values())).flat[0] += 1
        save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    known = json.loads((predictor_folder / "predictor.json").read_text())["model"]
    result = shadowc("eval", "--model", other, "--predictor", predictor_folder, "--text", files / "text.txt")
    refused(result, f"what differs: {part} {known[part][:16]} and ")
    assert ", " not in " ".join(result.output.split()).partition("what differs: ")[2].partition(" next: ")[0]


def test_the_command_that_trains_for_a_dummy_model_asks_for_a_dummy_model(
    predictor_folder: Path, tiny_checkpoint: Path, files: Path
) -> None:
    result = shadowc(
        "eval", "--model", tiny_checkpoint, "--load-format", "dummy", "--seed", 3, "--predictor", predictor_folder,
        "--text", files / "text.txt",
    )  # fmt: skip
    refused(result, f"shadowc train --model {tiny_checkpoint} --load-format dummy --seed 3, or name")


def test_the_text_that_calibrated_is_refused_in_torch_too(
    tiny_checkpoint: Path, predictor_folder: Path, files: Path
) -> None:
    import hashlib

    known = files / "known.predictor"
    shutil.copytree(predictor_folder, known)
    meta = json.loads((known / "predictor.json").read_text())
    meta["text"]["sha256"] = hashlib.sha256((files / "text.txt").read_bytes()).hexdigest()
    (known / "predictor.json").write_text(json.dumps(meta))
    result = shadowc("eval", "--model", tiny_checkpoint, "--predictor", known, "--text", files / "text.txt")
    refused(result, "calibrated on this very text")


def test_a_bad_line_reaches_the_reader(engine_folders: dict[str, Path], files: Path) -> None:
    path = files / "tasks" / "rte" / "eval.jsonl"
    path.write_text(path.read_text() + '{"sentence1": "one"}\n')
    result = shadowc("eval", engine_folders["token"], "--tasks", files / "tasks", "--task", "rte")
    refused(result, "rte/eval.jsonl, line 11 has no field 'sentence2'", "one JSON object a line")
