# SPDX-License-Identifier: Apache-2.0
"""Every head size, and every published model at its true width: dense engines are transformers, sparse ones pass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import shadowc
from shadowc.checkpoint.opt import PUBLISHED_NAMES, published_config
from shadowc.checkpoint.resolve import resolve
from shadowc.runtime.load import read_manifest
from shadowc.sparsity.reference import load_torch_model
from shadowc.spec.ops import MATMUL_ROWS
from shadowc.spec.options import TrainOptions
from tests.e2e import compiled

IDS = np.array([[2, 40, 50, 60, 7, 8, 9, 31, 33, 20]], np.int64)
LAYER, LOGITS = 1e-5, 1e-4
"""Largest difference of a layer, of its largest update, and of float32 logits, of the largest."""
WHOLE = ("opt-125m", "opt-350m", "opt-1.3b")
"""Compared in float32 with the whole transformers model too; the wider ones layer by layer, in int8."""
GIGABYTES = {"opt-30b": 10, "opt-66b": 14}
"""Of free memory that two layers in torch, one in float32 at a time, and the LM head take."""


@pytest.fixture
def shaped(tmp_path: Path) -> Callable[..., Path]:
    """A folder with the config.json of a model of other sizes, for dummy weights."""

    def make(name: str, **changes: object) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**published_config("opt-125m"), **changes}))
        return folder

    return make


def difference_from_transformers(folder: Path, model: str) -> float:
    """Of the dense engine's float32 logits, as a share of the largest."""
    import torch

    ours = shadowc.load(folder, exact_prompts=True).logits(IDS, protocol="dense")
    with torch.no_grad():
        theirs = load_torch_model(resolve(model, load_format="dummy"))(torch.from_numpy(IDS)).logits.numpy()
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def assert_passed_closely(folder: Path) -> None:
    parity = read_manifest(folder).parity
    layers = parity["layers"]
    assert isinstance(layers, list)
    assert max(layers) < LAYER, "rounding must be modelled, not tolerated"


@pytest.mark.parametrize("head_size", [64, 80, 96, 128])
def test_every_head_size_compiles_dense_as_transformers_and_sparse_in_int8(
    shaped: Callable[..., Path], tmp_path: Path, head_size: int
) -> None:
    hidden = 2 * head_size
    sizes = {"hidden_size": hidden, "word_embed_proj_dim": hidden, "num_attention_heads": 2, "ffn_dim": 4 * hidden}
    model = shaped(f"opt-{head_size}", num_hidden_layers=2, vocab_size=96, max_position_embeddings=64, **sizes)
    given = {"load_format": "dummy", "train": TrainOptions(neuron_block=16, width=32)}
    dense = shadowc.compile(compiled.options(model, tmp_path / "dense", predictor="none", **given))
    assert difference_from_transformers(dense, str(model)) < LOGITS
    sparse = shadowc.compile(compiled.options(model, tmp_path / "sparse", weights="int8", **given))
    assert_passed_closely(sparse)
    engine = shadowc.load(sparse)
    engine.generate(IDS, max_new_tokens=8, min_new_tokens=8, density=shadowc.Density(0.5, 0.25))
    assert engine.last_stats.active_neuron_share == pytest.approx(0.25, abs=0.02)
    assert engine.manifest.model.head_size == head_size


def test_predictor_of_an_int8_engine_is_int8(int8_engine: Path) -> None:
    graph = onnx.load(int8_engine / "model.onnx", load_external_data=False).graph
    types = {one.name: one.data_type for one in graph.initializer if one.name.startswith("predictor.")}
    products = [node for node in graph.node if any(name.startswith("predictor.") for name in node.input)]
    weights = [name for name in types if name.endswith(".weight")]
    assert len(weights) == 4
    assert {types[name] for name in weights} == {onnx.TensorProto.INT8}
    assert sum(node.op_type == MATMUL_ROWS.name for node in products) == 4
    assert not [node.name for node in products if node.op_type in ("MatMul", "Gemm")]


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] if name in GIGABYTES else []) for name in PUBLISHED_NAMES]
)
def test_two_layers_of_every_published_model_are_transformers_when_dense(
    shaped: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    if (lacking := GIGABYTES.get(name, 0)) > free_gigabytes():
        pytest.skip(f"two layers of {name} need {lacking} GB of free memory, {free_gigabytes():.0f} GB are there")
    model = shaped(f"{name}-2", **{**published_config(name), "num_hidden_layers": 2})
    weights = "fp32" if name in WHOLE else "int8"
    given = {"load_format": "dummy", "predictor": "none", "weights": weights}
    folder = shadowc.compile(compiled.options(model, tmp_path / "e", **given))
    assert_passed_closely(folder)
    if name in WHOLE:
        assert difference_from_transformers(folder, str(model)) < LOGITS


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("name", ["opt-125m", "opt-350m"])
def test_whole_depth_is_transformers_when_dense_and_passes_when_sparse(tmp_path: Path, name: str) -> None:
    folder = shadowc.compile(compiled.options(name, tmp_path / "e", load_format="dummy"))
    assert_passed_closely(folder)
    assert difference_from_transformers(folder, name) < LOGITS


def free_gigabytes() -> float:
    """Memory that new processes can have; many where the system does not tell."""
    info = Path("/proc/meminfo")
    if not info.is_file():
        return 1e3
    return next(int(line.split()[1]) / 1e6 for line in info.read_text().splitlines() if line.startswith("MemAvailable"))
