# SPDX-License-Identifier: Apache-2.0
"""An engine of style dejavu, from the checkpoint to text: what it says of itself, and what its gate catches.

Letters: S tokens, L predicted layers, N units of a kind.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import shadowc
from shadowc.checkpoint.resolve import resolve
from shadowc.cli import flags, inspect
from shadowc.compiler import compile_engine
from shadowc.measure.against import stored_predictor
from shadowc.measure.evaluate import evaluate
from shadowc.measure.free_running import free_run
from shadowc.measure.parity import ParityReport, check_parity
from shadowc.runtime import variants
from shadowc.runtime.engine import Engine
from shadowc.runtime.load import read_manifest
from shadowc.sparsity.predictor import Predictor
from shadowc.sparsity.reference import MaskedModel, load_torch_model
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError, ShadowcError, UnsupportedError
from shadowc.spec.manifest import MODEL_FILE
from shadowc.spec.ops import PREDICT_UNITS
from shadowc.spec.options import TrainOptions
from shadowc.spec.progress import NullProgress
from shadowc.stages import Stages
from tests.conftest import TOKENIZER_TEXT
from tests.e2e import compiled
from tests.e2e.defects import Defect, named, with_defect

PROMPT = np.array([[2, 40, 50, 60, 70, 80]], np.int64)
HALF = Density(0.5, 0.5)
LAYER = 2
DEJAVU = compiled.TRAIN.model_copy(update={"style": "dejavu"})


@pytest.fixture(scope="module")
def dejavu_engine(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fp32, a trained predictor for each layer. Read only."""
    out = tmp_path_factory.mktemp("dejavu") / "tiny.engine"
    return shadowc.compile(compiled.options(tiny_checkpoint, out, train=DEJAVU))


def predictor_of(checkpoint: Path) -> Predictor:
    """The predictor that the engine was compiled with, from the cache."""
    options = compiled.options(checkpoint, Path("unused"), train=DEJAVU)
    predictor = Stages(options, NullProgress()).predictor(resolve(str(checkpoint)))
    assert predictor is not None
    return predictor


def test_engine_says_its_style_and_what_its_predictors_read(dejavu_engine: Path, sparse_engine: Path) -> None:
    manifest, other = read_manifest(dejavu_engine), read_manifest(sparse_engine)
    assert manifest.sparsity is not None
    assert other.sparsity is not None
    assert (manifest.sparsity.style, manifest.sparsity.scope) == ("dejavu", "local")
    assert (other.sparsity.style, other.sparsity.scope) == ("shadow", "global")
    assert manifest.sparsity.predictor["labels"] == "top"
    assert manifest.sparsity.predictor["widths"] == other.sparsity.predictor["widths"] == {"heads": 32, "neurons": 32}
    assert inspect.sparsity_facts(manifest)["predictor"].startswith("style dejavu, trained")
    # two more networks of 64 inputs read theirs: 2 kinds x 2 layers x (32 x 64 + 32) numbers of 4 bytes; and the
    # operator of a layer has a factor for each of 2 x 32 hidden values and 4 + 16 units
    more = 2 * 2 * (32 * 64 + 32) + 3 * (2 * 32 + 4 + 16)
    assert manifest.bytes_per_token.predictor - other.bytes_per_token.predictor == more * 4


def test_engine_generates_what_transformers_generates_when_dense(dejavu_engine: Path, tiny_model: Any) -> None:
    import torch

    ours = shadowc.load(dejavu_engine).generate(PROMPT, max_new_tokens=24, min_new_tokens=24, density=1.0)
    theirs = tiny_model.generate(
        torch.from_numpy(PROMPT), max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=1
    )
    assert ours.tolist() == theirs.tolist()


def test_kernels_compute_the_share_that_is_asked_for_in_every_layer(dejavu_engine: Path) -> None:
    engine = shadowc.load(dejavu_engine, skip_zeros=False)
    trace = engine.trace(PROMPT, 0.5)
    assert (trace.active["heads"] == 2).all()
    assert (trace.active["neurons"] == 8).all()
    read = []
    for density in (1.0, 0.5, 0.2):
        engine.generate(PROMPT, max_new_tokens=8, min_new_tokens=8, density=density)
        read.append(engine.last_stats.bytes_read_kernels)
    assert read[0] > read[1] > read[2]


def test_reference_graph_agrees_with_the_kernels_when_masked(dejavu_engine: Path) -> None:
    ids = np.random.default_rng(0).integers(4, 320, (1, 20))
    mine, other = (shadowc.load(dejavu_engine, reference=flag).logits(ids, 0.5) for flag in (False, True))
    np.testing.assert_allclose(mine, other, atol=2e-5 * np.abs(other).max())


