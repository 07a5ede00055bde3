# SPDX-License-Identifier: Apache-2.0
"""An engine of style shadow+, from the checkpoint to text, and what its gate catches.

Letters: S tokens, L predicted layers, N units of a kind.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import shadowc
from shadowc.checkpoint.resolve import resolve
from shadowc.cli import inspect
from shadowc.measure.against import stored_plan, stored_predictor
from shadowc.measure.bisect import bisect
from shadowc.measure.free_running import free_run
from shadowc.measure.parity import check_parity
from shadowc.runtime import variants
from shadowc.runtime.decoder import Decoder
from shadowc.runtime.engine import Engine
from shadowc.runtime.load import load_cpu, read_manifest
from shadowc.runtime.prompts import Batch
from shadowc.sparsity.predictor import Predictor
from shadowc.sparsity.reference import MaskedModel, load_torch_model
from shadowc.sparsity.shares import layer_density
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError, ShadowcError, UnsupportedError
from shadowc.spec.options import TrainOptions
from shadowc.spec.tensors import PAST, START, TAIL, TOKEN
from tests.e2e import compiled
from tests.e2e.defects import Defect, named, set_int, with_defect

PROMPT = np.array([[2, 40, 50, 60, 70, 80]], np.int64)
BATCH = np.array([[1, 1, 1, 2, 40, 50], [2, 40, 50, 60, 70, 80], [1, 2, 9, 8, 7, 6]], np.int64)
"""Padded rows."""
HALF = Density(0.5, 0.5)
LAYER = 2
PLUS = TrainOptions(style="shadow+", epochs=4, batch=32)


@pytest.fixture(scope="module")
def engine_folder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fp32, trained. Read only."""
    out = tmp_path_factory.mktemp("plus") / "tiny.engine"
    return shadowc.compile(compiled.options(tiny_checkpoint, out, train=PLUS))


def test_engine_says_its_style_and_what_its_predictors_read(engine_folder: Path) -> None:
    manifest = read_manifest(engine_folder)
    assert manifest.sparsity is not None
    assert (manifest.sparsity.style, manifest.sparsity.scope, manifest.sparsity.neuron_block) == ("shadow+", "local", 1)
    assert manifest.sparsity.predictor["labels"] == "graded"
    assert inspect.sparsity_facts(manifest)["predictor"].startswith("style shadow+, trained")
    # 3 layers; heads: 64 -> 4 -> 4, neurons: 64 -> P -> 256; weights, factors and biases of 4 bytes, the tables apart
    width = manifest.sparsity.predictor["widths"]["neurons"]
    heads, neurons = 4 * (64 + 2) + 4 * (4 + 2), width * (64 + 2) + 256 * (width + 2)
    assert manifest.bytes_per_token.predictor == 3 * (heads + neurons) * 4


def test_layers_keep_their_shares_and_together_what_is_asked_for(engine_folder: Path) -> None:
    engine = shadowc.load(engine_folder, skip_zeros=False)
    plan = stored_plan(engine, engine.manifest.sparsity)  # type: ignore[arg-type]
    assert plan.shares is not None
    import torch

    for density in (0.5, 0.2):
        trace = engine.trace(PROMPT, density)
        shares_L = layer_density(torch.from_numpy(plan.shares[1].copy()), torch.tensor([density]))[0].double()
        wanted_L = (shares_L * 256 + 0.5).floor().numpy()
        assert (trace.active["neurons"] == wanted_L).all()
        assert abs(wanted_L.mean() / 256 - density) < 0.01
        assert len(set(wanted_L.tolist())) > 1  # trained layers differ


@pytest.mark.parametrize("density", [HALF, Density(0.75, 0.2)])
def test_engine_and_masked_torch_model_generate_alike(
    engine_folder: Path, tiny_checkpoint: Path, density: Density
) -> None:
    engine = shadowc.load(engine_folder)
    assert engine.manifest.sparsity is not None
    predictor = stored_predictor(engine, engine.manifest.sparsity)
    masked = MaskedModel(load_torch_model(resolve(str(tiny_checkpoint))), predictor.plan(None), predictor)
    run = free_run(engine, masked, np.random.default_rng(1).integers(4, 320, (4, 8)), tokens=24, density=density)
    assert run.passed(), run


