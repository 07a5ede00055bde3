# SPDX-License-Identifier: Apache-2.0
"""Engines whose skipped heads leave their means: the dense model is what it was, and wrong means are noticed.

Letters: B texts, S tokens, L predicted layers, N units of a kind, H heads, D head size.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import shadowc
from shadowc.checkpoint.opt import layer_names
from shadowc.checkpoint.resolve import resolve
from shadowc.cli import inspect
from shadowc.emit.folder import MEANS_FILE
from shadowc.measure.against import stored_predictor
from shadowc.measure.bisect import bisect
from shadowc.measure.free_running import free_run
from shadowc.passes import fill_heads
from shadowc.runtime.load import load_cpu, read_manifest
from shadowc.sparsity.predictor import Predictor
from shadowc.sparsity.reference import MaskedModel, load_torch_model
from shadowc.spec.density import Density
from shadowc.spec.errors import VerificationError
from shadowc.spec.manifest import MODEL_FILE, WEIGHTS_FILE
from tests.e2e import compiled

LAYER = 2
IDS = np.random.default_rng(2).integers(4, 320, (2, 12))


def masked_model(folder: Path, checkpoint: Path, *, weights: str = "fp32") -> MaskedModel:
    engine = shadowc.load(folder)
    assert engine.manifest.sparsity is not None
    predictor = stored_predictor(engine, engine.manifest.sparsity)
    assert predictor.fill == "mean"
    return MaskedModel(load_torch_model(resolve(str(checkpoint))), predictor.plan("global"), predictor)


def test_engine_says_what_skipped_heads_leave_and_holds_it_under_its_hash(sparse_engine: Path) -> None:
    manifest = read_manifest(sparse_engine)
    assert manifest.sparsity is not None
    assert manifest.sparsity.fill == "mean"
    assert MEANS_FILE in manifest.files
    assert inspect.sparsity_facts(manifest)["skipped heads"].startswith("leave their mean")
    filled = next(part for part in manifest.passes["model"] if part.name == fill_heads.NAME)
    assert filled.counts == {"layers": 3}
    means = load_cpu(sparse_engine).head_means()
    assert sorted(means) == [1, 2, 3]
    assert all(np.abs(mean_HD).max() > 0.05 for mean_HD in means.values())


def test_fill_zero_is_the_engine_of_before(tiny_checkpoint: Path, tmp_path: Path) -> None:
    zero = compiled.COLLECT.model_copy(update={"fill": "zero"})
    folder = shadowc.compile(compiled.options(tiny_checkpoint, tmp_path / "zero.engine", collect=zero))
    manifest = read_manifest(folder)
    assert manifest.sparsity is not None
    assert manifest.sparsity.fill == "zero"
    assert MEANS_FILE not in manifest.files
    assert inspect.sparsity_facts(manifest)["skipped heads"] == "leave zero"
    engine, source = load_cpu(folder), resolve(str(tiny_checkpoint)).weights
    names = layer_names(LAYER)
    stored = engine.initialiser(f"layers.{LAYER}.attention.bqkv")[:, 2].reshape(-1)
    np.testing.assert_array_equal(stored, source.tensor(names.v.bias))


def test_with_all_heads_active_the_engine_computes_the_untouched_model(
    sparse_engine: Path, tiny_model: torch.nn.Module
) -> None:
    with torch.no_grad():
        wanted = tiny_model(input_ids=torch.from_numpy(IDS)).logits.numpy()
    found = shadowc.load(sparse_engine).logits(IDS, 1.0)
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("density", [Density(0.0, 1.0), Density(0.25, 0.5)])
def test_engine_is_the_masked_torch_model_with_means(
    sparse_engine: Path, tiny_checkpoint: Path, density: Density
) -> None:
    run = free_run(
        shadowc.load(sparse_engine), masked_model(sparse_engine, tiny_checkpoint), IDS[:, :8], tokens=16,
        density=density,
    )  # fmt: skip
    assert run.passed(), run


def test_scores_that_are_given_have_the_same_fill(sparse_engine: Path, tiny_checkpoint: Path) -> None:
    """Controls and references are compared with a predictor, so that skipped heads must not tell them apart."""
    rng = np.random.default_rng(3)
    pair = rng.random((1, 1, 3, 4), np.float32), rng.random((1, 1, 3, 16), np.float32)
    masked = masked_model(sparse_engine, tiny_checkpoint)
    wanted = masked.logits(IDS, density=Density(0.5, 0.5), masked_from=1, scores=pair).logits.numpy()
    found = shadowc.load(sparse_engine).logits(
        IDS, 0.5, scores=lambda tokens: (pair[0].repeat(tokens, 1), pair[1].repeat(tokens, 1))
    )
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max())


def test_rounded_weights_leave_the_mean_of_the_unrounded_ones(int8_engine: Path, tiny_checkpoint: Path) -> None:
    """Of a layer without active heads the output projection puts out W m + b, whatever rounding did to W."""
    engine, source, names = load_cpu(int8_engine), resolve(str(tiny_checkpoint)).weights, layer_names(LAYER)
    mean_HD = engine.head_means()[LAYER]
    wanted_E = source.tensor(names.out.weight).astype(np.float64) @ mean_HD.reshape(-1) + source.tensor(names.out.bias)
    np.testing.assert_allclose(engine.initialiser(f"layers.{LAYER}.attention.bo"), wanted_E, atol=1e-6)
    assert bisect(int8_engine, str(tiny_checkpoint)).first is None


def test_dummy_engines_have_means_too(tmp_path: Path) -> None:
    options = compiled.options("opt-125m", tmp_path / "x.engine", load_format="dummy")
    assert options.collect.fill == "mean"
    facts = resolve("opt-125m", load_format="dummy").facts
    filled, zero = (Predictor.dummy(facts, 16, 32, fill=fill) for fill in ("mean", "zero"))  # type: ignore[arg-type]
    assert (filled.fill, zero.fill) == ("mean", "zero")
    for name, values in zero.tensors().items():
        np.testing.assert_array_equal(values, filled.tensors()[name])


def test_dummy_engines_of_both_fills_are_told_apart(tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = {}
    for fill in ("mean", "zero"):
        collect = compiled.COLLECT.model_copy(update={"fill": fill})
        folder = shadowc.compile(
            compiled.options(tiny_checkpoint, tmp_path / f"{fill}.engine", load_format="dummy", collect=collect)
        )
        manifest = read_manifest(folder)
        assert manifest.sparsity is not None
        assert (manifest.sparsity.fill, MEANS_FILE in manifest.files) == (fill, fill == "mean")
        found[fill] = manifest.build_key
    assert found["mean"] != found["zero"]


def test_a_damaged_file_of_means_is_named_and_no_bias_is_blamed(
    sparse_engine: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    for place in (8, -4):  # its header, a number
        folder = Path(shutil.copytree(sparse_engine, tmp_path / f"damaged{place}.engine"))
        raw = bytearray((folder / MEANS_FILE).read_bytes())
        raw[place] ^= 0x55
        (folder / MEANS_FILE).write_bytes(raw)
        with pytest.raises(VerificationError, match=rf"{MEANS_FILE}.*nothing can be compared"):
            bisect(folder, str(tiny_checkpoint))
        if place == 8:
            with pytest.raises(VerificationError, match=f"{MEANS_FILE} cannot be read"):
                load_cpu(folder, verify=False).head_means()


# --- planted defects ---------------------------------------------------------------------------------------


def test_compile_leaves_no_engine_when_a_layer_has_the_means_of_another(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all heads active nothing would be wrong: only what a skipped head leaves is another's."""
    right = fill_heads.mean_name
    monkeypatch.setattr(fill_heads, "mean_name", lambda layer: right(1 if layer == LAYER else layer))
    with pytest.raises(VerificationError) as caught:
        shadowc.compile(compiled.options(tiny_checkpoint, tmp_path / "wrong.engine"))
    assert [problem.split(":")[0] for problem in caught.value.problems] == [f"layer {LAYER}"]
    assert list(tmp_path.iterdir()) == []