@pytest.mark.parametrize("density", [HALF, Density(0.25, 0.2)])
def test_engine_and_masked_torch_model_generate_alike(
    dejavu_engine: Path, tiny_checkpoint: Path, density: Density
) -> None:
    engine = shadowc.load(dejavu_engine)
    assert engine.manifest.sparsity is not None
    predictor = stored_predictor(engine, engine.manifest.sparsity)
    masked = MaskedModel(load_torch_model(resolve(str(tiny_checkpoint))), predictor.plan(None), predictor)
    prompts_BS = np.random.default_rng(1).integers(4, 320, (4, 8))
    run = free_run(engine, masked, prompts_BS, tokens=24, density=density)
    assert run.passed(), run
    assert run.tokens == 4 * 24


def test_int8_is_modelled_by_the_gate(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = compiled.options(tiny_checkpoint, tmp_path / "int8.engine", train=DEJAVU, weights="int8")
    parity = read_manifest(shadowc.compile(options)).parity
    assert 0 < float(parity["scores"]) < 5e-3  # type: ignore[arg-type]


def test_controls_take_the_place_of_every_layers_scores(dejavu_engine: Path, tiny_checkpoint: Path) -> None:
    engine, predictor = shadowc.load(dejavu_engine), predictor_of(tiny_checkpoint)
    masked = MaskedModel(load_torch_model(resolve(str(tiny_checkpoint))), predictor.plan(None), predictor)
    rng = np.random.default_rng(3)
    pair = rng.random((1, 1, 3, 4), np.float32), rng.random((1, 1, 3, 16), np.float32)
    ids = rng.integers(4, 320, (1, 12))
    found = engine.logits(ids, 0.5, scores=lambda tokens: (pair[0].repeat(tokens, 1), pair[1].repeat(tokens, 1)))
    wanted = masked.logits(ids, density=HALF, masked_from=1, scores=pair).logits.numpy()
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())
    assert np.abs(found - engine.logits(ids, 0.5)).max() > 0.1


def test_evaluation_measures_the_predictor_beside_its_controls(dejavu_engine: Path) -> None:
    text = " ".join(TOKENIZER_TEXT) * 4
    report = evaluate(shadowc.load(dejavu_engine), text, densities=[HALF])
    assert [row.method for row in report.rows] == ["predictor", "static", "normalised", "random"]
    assert len({round(row.bits_per_byte, 6) for row in report.rows}) >= 3
    assert all(row.active_neurons == pytest.approx(0.5) for row in report.rows)


def test_no_ranking_over_all_layers_is_made_of_it(dejavu_engine: Path) -> None:
    engine = shadowc.load(dejavu_engine)
    engine.with_scope("local")
    with pytest.raises(UnsupportedError, match="every layer ranks its own units") as caught:
        engine.with_scope("global")
    assert "--style shadow" in caught.value.hint


def test_the_dense_twin_has_nothing_of_the_predictors(dejavu_engine: Path) -> None:
    twin = variants.dense(onnx.load(dejavu_engine / MODEL_FILE, load_external_data=False))
    assert not [node.name for node in twin.graph.node if node.name.startswith(("predictor.", "select."))]


def test_text_is_made_without_joining_scores_that_nobody_looks_at(dejavu_engine: Path, sparse_engine: Path) -> None:
    whole = onnx.load(dejavu_engine / MODEL_FILE, load_external_data=False)
    fewer = variants.without_joined_scores(whole)
    gone = {f"{part}.{kind}" for part in ("scores", "mask_scores", "threshold") for kind in ("heads", "neurons")}
    made = {value.name for value in whole.graph.output}
    assert made - {value.name for value in fewer.graph.output} == gone
    assert not gone & {name for node in fewer.graph.node for name in node.output}
    predictors = [node for node in fewer.graph.node if node.op_type == PREDICT_UNITS.name]
    assert [list(node.output) for node in predictors if node.name == "predictor.heads.1"] == [
        ["scores.heads.1", "threshold.heads.1", "active.heads.1"]
    ]
    shared = onnx.load(sparse_engine / MODEL_FILE, load_external_data=False)
    assert variants.without_joined_scores(shared) == shared


