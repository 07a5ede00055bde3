# SPDX-License-Identifier: Apache-2.0
"""Every command but bench on a real engine: what it writes, where, and what a script gets."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY

import pytest
from typer.testing import Result

from shadowc.checkpoint.resolve import resolve
from shadowc.cli.inspect import sparsity_facts
from shadowc.runtime.load import read_manifest
from shadowc.sparsity.predictor import Predictor
from shadowc.spec.manifest import MANIFEST_FILE
from tests.cli.conftest import Shadowc

Quick = tuple[str, ...]
PROMPT = "The quick brown fox"


def test_a_second_compile_finds_the_engine_up_to_date(
    shadowc: Shadowc, engine: Path, tiny_checkpoint: Path, quick: Quick
) -> None:
    before = (engine / MANIFEST_FILE).stat().st_mtime_ns
    result = shadowc("compile", "--model", tiny_checkpoint, "--out", engine, *quick)
    assert result.stdout == f"{engine} is up to date\n"
    assert (engine / MANIFEST_FILE).stat().st_mtime_ns == before


def test_compile_tells_stages_sizes_and_parity(
    shadowc: Shadowc, engine: Path, tiny_checkpoint: Path, quick: Quick
) -> None:
    other = engine.with_name("other.engine")
    result = shadowc("compile", "--model", tiny_checkpoint, "--out", other, "--head-density", "0.25", *quick)
    assert result.exit_code == 0, result.output
    assert "train (reused)" in result.stdout
    assert "0.25 of the heads, 0.5 of the neurons" in result.stdout
    assert "positions against torch" in result.stdout
    assert f'next: shadowc run {other} "Once upon a time"' in result.stdout
    assert "error" not in result.stderr


def test_compile_json_is_the_manifest_with_the_costs(shadowc: Shadowc, engine: Path, tiny_checkpoint: Path) -> None:
    out = engine.with_name("dense.engine")
    result = shadowc("compile", "--model", tiny_checkpoint, "--out", out, "--predictor", "none", "--json")
    found = json.loads(result.stdout)
    assert found["manifest"] == json.loads((out / MANIFEST_FILE).read_text())
    assert found["manifest"]["sparsity"] is None
    assert {"checkpoint", "trace", "passes", "emit", "parity"} <= {stage["name"] for stage in found["stages"]}


@pytest.mark.parametrize("other", [True, False])
def test_compile_tells_that_a_predictor_was_trained_on_another_checkpoint_and_takes_it(
    shadowc: Shadowc, tiny_checkpoint: Path, tmp_path: Path, other: bool
) -> None:
    checkpoint = resolve(str(tiny_checkpoint))
    found = Predictor.dummy(checkpoint.facts, 16, 32)
    told = {"name": "cousin", "identity": "0123456789abcdef0"} if other else checkpoint.described
    replace(found, meta={**found.meta, "model": told}).save(tmp_path / "predictor")
    engine = ("--predictor", tmp_path / "predictor", "--out", tmp_path / "e")
    result = shadowc("compile", "--model", tiny_checkpoint, *engine)
    assert result.exit_code == 0, result.output
    said = f"was trained on another checkpoint: model hash 0123456789abcdef (cousin), and {tiny_checkpoint} has"
    assert (said in " ".join(result.stderr.split())) == other


def test_compile_dumps_the_graph_after_every_pass(
    shadowc: Shadowc, engine: Path, tiny_checkpoint: Path, quick: Quick, tmp_path: Path
) -> None:
    dump = tmp_path / "passes"
    result = shadowc("compile", "--model", tiny_checkpoint, "--out", tmp_path / "e", "--dump-passes", dump, *quick)
    assert result.exit_code == 0, result.output
    assert len(sorted(dump.glob("*.onnx"))) >= 6
    (dump / "99-older.onnx").write_bytes(b"of a longer schedule")
    again = ("compile", "--model", tiny_checkpoint, "--out", tmp_path / "e", "--dump-passes")
    assert shadowc(*again, dump, *quick).exit_code == 0
    assert not (dump / "99-older.onnx").exists()
    (dump / "notes.txt").write_text("mine")
    result = shadowc(*again, dump, *quick)
    assert result.exit_code == 2
    assert "holds files that are no dump: notes.txt" in result.stderr
    result = shadowc(*again, "/proc/passes", *quick)
    assert result.exit_code == 2
    assert "choose another folder with --dump-passes" in result.stderr


def test_run_streams_prompt_and_text_and_tells_the_cost_beside(shadowc: Shadowc, engine: Path) -> None:
    result = shadowc("run", engine, PROMPT, "--max-new-tokens", "8")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(PROMPT)
    assert "tokens/s" not in result.stdout
    for word in ("tokens/s", "active heads", "active neurons", "read per token", "0.5 of the heads"):
        assert word in result.stderr


def run_json(shadowc: Shadowc, engine: Path, *flags: str) -> dict[str, float]:
    result = shadowc("run", engine, PROMPT, "--max-new-tokens", "8", "--json", *flags)
    assert result.exit_code == 0, result.output
    found: dict[str, float] = json.loads(result.stdout)
    return found


def test_run_json_counts_what_was_read_and_not_what_was_asked_for(shadowc: Shadowc, engine: Path) -> None:
    dense = run_json(shadowc, engine, "--density", "1")
    sparse = run_json(shadowc, engine, "--head-density", "0.5", "--neuron-density", "0.2")
    assert dense["active_heads"] == dense["heads"]
    assert sparse["active_neurons"] < 0.5 * sparse["neurons"]
    assert sparse["bytes_per_token"] < dense["bytes_per_token"]
    assert sparse["density"] == {"heads": 0.5, "neurons": 0.2}


def test_reference_run_gives_the_same_text(shadowc: Shadowc, engine: Path) -> None:
    assert run_json(shadowc, engine, "--reference")["text"] == run_json(shadowc, engine)["text"]


def test_inspect_shows_plan_sizes_parity_and_recall(shadowc: Shadowc, engine: Path) -> None:
    result = shadowc("inspect", engine)
    for word in ("4 layers", "ranked globally", "tolerance", "neuron records", "layer 3", "weights.bin", "predictor"):
        assert word in result.stdout
    assert result.stderr == ""


def test_inspect_json_is_the_manifest_with_sizes_and_expected_bytes(shadowc: Shadowc, engine: Path) -> None:
    found = json.loads(shadowc("inspect", engine, "--json", "--densities", "1,0.5/0.2").stdout)
    manifest = json.loads((engine / MANIFEST_FILE).read_text())
    assert {name: found[name] for name in manifest} == manifest
    assert [one["density"] for one in found["expected_bytes"]] == [
        {"heads": 0.5, "neurons": 0.5},  # the engine's own
        {"heads": 1.0, "neurons": 1.0},
        {"heads": 0.5, "neurons": 0.2},
    ]
    own, dense, sparse = (one["total"] for one in found["expected_bytes"])
    assert sparse < own < dense
    assert 0 <= manifest["files"]["weights.bin"]["size"] - sum(found["stored_bytes"].values()) < 100_000  # gaps


def test_inspect_tells_what_every_pass_did(shadowc: Shadowc, engine: Path) -> None:
    lines = shadowc("inspect", engine).stdout.splitlines()
    (row,) = (line for line in lines if line.startswith("sparsify_attention"))
    assert "4 layers" in row
    names = [step["name"] for step in json.loads((engine / MANIFEST_FILE).read_text())["passes"]["model"]]
    at = next(at for at, line in enumerate(lines) if line.startswith("pass ")) + 1
    assert [line.split()[0] for line in lines[at : at + len(names)]] == names


def test_inspect_draws_the_sparse_graph(shadowc: Shadowc, engine: Path, tmp_path: Path) -> None:
    picture = tmp_path / "graph.svg"
    result = shadowc("inspect", engine, "--graph", picture, "--head-density", "0.25")
    assert (result.exit_code, result.stderr) == (0, f"graph drawn to {picture}\n")
    assert "1 of 4 heads" in picture.read_text()
    missing = shadowc("inspect", engine, "--graph", tmp_path / "none" / "graph.svg")
    assert missing.exit_code == 2
    assert "cannot write" in missing.stderr


def test_inspect_refuses_a_density_that_nothing_is_drawn_at(shadowc: Shadowc, engine: Path) -> None:
    result = shadowc("inspect", engine, "--density", "0.3")
    assert result.exit_code == 2
    assert "--densities" in result.stderr


def test_flags_that_would_do_nothing_are_refused(
    shadowc: Shadowc, engine: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    said = shadowc("verify", engine, "--prompts", "200").stderr
    assert "--prompts has no effect without --against" in said
    dense = tmp_path / "dense.engine"
    assert shadowc("compile", "--model", tiny_checkpoint, "--predictor", "none", "--out", dense).exit_code == 0
    for command, flag in (("bench", "--densities"), ("inspect", "--densities")):
        result = shadowc(command, dense, flag, "0.5")
        assert result.exit_code == 2
        assert f"{flag} has no effect on an engine without a predictor" in result.stderr


def test_the_bytes_of_a_predictor_are_read_per_mask(engine: Path) -> None:
    manifest = read_manifest(engine)
    assert manifest.sparsity is not None
    held = manifest.model_copy(update={"sparsity": manifest.sparsity.model_copy(update={"mask": "sequence"})})
    assert sparsity_facts(manifest)["predictor"].endswith("read per token")
    assert sparsity_facts(held)["predictor"].endswith("read per mask")


def test_verify_passes_on_a_fresh_engine(shadowc: Shadowc, engine: Path) -> None:
    result = shadowc("verify", engine)
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(shadowc("verify", engine, "--quick", "--json").stdout)["passed"] is True


def test_collect_and_train_make_what_compile_takes(
    shadowc: Shadowc, tiny_checkpoint: Path, quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command is the one before's hint; the model lies in a folder whose name is no short name."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_checkpoint, tmp_path / "my model")
    collected = shadowc("collect", "--model", "./my model", "--out", "t", *quick)
    assert "64 of 4 layers" in collected.stdout
    trained = hinted(shadowc, collected, "--epochs", "2", "--width", "32", "--out", "p")
    assert trained.exit_code == 0, trained.output
    for column in ("predictor at 0.2", "normalised at 0.2", "static at 0.2", "static at 0.5"):
        assert trained.stdout.count(column) == 2
    compiled = hinted(shadowc, trained, "--out", "e", "--json")
    assert json.loads(compiled.stdout)["manifest"]["sparsity"]["predictor"]["width"] == 32


def hinted(shadowc: Shadowc, before: Result, *more: str) -> Result:
    """Type what the last line of a command's output proposes."""
    proposed = shlex.split(before.stdout.splitlines()[-1].removeprefix("next: "))
    assert proposed[0] == "shadowc"
    return shadowc(*proposed[1:], *more)


