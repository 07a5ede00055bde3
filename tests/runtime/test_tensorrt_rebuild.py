# SPDX-License-Identifier: Apache-2.0
"""The command that makes an engine again: one that compile accepts, for the card, and for the same engine."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import onnx
import pytest
import typer.main
from onnx import helper

from shadowc.cli.app import app
from shadowc.emit.tensorrt.checks import check_capabilities
from shadowc.runtime.load import read_manifest
from shadowc.runtime.tensorrt import rebuild
from shadowc.spec.errors import UnsupportedError
from shadowc.spec.manifest import EngineManifest
from shadowc.spec.options import CompileOptions
from tests.runtime.tensorrt_folder import write_folder

CARDS = ("7.0", "7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1", "13.0")


@pytest.fixture(scope="module")
def manifest(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> EngineManifest:
    out = tmp_path_factory.mktemp("rebuild") / "engine"
    return write_folder(folders["fp32"], out, max_context=read_manifest(folders["fp32"]).model.positions)


def parsed(command: str) -> CompileOptions:
    """Options of a command as the command line reads them."""
    program, name, *arguments = shlex.split(command)
    assert (program, name) == ("shadowc", "compile")
    group: Any = typer.main.get_command(app)
    given = {
        key: value
        for key, value in group.commands[name].make_context(name, arguments).params.items()
        if value is not None
    }
    fields = {key: getattr(value, "value", value) for key, value in given.items() if key in CompileOptions.model_fields}
    return CompileOptions.model_validate({**fields, "compute_capability": tuple(given.get("compute_capability", ()))})


def changed(manifest: EngineManifest, *, part: dict[str, Any] | None = None, **fields: Any) -> EngineManifest:
    assert manifest.tensorrt is not None
    return manifest.model_copy(update={"tensorrt": manifest.tensorrt.model_copy(update=part or {}), **fields})


CHOSEN = {
    "portable": {"portable_above": "12.0", "compute_capabilities": rebuild.RTX_PORTABLE},
    "chosen": {"portable_above": None, "compute_capabilities": ("8.6",)},
    "enterprise": {"family": "trt11", "portable_above": None, "compute_capabilities": ("8.6",)},
}


@pytest.mark.parametrize("built", CHOSEN.values(), ids=CHOSEN)
@pytest.mark.parametrize("family", ["rtx1", "trt10", "trt11"])
@pytest.mark.parametrize("weights", ["fp16", "bf16", "fp32", "int8"])
@pytest.mark.parametrize("sparse", [True, False])
def test_every_command_is_accepted_and_its_engine_runs_on_the_card(
    manifest: EngineManifest, weights: str, sparse: bool, family: Any, built: dict[str, Any]
) -> None:
    engine = changed(manifest, weights=weights, part=built, **({} if sparse else {"sparsity": None}))
    for card in CARDS:
        options = parsed(rebuild.command(engine, family, card))
        if options.target != "cpu":
            check_capabilities(options)
            assert options.weights == weights
        if options.target == "tensorrt-rtx":
            chosen = options.compute_capability
            above = None if chosen else rebuild.RTX_PORTABLE[-1]
            assert rebuild.covers(chosen or rebuild.RTX_PORTABLE, above, card)
        assert (options.target == "cpu") == (card == "7.0")


def test_a_flag_for_whatever_card_is_here_would_be_refused(manifest: EngineManifest) -> None:
    command = rebuild.command(manifest, "rtx1").replace(" --out", " --compute-capability 9.0 --out")
    with pytest.raises(UnsupportedError):
        check_capabilities(parsed(command))


@pytest.mark.parametrize(
    ("card", "sparse", "says"),
    [
        ("9.0", True, "--target tensorrt "),
        ("10.0", False, "--target tensorrt "),
        ("7.5", True, "--target tensorrt "),
        ("7.5", False, "--target tensorrt-rtx --predictor none --compute-capability 7.5 "),
        ("12.1", False, "--target tensorrt-rtx --predictor none --out"),
    ],
)
def test_the_target_is_one_that_can_build_for_the_card(
    manifest: EngineManifest, card: str, sparse: bool, says: str
) -> None:
    source = manifest.model.model_copy(update={"source": "sha256-1"})
    engine = changed(manifest, weights="fp16", model=source, **({} if sparse else {"sparsity": None}))
    assert says in rebuild.command(engine, "rtx1", card)


def test_cards_that_were_asked_for_are_kept_with_another_version_of_the_library(manifest: EngineManifest) -> None:
    both = changed(manifest, part={"portable_above": None, "compute_capabilities": ("8.6", "8.9")})
    assert "--compute-capability 8.6 --compute-capability 8.9 --out" in rebuild.command(both, "rtx1", "8.9")
    assert parsed(rebuild.command(both, "rtx1", "8.0")).compute_capability == ("8.0",)
    assert "--compute-capability" not in rebuild.command(both, "trt10", "8.9")


def test_defaults_are_not_spelled_out(manifest: EngineManifest) -> None:
    model = manifest.model.model_copy(update={"source": "sha256-1", "name": "my model"})
    assert manifest.sparsity is not None
    usual = {"head_density": 0.5, "neuron_density": 0.5, "scope": "global", "neuron_block": 16}
    engine = changed(
        manifest,
        weights="fp16",
        model=model,
        sparsity=manifest.sparsity.model_copy(update=usual),
        part={"max_batch": 4},
    )
    assert rebuild.command(engine, "trt10") == "shadowc compile --model 'my model' --target tensorrt --out FOLDER"


def test_everything_else_that_engine_json_tells_is_carried(manifest: EngineManifest) -> None:
    model = manifest.model.model_copy(update={"source": "dummy-7-abcd"})
    assert manifest.sparsity is not None
    dials = {"head_density": 0.25, "neuron_density": 0.75, "scope": "local", "neuron_block": 8}
    dials |= {"exempt": (0, 2), "min_active_heads": 1, "min_active_neurons": 3}
    engine = changed(
        manifest,
        weights="bf16",
        model=model,
        sparsity=manifest.sparsity.model_copy(update=dials),
        part={"max_batch": 9, "max_context": 20},
    )
    command = rebuild.command(engine, "rtx1", "8.6")
    assert "--neuron-block 8 " in command
    assert "--min-active-heads 1 --min-active-neurons 24 --exempt 1,3 " in command  # 3 blocks of 8; layers 1 and 3
    command = command.replace("--exempt 1,3 ", "")  # a list, which the command itself takes apart
    options = parsed(command)
    assert (options.weights, options.max_batch, options.max_context) == ("bf16", 9, 20)
    assert (options.head_density, options.neuron_density, options.scope) == (0.25, 0.75, "local")
    assert (options.load_format, options.seed, options.predictor) == ("dummy", 7, "train")


@pytest.mark.parametrize("target", ["rtx1", "trt11"])
def test_an_engine_that_reads_every_neuron_is_made_so_again(manifest: EngineManifest, target: Any) -> None:
    assert parsed(rebuild.command(manifest, target)).skip_zeros
    command = rebuild.command(manifest, target, skip_zeros=False)
    assert "--no-skip-zeros" in command
    assert not parsed(command).skip_zeros


@pytest.mark.parametrize(("values", "found"), [((1, 1), True), ((0, 0), False), ((), True)])
def test_what_the_graph_says_about_zeros_is_found(tmp_path: Path, values: tuple[int, ...], found: bool) -> None:
    nodes = [
        helper.make_node("SparseFFN", ["x"], [f"y{n}"], domain="shadowc", skip_zeros=v) for n, v in enumerate(values)
    ]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [])), tmp_path / "decode.onnx")
    assert rebuild.skips_zeros(tmp_path / "decode.onnx") is found


def test_a_graph_that_cannot_be_read_changes_nothing(tmp_path: Path) -> None:
    assert rebuild.skips_zeros(tmp_path / "decode.onnx")
    (tmp_path / "decode.onnx").write_bytes(b"no graph")
    assert rebuild.skips_zeros(tmp_path / "decode.onnx")