def test_text_masks_and_counts_are_the_same_with_and_without_joined_scores(dejavu_engine: Path) -> None:
    engine = shadowc.load(dejavu_engine)
    trace = engine.trace(PROMPT, HALF)
    np.testing.assert_array_equal(trace.logits, engine.logits(PROMPT, HALF))
    found = []
    for watch in (None, lambda masks: None):
        ids = engine.generate(PROMPT, max_new_tokens=8, min_new_tokens=8, density=HALF, watch=watch)
        found.append((ids.tolist(), engine.last_stats.heads, engine.last_stats.neurons, engine.last_stats.bytes_read))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"scope": "global"}, "do not exist yet"),
        ({"mask": "sequence"}, "makes a mask for every token"),
    ],
)
@pytest.mark.parametrize("given", ["train", "folder"])
def test_compile_refuses_what_the_style_cannot_do_before_any_work(
    tiny_checkpoint: Path, tmp_path: Path, changes: dict[str, str], sentence: str, given: str
) -> None:
    if given == "folder":
        Predictor.dummy(resolve(str(tiny_checkpoint)).facts, 16, 32, style="dejavu").save(tmp_path / "p")
        changes = {**changes, "predictor": str(tmp_path / "p")}
    before = sorted(path.name for path in tmp_path.iterdir())
    options = compiled.options(tiny_checkpoint, tmp_path / "none.engine", train=DEJAVU, **changes)
    with pytest.raises(ShadowcError, match=sentence) as caught:
        shadowc.compile(options)
    assert caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_both_styles_share_the_trace_and_nothing_else(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHADOWC_CACHE", str(tmp_path / "cache"))
    reused = {}
    for name, train in (
        ("shadow", compiled.TRAIN),
        ("dejavu", DEJAVU),
        ("scores", DEJAVU.model_copy(update={"labels": "scores"})),
    ):
        summary = compile_engine(compiled.options(tiny_checkpoint, tmp_path / f"{name}.engine", train=train))
        reused[name] = {stage.name: stage.reused for stage in summary.stages if stage.name in ("collect", "train")}
    assert reused["shadow"] == {"collect": False, "train": False}
    assert reused["dejavu"] == reused["scores"] == {"collect": True, "train": False}


def test_dummy_predictors_have_the_true_shape_and_a_seed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    changes = {"load_format": "dummy", "train": DEJAVU, "weights": "int8"}
    folders = [shadowc.compile(compiled.options(tiny_checkpoint, tmp_path / n, **changes)) for n in ("a", "b")]
    sizes = [json.loads((folder / "engine.json").read_text())["files"]["weights.bin"]["sha256"] for folder in folders]
    assert sizes[0] == sizes[1]
    part = read_manifest(folders[0])
    assert part.sparsity is not None
    assert part.sparsity.predictor["origin"] == "dummy"
    # per value of fc1 and fc2 one byte and per row a scale, rows of fc2 in groups of 16; biases in float32
    fc1, fc2 = 3 * 2 * 32 * (64 + 4), 3 * ((16 + 16) * 32 + (4 + 16) * 4)
    assert part.bytes_per_token.predictor == fc1 + fc2 + 4 * (3 * 2 * 32 + 3 * 20)


# --- planted defects ---------------------------------------------------------------------------------------


def parity_of(engine: Engine, checkpoint: Path) -> ParityReport:
    resolved, predictor = resolve(str(checkpoint)), predictor_of(checkpoint)
    return check_parity(
        engine.prober(), resolved.facts, resolved.weights, weights="fp32", block=predictor.block,
        orders=dict(enumerate(predictor.orders_LF, start=1)), sparse=True, plan=predictor.plan(None),
        predictor=predictor,
    )  # fmt: skip


def problems(report: ParityReport) -> list[str]:
    return [problem.split(":")[0] for problem in report.problems()]


def _masks_of_the_layer_before(model: onnx.ModelProto) -> None:
    for part in ("attention", "ffn"):
        mine, other = named(model, f"layers.{LAYER}.{part}"), named(model, f"layers.{LAYER - 1}.{part}")
        mine.input[1], mine.input[2] = other.input[1], other.input[2]


def _input_of_the_layer_before(model: onnx.ModelProto) -> None:
    for kind in ("heads", "neurons"):
        mine, other = (named(model, f"predictor.{kind}.{layer}") for layer in (LAYER, LAYER - 1))
        for operand in (0, -2, -1):  # and its norm
            mine.input[operand] = other.input[operand]


def _density_of_one_layer_ignored(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.ones((1, 1), np.float32), "planted"))
    named(model, f"predictor.heads.{LAYER}").input[2] = "planted"


@pytest.mark.parametrize(
    ("defect", "caught"),
    [
        (None, []),
        (_masks_of_the_layer_before, [f"layer {LAYER}"]),
        (_input_of_the_layer_before, ["scores"]),
        (_density_of_one_layer_ignored, ["selection"]),
    ],
)
def test_parity_names_the_part_that_has_the_defect(
    dejavu_engine: Path,
    tiny_checkpoint: Path,
    defect: Defect | None,
    caught: list[str],
) -> None:
    report = parity_of(with_defect(shadowc.load(dejavu_engine), defect), tiny_checkpoint)
    assert problems(report) == caught


def test_known_styles_are_listed_when_another_is_typed() -> None:
    with pytest.raises(InputError) as caught:
        flags.checked(TrainOptions, {"style": "powerinfer"}, "train")
    assert "'shadow', 'dejavu' or 'shadow+'" in str(caught.value.problems)
