# SPDX-License-Identifier: Apache-2.0
"""A model of opt-350m's form, stored as its owner stores it, through every stage and command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import shadowc
from shadowc.checkpoint.opt import layer_names
from shadowc.measure.against import verify_against
from shadowc.measure.bench import bench
from shadowc.measure.bisect import bisect
from shadowc.measure.evaluate import evaluate
from shadowc.runtime.load import verify
from shadowc.sparsity.importance import ImportanceTrace
from shadowc.spec.density import Density
from shadowc.spec.options import TrainOptions
from tests.conftest import TINY, random_model, write_tokenizer
from tests.e2e import compiled
from tests.measure.test_bench_evaluate import TEXT
from tests.measure.test_bisect import alter, larger
from tests.measure.test_parity import changed, failing, named, parity_of

if TYPE_CHECKING:
    from transformers import OPTForCausalLM

CONFIG = {**TINY, "word_embed_proj_dim": 32, "do_layer_norm_before": False}
PROMPT = np.array([[2, 40, 50, 60, 70, 80]], np.int64)
LAYER = 2
NAMES = layer_names(LAYER)


@pytest.fixture(scope="module")
def model() -> OPTForCausalLM:
    return random_model(CONFIG)


@pytest.fixture(scope="module")
def checkpoint(model: OPTForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pickled, with names that begin with `decoder.`, without the tied head."""
    import torch

    folder = tmp_path_factory.mktemp("last") / "opt-last"
    model.config.save_pretrained(folder)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    torch.save({name.removeprefix("model."): tensor for name, tensor in state.items()}, folder / "pytorch_model.bin")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def engine_folder(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shadowc.compile(compiled.options(checkpoint, tmp_path_factory.mktemp("engine") / "last.engine"))


def tokens(model: OPTForCausalLM, count: int = 24) -> list[list[int]]:
    import torch

    found: list[list[int]] = model.generate(
        torch.from_numpy(PROMPT), max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=1
    ).tolist()
    return found


@pytest.mark.parametrize("changes", [{"weights": "int8", "scope": "local"}, {"weights": "int4", "mask": "sequence"}])
def test_every_type_of_weights_and_mask_passes_the_gate(
    checkpoint: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    engine = shadowc.load(shadowc.compile(compiled.options(checkpoint, tmp_path / "e", **changes)))
    layers = engine.manifest.parity["layers"]
    assert isinstance(layers, list)
    assert max(layers) < 1e-5, "rounding must be modelled, not tolerated"
    engine.generate(PROMPT, max_new_tokens=4, min_new_tokens=4, density=0.5)
    assert engine.last_stats.active_neuron_share < 0.7


def test_engine_generates_what_transformers_generates_and_verifies(
    engine_folder: Path, checkpoint: Path, model: OPTForCausalLM
) -> None:
    engine = shadowc.load(engine_folder)
    assert engine.generate(PROMPT, max_new_tokens=24, min_new_tokens=24, density=1.0).tolist() == tokens(model)
    assert verify(engine_folder).passed
    report = verify_against(engine_folder, str(checkpoint), prompts=2, tokens=8)
    report.require()
    assert {run.density.neurons for run in report.runs} == {1.0, 0.5, 0.2}


def test_reference_graph_agrees_with_the_kernels_when_masked(engine_folder: Path) -> None:
    ids = np.random.default_rng(1).integers(4, 320, (2, 20), dtype=np.int64)
    kernels, oracle = (shadowc.load(engine_folder, reference=flag) for flag in (False, True))
    for density in (1.0, 0.2):
        ours = kernels.logits(ids, density=density, prompt_tokens=4)
        theirs = oracle.logits(ids, density=density, prompt_tokens=4)
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.slow
def test_style_dejavu_collects_trains_and_verifies(checkpoint: Path, tmp_path: Path) -> None:
    train = TrainOptions(neuron_block=16, width=32, epochs=2, batch=32, style="dejavu")
    folder = shadowc.compile(compiled.options(checkpoint, tmp_path / "e", train=train, scope="local"))
    verify_against(folder, str(checkpoint), prompts=2, tokens=8).require()


def test_trace_records_what_attention_reads(checkpoint: Path, model: OPTForCausalLM, tmp_path: Path) -> None:
    """The residual stream, since the norms come last."""
    import torch

    from shadowc.checkpoint.resolve import resolve
    from shadowc.sparsity.collect import collect

    collect(resolve(str(checkpoint)), compiled.COLLECT, tmp_path / "t.trace")
    trace = ImportanceTrace.load(tmp_path / "t.trace")
    with torch.no_grad():
        out = model(torch.from_numpy(trace.tokens_NT.astype(np.int64)), output_hidden_states=True)
    rows = out.hidden_states[LAYER][trace.sequence_M, trace.position_M].numpy()
    assert np.abs(trace.input_ME(LAYER) - rows).max() < 1e-2  # stored in float16


def test_bench_and_eval_know_every_part(engine_folder: Path) -> None:
    report = bench(engine_folder, densities=[Density(0.5, 0.2)], tokens=8, prompt_tokens=4, rounds=1)
    shares = [row.shares for row in report.rows if row.shares is not None]
    assert shares
    assert all(share.unknown == () for share in shares)
    evaluate(shadowc.load(engine_folder), TEXT, densities=[], window=32)


def test_bytes_of_a_token_count_the_narrow_head_and_the_projections(engine_folder: Path) -> None:
    part = shadowc.load(engine_folder).manifest.bytes_per_token
    assert part.lm_head == 4 * 32 * 320
    assert part.other > 2 * 4 * 32 * 64
    described = json.loads((engine_folder / "genai_config.json").read_text())["model"]["decoder"]
    assert (described["hidden_size"], described["head_size"]) == (64, 16)


ALTERED = {
    "project_in": ("residual.0", (3, 5), "model.decoder.project_in.weight", (5, 3)),
    "project_out": ("logits", (5, 3), "model.decoder.project_out.weight", (3, 5)),
    NAMES.attention_norm.weight: (f"layers.{LAYER}.middle", (4,), NAMES.attention_norm.weight, (4,)),
    NAMES.ffn_norm.bias: (f"residual.{LAYER + 1}", (4,), NAMES.ffn_norm.bias, (4,)),
}


@pytest.mark.parametrize("stored", ALTERED)
def test_bisect_names_the_altered_parameter(engine_folder: Path, checkpoint: Path, tmp_path: Path, stored: str) -> None:
    tensor, index, parameter, at = ALTERED[stored]
    folder = Path(shutil.copytree(engine_folder, tmp_path / "altered.engine"))
    alter(folder, stored, index, larger)
    report = bisect(folder, str(checkpoint))
    assert report.first is not None
    assert report.first.tensor == tensor
    assert [(one.name, one.at) for one in report.altered] == [(parameter, at)]


def test_bisect_finds_nothing_in_a_sound_engine(engine_folder: Path, checkpoint: Path) -> None:
    bisect(engine_folder, str(checkpoint)).require()


def test_planted_defects_are_found_in_the_part_that_has_them(engine_folder: Path, checkpoint: Path) -> None:
    """A norm that is applied before its block, and a projection with one wrong number at either end."""

    def norm_first(model: onnx.ModelProto) -> None:
        norm, ffn = named(model, f"layers.{LAYER}.middle"), named(model, f"layers.{LAYER}.ffn")
        ffn.input[0] = f"layers.{LAYER}.attention.sum"
        assert norm.op_type == "LayerNormalization"

    def scaled(product: str) -> object:
        def change(model: onnx.ModelProto) -> None:
            node = next(node for node in model.graph.node if product in node.input)
            columns = 64 if product == "project_in" else 32
            factors = np.ones(columns, np.float32)
            factors[3] = 1.01
            model.graph.initializer.append(numpy_helper.from_array(factors, "factors.planted"))
            name, node.output[0] = node.output[0], "sound.planted"
            multiply = helper.make_node("Mul", ["sound.planted", "factors.planted"], [name], name="planted")
            model.graph.node.insert(list(model.graph.node).index(node) + 1, multiply)

        return change

    report = parity_of(changed(engine_folder, norm_first), checkpoint)
    assert failing(report) == [LAYER]
    report = parity_of(changed(engine_folder, scaled("project_in")), checkpoint)  # type: ignore[arg-type]
    assert [problem.split(":")[0] for problem in report.problems()] == ["embedding"]
    report = parity_of(changed(engine_folder, scaled("project_out")), checkpoint)  # type: ignore[arg-type]
    assert [problem.split(":")[0] for problem in report.problems()] == ["logits"]