def test_bisect_names_both_biases_that_have_the_means_of_another_layer(
    sparse_engine: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(sparse_engine, tmp_path / "altered.engine"))
    means, names = load_cpu(sparse_engine).head_means(), layer_names(LAYER)
    wrong_HD = means[1] - means[LAYER]
    out_EE = resolve(str(tiny_checkpoint)).weights.tensor(names.out.weight)
    value_HD, out_E = (stored(folder, f"layers.{LAYER}.attention.{part}") for part in ("bqkv", "bo"))
    value_HD[:, 2] -= wrong_HD
    out_E += out_EE @ wrong_HD.reshape(-1)
    value_HD.flush()
    out_E.flush()
    ids = IDS[:1]
    dense = shadowc.load(sparse_engine).logits(ids, 1.0)
    same = load_cpu(folder, verify=False).logits(ids, 1.0)
    np.testing.assert_allclose(same, dense, atol=1e-4 * np.abs(dense).max())  # the defect cannot be seen there
    report = bisect(folder, str(tiny_checkpoint))
    assert report.first is not None
    assert (report.first.layer, report.first.tensor) == (LAYER, f"cached.{LAYER}.value")
    assert names.v.bias in [one.name for one in report.altered]
    deviating = {one.tensor for one in report.compared if one.deviates}
    assert f"layers.{LAYER}.middle" in deviating  # the output projection's


def stored(folder: Path, name: str) -> np.memmap:
    """A stored float32 tensor of weights.bin, to be changed in place."""
    graph = onnx.load(folder / MODEL_FILE, load_external_data=False).graph
    tensor = next(one for one in graph.initializer if one.name == name)
    where = {entry.key: entry.value for entry in tensor.external_data}
    return np.memmap(folder / WEIGHTS_FILE, np.float32, "r+", int(where.get("offset", 0)), tuple(tensor.dims))