def test_train_on_a_trace_needs_neither_the_model_nor_the_network(
    shadowc: Shadowc, quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path
) -> None:
    from shadowc.checkpoint import resolve as module

    monkeypatch.chdir(tmp_path)
    assert shadowc("collect", "--model", tiny_checkpoint, *quick).exit_code == 0
    monkeypatch.setattr(module, "resolve", None)  # would fail if it were called
    result = shadowc("train", "--trace", "opt-tiny.trace", "--epochs", "1", "--width", "32", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["folder"] == "opt-tiny.predictor"


def test_train_from_a_model_collects_first(
    shadowc: Shadowc, tiny_checkpoint: Path, quick: Quick, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = shadowc("train", "--model", tiny_checkpoint, "--epochs", "1", "--width", "32", "--json", *quick)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["report"]["found"].keys() == {"heads", "neurons"}
    assert (tmp_path / "opt-tiny.predictor").is_dir()
    assert (tmp_path / "opt-tiny.trace").is_dir()


def test_eval_compares_methods_on_a_text(shadowc: Shadowc, engine: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A sparse engine reads what a token needs. " * 4, encoding="utf-8")
    arguments = ("eval", engine, "--text", text, "--densities", "1,0.5/0.2", "--methods", "predictor,random")
    (found,) = json.loads(shadowc(*arguments, "--json").stdout)["corpora"]
    dense, *rows = found["rows"]
    last = rows[-1]
    assert (last["method"], last["head_density"], last["neuron_density"]) == ("random", 0.5, 0.2)
    assert rows[0]["metrics"]["bits_per_byte"] == dense["metrics"]["bits_per_byte"] | {"above_dense": ANY}
    shown = shadowc(*arguments)
    assert "bits/byte" in shown.stdout
    assert "protocol decode: every token" in shown.stdout
    assert len([line for line in shown.stdout.splitlines() if line.startswith("random")]) == 2


def test_doctor_passes_here_and_names_the_library(shadowc: Shadowc) -> None:
    result = shadowc("doctor")
    assert result.exit_code == 0, result.output
    assert "libshadowc_ort.so" in result.stdout


def test_doctor_fails_when_two_runtimes_overwrite_each_other(shadowc: Shadowc, monkeypatch: pytest.MonkeyPatch) -> None:
    from shadowc.runtime import ort_package

    versions = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}
    monkeypatch.setattr(ort_package, "installed", lambda: versions)
    result = shadowc("doctor")
    assert result.exit_code == 6
    assert "overwrite each other" in result.stderr
    assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu" in result.stderr


@pytest.mark.parametrize("version", ["2.9.1+cpu", "1.13"])
def test_doctor_fails_when_a_package_is_too_old(
    shadowc: Shadowc, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    from shadowc.cli import doctor_checks as doctor

    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: version if name == "torch" else real(name))
    result = shadowc("doctor", "--json")
    assert result.exit_code == 6
    assert {"name": "torch", "state": "fails", "found": f"{version}, too old", "hint": "pip install 'torch>=2.10'"} in (
        json.loads(result.stdout)["findings"]
    )


def test_the_script_ends_with_the_exit_code_and_without_a_traceback(tmp_path: Path) -> None:
    code = "from shadowc.cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "run", str(tmp_path / "none"), "text"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: no engine folder at ")
    assert "Traceback" not in done.stderr


def test_version_is_the_packages(shadowc: Shadowc) -> None:
    from shadowc import __version__

    assert shadowc("--version").stdout == f"shadowc {__version__}\n"


def test_bisect_finds_nothing_on_a_fresh_engine(shadowc: Shadowc, engine: Path, tiny_checkpoint: Path) -> None:
    result = shadowc("bisect", engine, "--against", tiny_checkpoint)
    assert result.exit_code == 0, result.output
    assert "23 tensors as in torch" in result.stdout  # norms and residuals inside operators have none of their own
    found = json.loads(shadowc("bisect", engine, "--against", tiny_checkpoint, "--json").stdout)
    assert (found["first"], len(found["compared"])) == (None, 23)


def test_run_shows_a_line_of_masks_per_token_and_the_same_text(shadowc: Shadowc, engine: Path) -> None:
    plain = shadowc("run", engine, PROMPT, "--max-new-tokens", "6")
    shown = shadowc("run", engine, PROMPT, "--max-new-tokens", "6", "--map")
    assert shown.exit_code == 0, shown.output
    assert shown.stdout == plain.stdout
    lines = [line for line in shown.stderr.splitlines() if line.startswith("token ")]
    assert [line.split(",")[0] for line in lines] == [f"token {at}" for at in range(2, 7)]
    assert all(line.split("heads ")[1].startswith("4 ") for line in lines)  # layer 0 is dense


def test_run_saves_the_map_as_a_picture(shadowc: Shadowc, engine: Path, tmp_path: Path) -> None:
    picture = tmp_path / "map.png"
    result = shadowc("run", engine, PROMPT, "--max-new-tokens", "6", "--save-map", picture, "--json")
    assert result.exit_code == 0, result.output
    assert f"map of 5 tokens saved to {picture}" in result.stderr
    assert json.loads(result.stdout)["new_tokens"] == 6
    assert picture.read_bytes().startswith(b"\x89PNG")