@pytest.fixture(scope="module")
def calibrated_folder(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with thresholds, whose first predicted layer is exempt. Read only."""
    out = tmp_path_factory.mktemp("calibrated") / "tiny.engine"
    options = compiled.options(tiny_checkpoint, out, train=PLUS, select="calibrated", exempt=(1,))
    return shadowc.compile(options)


@pytest.fixture(params=["exact", "calibrated"])
def told_and_derived(
    engine_folder: Path, calibrated_folder: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> tuple[Engine, Engine]:
    """An engine whose graph is told places and shares (`variants.told`), and one that derives them."""
    folder = engine_folder if request.param == "exact" else calibrated_folder
    told = load_cpu(folder)
    monkeypatch.setattr(variants, "told", lambda model: model)
    derived = load_cpu(folder)
    inputs = [one._generating.inputs for one in (told, derived)]
    table = "shares" if request.param == "exact" else "limits"
    rows = {f"{table}.{kind}.of_layers" for kind in ("heads", "neurons")}
    assert inputs[0] - inputs[1] == {PAST, START, TOKEN, TAIL, *rows}
    assert inputs[1] - inputs[0] == {"density_heads", "density_neurons", "attention_mask", "sparse_tail"}
    return told, derived


def test_a_graph_that_is_told_shares_and_places_gives_the_same_bits(told_and_derived: tuple[Engine, Engine]) -> None:
    for density in (HALF, Density(0.75, 0.203), Density(1.0, 0.0), Density()):
        logits = [one.logits(PROMPT, density, prompt_tokens=2) for one in told_and_derived]
        np.testing.assert_array_equal(*logits)
        rows = [one.generate(BATCH, max_new_tokens=20, density=density) for one in told_and_derived]
        np.testing.assert_array_equal(*rows)
        told, derived = (one.last_stats.bytes_read for one in told_and_derived)
        assert told == derived


def test_rows_that_pad_end_and_change_places_are_told_too(told_and_derived: tuple[Engine, Engine]) -> None:
    """Slot by slot from the first one on; then a row ends, and the others change places."""
    batch = Batch(BATCH, np.array([3, 0, 1]))
    decoders = [one._decoder(batch, 32) for one in told_and_derived]
    read = []

    def step(ids_B: np.ndarray) -> None:
        found = [decoder.step(ids_B) for decoder in decoders]
        for name in found[0]:
            np.testing.assert_array_equal(found[0][name], found[1][name], err_msg=name)
        read.append(found[0]["read"][1:].sum())

    for decoder in decoders:
        decoder.set_density(0.5, 0.25)
    for slot in range(BATCH.shape[1]):
        step(BATCH[:, slot])
    for row in (0, 2):
        for decoder in decoders:
            decoder.mute(row)
    step(np.array([7, 8, 9]))
    assert read[-1] < read[-2]  # two rows of three are over
    for decoder in decoders:
        decoder._batch = Batch(BATCH, np.zeros(3, np.int64))  # rows of one padding only change places
        decoder.reorder(np.array([1, 0, 2]))
        decoder._batch = batch
    step(np.array([9, 8, 7]))


def test_a_graph_that_is_told_places_one_token_off_gives_other_logits(
    told_and_derived: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    told, derived = told_and_derived
    times = Decoder._times
    monkeypatch.setattr(Decoder, "_times", lambda self, n: {k: v + (k == TOKEN) for k, v in times(self, n).items()})
    assert np.abs(told.logits(PROMPT, HALF) - derived.logits(PROMPT, HALF)).max() > 1e-3


def test_an_engine_whose_folder_was_moved_behind_load_goes_on(engine_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "here.engine"
    shutil.copytree(engine_folder, folder)
    engine = shadowc.load(folder)
    folder.rename(tmp_path / "there.engine")
    np.testing.assert_array_equal(
        engine.generate(PROMPT, max_new_tokens=8, density=HALF),
        shadowc.load(engine_folder).generate(PROMPT, max_new_tokens=8, density=HALF),
    )


def test_an_engine_of_before_whose_products_were_nodes_gives_the_same_predictor(engine_folder: Path) -> None:
    """Then weights of networks were stored as [in, out], without factors."""
    engine = shadowc.load(engine_folder)

    class Before:
        manifest, neuron_orders, head_means = engine.manifest, engine.neuron_orders, engine.head_means

        def graph(self) -> onnx.ModelProto:
            copy = onnx.ModelProto()
            copy.CopyFrom(engine.graph())
            kept = [tensor for tensor in copy.graph.initializer if not tensor.name.endswith(".scales")]
            del copy.graph.initializer[:]
            copy.graph.initializer.extend(kept)
            return copy

        def initialiser(self, name: str) -> np.ndarray:
            value = engine.initialiser(name)
            return value.T if name.startswith("predictor.") else value

    now, before = (stored_predictor(one, engine.manifest.sparsity).tensors() for one in (engine, Before()))  # type: ignore[arg-type]
    assert now.keys() == before.keys()
    for name, value in now.items():
        np.testing.assert_array_equal(before[name], value, err_msg=name)


def test_int8_is_modelled_by_the_gate(tiny_checkpoint: Path, tmp_path: Path) -> None:
    options = compiled.options(tiny_checkpoint, tmp_path / "int8.engine", train=PLUS, weights="int8")
    parity = read_manifest(shadowc.compile(options)).parity
    assert 0 < float(parity["scores"]) < 1e-4  # type: ignore[arg-type]


def test_controls_get_the_same_shares(engine_folder: Path, tiny_checkpoint: Path) -> None:
    engine = shadowc.load(engine_folder)
    predictor = stored_predictor(engine, engine.manifest.sparsity)  # type: ignore[arg-type]
    masked = MaskedModel(load_torch_model(resolve(str(tiny_checkpoint))), predictor.plan(None), predictor)
    rng = np.random.default_rng(3)
    pair = rng.random((1, 1, 3, 4), np.float32), rng.random((1, 1, 3, 256), np.float32)
    ids = rng.integers(4, 320, (1, 12))
    found = engine.logits(ids, 0.5, scores=lambda tokens: (pair[0].repeat(tokens, 1), pair[1].repeat(tokens, 1)))
    wanted = masked.logits(ids, density=HALF, masked_from=1, scores=pair).logits.numpy()
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())


def test_bisect_finds_nothing_in_a_sound_engine(engine_folder: Path, tiny_checkpoint: Path) -> None:
    report = bisect(engine_folder, str(tiny_checkpoint))
    assert report.first is None, report


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"scope": "global"}, InputError, r"style shadow\+ ranks .* share one budget in scope local"),
        ({"mask": "sequence"}, UnsupportedError, r"style shadow\+ makes a mask for every token"),
        # Where TensorRT is not installed there are two problems, told together as one InputError.
        ({"target": "tensorrt-rtx", "weights": "fp16"}, ShadowcError, r"style shadow\+ is for target cpu"),
    ],
)
def test_what_the_style_cannot_do_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        shadowc.compile(compiled.options(tiny_checkpoint, tmp_path / "x.engine", train=PLUS, **changes))


# --- planted defects ---------------------------------------------------------------------------------------


def _neurons_scored_by_what_attention_reads(model: onnx.ModelProto) -> None:
    mine, other = named(model, f"predictor.neurons.{LAYER}"), named(model, f"predictor.heads.{LAYER}")
    for operand in (0, -2, -1):  # and its norm
        mine.input[operand] = other.input[operand]


def _share_of_the_layer_before(model: onnx.ModelProto) -> None:
    set_int(named(model, f"predictor.neurons.{LAYER}"), "column", LAYER - 2)


def _table_ignored(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.array([[0.5]], np.float32), "planted"))
    named(model, f"predictor.neurons.{LAYER}").input[2] = "planted"
    set_int(named(model, f"predictor.neurons.{LAYER}"), "column", 0)


@pytest.mark.parametrize(
    ("defect", "caught"),
    [
        (None, []),
        (_neurons_scored_by_what_attention_reads, ["scores"]),
        (_share_of_the_layer_before, ["selection"]),
        (_table_ignored, ["selection"]),
    ],
)
def test_parity_names_the_part_that_has_the_defect(
    engine_folder: Path,
    tiny_checkpoint: Path,
    defect: Defect | None,
    caught: list[str],
) -> None:
    engine, resolved = shadowc.load(engine_folder), resolve(str(tiny_checkpoint))
    predictor: Predictor = stored_predictor(engine, engine.manifest.sparsity)  # type: ignore[arg-type]
    report = check_parity(
        with_defect(engine, defect).prober(), resolved.facts, resolved.weights, weights="fp32", block=1,
        orders={}, sparse=True, plan=predictor.plan(None), predictor=predictor,
    )  # fmt: skip
    assert [problem.split(":")[0] for problem in report.problems()] == caught
