# SPDX-License-Identifier: Apache-2.0
"""Every command on an engine for TensorRT, on a machine without a GPU: one sentence, or all that needs no device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Shadowc
from tests.runtime.tensorrt_folder import write_folder

pytestmark = pytest.mark.skipif(
    Path("/dev/nvidia0").exists(), reason="an NVIDIA GPU is here; the sentences are for machines without one"
)
NO_GPU = ("this machine has no NVIDIA driver", "the NVIDIA driver sees no GPU")


@pytest.fixture(scope="module")
def plan_engine(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tensorrt") / "tiny.trt"
    write_folder(engine, out)
    return out


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "a lazy dog"),
        ("run", "a lazy dog", "--json", "--density", "0.5"),
        ("eval", "--text", "TEXT"),
        ("bench",),
    ],
)
def test_what_needs_the_device_says_in_one_sentence_that_there_is_none(
    shadowc: Shadowc, plan_engine: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("One neuron is one record. " * 20)
    command, *rest = (str(text) if argument == "TEXT" else argument for argument in arguments)
    result = shadowc(command, plan_engine, *rest)
    assert result.exit_code == 6
    said = result.stderr.strip().splitlines()
    assert len(said) == 2
    assert said[0].startswith(f"error: {plan_engine} cannot run here: ")
    assert any(sentence in said[0] for sentence in NO_GPU)
    assert said[1].startswith("next: run it on a machine with an NVIDIA GPU")
    assert "--model opt-tiny --target cpu" in said[1]
    assert not result.stdout


@pytest.mark.parametrize(
    ("command", "rest", "says"),
    [
        ("bench", ("--threads", "2"), "threads: for engines of target cpu"),
        ("run", ("a dog", "--threads", "2"), "threads: for engines of target cpu"),
        ("run", ("a dog", "--reference"), "reference: for engines of target cpu"),
        ("verify", ("--against", "opt-mini"), "this works on engines of target cpu"),
    ],
)
def test_what_works_on_cpu_engines_only_says_so(
    shadowc: Shadowc, plan_engine: Path, command: str, rest: tuple[str, ...], says: str
) -> None:
    result = shadowc(command, plan_engine, *rest)
    assert result.exit_code == 3
    assert says in result.stderr
    assert "next: " in result.stderr


def test_inspect_shows_library_cards_and_profile(shadowc: Shadowc, plan_engine: Path) -> None:
    result = shadowc("inspect", plan_engine)
    assert result.exit_code == 0, result.output
    for text in (
        "tensorrt-rtx, fp32 weights",
        "TensorRT for RTX 1.7.1.116",
        "compute capability 8.0, 8.6, 8.9, and from 12.0 on",
        "1 to 4 rows, contexts of up to 64 tokens",
        "decode.plan",
    ):
        assert text in result.stdout


def test_inspect_json_is_the_manifest_and_the_sizes_of_its_weights(shadowc: Shadowc, plan_engine: Path) -> None:
    found = json.loads(shadowc("inspect", plan_engine, "--json").stdout)
    manifest = json.loads((plan_engine / "engine.json").read_text())
    assert {name: found[name] for name in manifest} == manifest
    assert sum(found["stored_bytes"].values()) == sum(weight["bytes"] for weight in manifest["tensorrt"]["weights"])


def test_verify_checks_every_file_without_a_device(shadowc: Shadowc, plan_engine: Path, tmp_path: Path) -> None:
    import shutil

    result = shadowc("verify", plan_engine)
    assert result.exit_code == 0, result.output
    assert "all as compiled" in result.stdout
    copy = Path(shutil.copytree(plan_engine, tmp_path / "copy"))
    (copy / "decode.plan").write_bytes(b"edocde")
    result = shadowc("verify", copy)
    assert result.exit_code == 5
    assert "decode.plan has changed" in result.stderr
