# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint to an engine that generates: what a user may rely on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

import shadowc
from shadowc.compiler import compile_engine
from shadowc.measure import gate
from shadowc.runtime.engine import Engine
from shadowc.runtime.load import read_manifest, verify
from shadowc.spec.errors import InputError, ShadowcError, UnsupportedError
from shadowc.spec.progress import NullProgress
from shadowc.stages import Stages, data_hash
from tests.e2e import compiled

if TYPE_CHECKING:
    from transformers import OPTForCausalLM

PROMPT = np.array([[2, 40, 50, 60, 70, 80]], np.int64)


def test_engine_generates_what_transformers_generates_when_dense(
    sparse_engine: Path, tiny_model: OPTForCausalLM
) -> None:
    import torch

    engine = shadowc.load(sparse_engine)
    ours = engine.generate(PROMPT, max_new_tokens=24, min_new_tokens=24, density=1.0)
    theirs = tiny_model.generate(
        torch.from_numpy(PROMPT), max_new_tokens=24, min_new_tokens=24, do_sample=False, pad_token_id=1
    )
    assert ours.tolist() == theirs.tolist()


def test_engine_reads_fewer_bytes_when_density_falls(sparse_engine: Path) -> None:
    engine = shadowc.load(sparse_engine, skip_zeros=False)
    read = []
    for density in (1.0, 0.5, 0.2):
        engine.generate(PROMPT, max_new_tokens=8, min_new_tokens=8, density=density)
        read.append(engine.last_stats.bytes_read_kernels)
        assert engine.last_stats.active_neuron_share == pytest.approx(density, abs=0.02)
    assert read[0] == engine.manifest.bytes_per_token.records
    assert read[0] > read[1] > read[2]


def test_compile_is_up_to_date_when_repeated(tiny_checkpoint: Path, sparse_engine: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.engine"
    shutil.copytree(sparse_engine, copy)
    before = {path.name: path.stat().st_mtime_ns for path in copy.iterdir()}
    summary = compile_engine(compiled.options(tiny_checkpoint, copy))
    assert summary.up_to_date
    assert {path.name: path.stat().st_mtime_ns for path in copy.iterdir()} == before


def test_a_dummy_engine_is_not_up_to_date_beside_another_tokenizer(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    chosen = compiled.options(model, tmp_path / "e", load_format="dummy", predictor="none")
    assert not compile_engine(chosen).up_to_date
    assert compile_engine(chosen).up_to_date
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(tokenizer, indent=2))
    assert not compile_engine(chosen).up_to_date


def test_weights_that_change_while_they_are_compiled_leave_no_engine(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    right = gate.check_engine

    def changing(*given: Any) -> Any:
        found = right(*given)
        os.utime(model / "model.safetensors")
        return found

    monkeypatch.setattr(gate, "check_engine", changing)
    with pytest.raises(InputError, match=r"changed while they were read: .*model\.safetensors"):
        compile_engine(compiled.options(model, tmp_path / "e", predictor="none"))
    assert not (tmp_path / "e").exists()


def test_what_is_made_of_changed_weights_is_not_kept(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_checkpoint, tmp_path / "model"))
    stages = Stages(compiled.options(model, tmp_path / "e"), NullProgress())
    stages.checkpoint()

    def change(folder: Path) -> None:
        os.utime(model / "model.safetensors")

    for _ in range(2):  # the second time nothing is found in the cache
        with pytest.raises(InputError, match="changed while they were read"):
            stages._cached("test", {"of": str(tmp_path)}, change)


def test_a_text_is_another_one_when_it_is_read_in_another_way(tmp_path: Path) -> None:
    hashes = []
    for name in ("c.txt", "c.jsonl", "d.txt"):
        (tmp_path / name).write_text('{"text": "one"}\n')
        collect = compiled.COLLECT.model_copy(update={"data": str(tmp_path / name)})
        hashes.append(data_hash(compiled.options("opt-mini", tmp_path / "e", collect=collect)))
    assert hashes[0] == hashes[2] != hashes[1]


def test_compile_gives_the_same_bytes_when_repeated_elsewhere(
    tiny_checkpoint: Path, sparse_engine: Path, tmp_path: Path
) -> None:
    again = shadowc.compile(compiled.options(tiny_checkpoint, tmp_path / "again.engine"))
    names = sorted(path.name for path in sparse_engine.iterdir())
    assert sorted(path.name for path in again.iterdir()) == names
    for name in names:
        assert (again / name).read_bytes() == (sparse_engine / name).read_bytes(), name


def test_engine_of_the_same_weights_under_another_name_says_the_other_name(
    tiny_checkpoint: Path, sparse_engine: Path, tmp_path: Path
) -> None:
    renamed = Path(shutil.copytree(tiny_checkpoint, tmp_path / "renamed"))
    shadowc.compile(compiled.options(renamed, tmp_path / "renamed.engine"))
    manifests = [read_manifest(folder) for folder in (sparse_engine, tmp_path / "renamed.engine")]
    assert manifests[0].model.name != manifests[1].model.name == "renamed"
    for manifest in manifests:
        assert manifest.sparsity is not None
        described = manifest.sparsity.predictor["model"]
        assert isinstance(described, dict)
        assert described["name"] == manifest.model.name


def test_compile_repairs_an_engine_when_a_byte_was_flipped(
    tiny_checkpoint: Path, sparse_engine: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.engine"
    shutil.copytree(sparse_engine, copy)
    content = bytearray((copy / "weights.bin").read_bytes())
    content[4097] ^= 1
    (copy / "weights.bin").write_bytes(content)
    assert not verify(copy).passed
    summary = compile_engine(compiled.options(tiny_checkpoint, copy))
    assert not summary.up_to_date
    assert verify(copy).passed


def test_engine_runs_when_its_folder_was_moved(sparse_engine: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "ünicode engine"
    shutil.copytree(sparse_engine, moved)
    texts = [shadowc.load(folder).generate("A sparse engine", max_new_tokens=8) for folder in (sparse_engine, moved)]
    assert texts[0] == texts[1]


def test_reference_graph_agrees_with_the_kernels_when_masked(sparse_engine: Path) -> None:
    ids = np.random.default_rng(1).integers(4, 320, (2, 20), dtype=np.int64)
    kernels, oracle = (shadowc.load(sparse_engine, reference=flag) for flag in (False, True))
    for density in (1.0, 0.5, 0.2):
        ours = kernels.logits(ids, density=density, prompt_tokens=4)
        theirs = oracle.logits(ids, density=density, prompt_tokens=4)
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


def test_dense_engine_has_no_dials_when_compiled_without_predictor(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shadowc.compile(compiled.options(tiny_checkpoint, tmp_path / "dense.engine", predictor="none"))
    engine = shadowc.load(folder)
    assert engine.manifest.sparsity is None
    inputs = {value.name for value in onnx.load(folder / "model.onnx", load_external_data=False).graph.input}
    assert not inputs & {"density_heads", "density_neurons", "sparse_tail"}
    engine.generate(PROMPT, max_new_tokens=4)
    with pytest.raises(InputError, match="dense"):
        engine.generate(PROMPT, max_new_tokens=4, density=0.5)


@pytest.mark.parametrize("weights", ["int4", pytest.param("bf16", marks=pytest.mark.slow)])
def test_narrow_weights_and_cache_are_modelled_exactly_by_the_gate(
    tiny_checkpoint: Path, tmp_path: Path, weights: str
) -> None:
    engine = shadowc.load(shadowc.compile(compiled.options(tiny_checkpoint, tmp_path / "e", weights=weights)))
    layers = engine.manifest.parity["layers"]
    assert isinstance(layers, list)
    assert max(layers) < 1e-5, "rounding must be modelled, not tolerated"
    engine.generate(PROMPT, max_new_tokens=4, min_new_tokens=4)
    model = engine.manifest.model
    assert engine.last_stats.cache_bytes == 2 * 2 * model.layers * model.hidden  # float16


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_opt_mini_passes_the_gate_in_every_narrow_type(tmp_path: Path, weights: str) -> None:
    folder = shadowc.compile(
        compiled.options("opt-mini", tmp_path / "e", weights=weights, predictor="none", offline=True)
    )
    layers = shadowc.load(folder).manifest.parity["layers"]
    assert isinstance(layers, list)
    assert max(layers) < 1e-5


def test_passes_are_dumped_when_asked_for(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "tiny.engine"
    shadowc.compile(compiled.options(tiny_checkpoint, out, weights="int8", dump_passes=tmp_path / "dump"))
    names = [path.name for path in sorted((tmp_path / "dump").glob("*.onnx"))]
    assert [name.split("-", 1)[1] for name in names] == [
        "trace.onnx",
        "canonicalise.onnx",
        "insert_predictor.onnx",
        "sparsify_attention.onnx",
        "fill_heads.onnx",
        "sparsify_ffn.onnx",
        "cluster_neurons.onnx",
        "fuse_predictor.onnx",
        "quantise.onnx",
        "narrow_cache.onnx",
        "finalise.onnx",
        "fold_norms.onnx",
    ]


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"head_density": 1.5}, InputError, "from 0 to 1"),
        ({"target": "tpu"}, UnsupportedError, "unknown target"),
        ({"weights": "fp16"}, UnsupportedError, "target cpu has no weights"),
        ({"max_batch": 2, "max_context": 32}, InputError, "--max-batch, --max-context have no effect"),
        ({"predictor": "/no/such/predictor"}, InputError, "predictor"),
        ({"collect": compiled.COLLECT.model_copy(update={"criterion": "magic"})}, InputError, "magic"),
        ({"collect": compiled.COLLECT.model_copy(update={"data": "/no/such/text.txt"})}, InputError, "text.txt"),
    ],
)
def test_compile_refuses_and_writes_nothing_when_an_option_is_bad(
    tiny_checkpoint: Path, tmp_path: Path, changes: dict[str, object], kind: type[ShadowcError], words: str
) -> None:
    out = tmp_path / "out" / "tiny.engine"
    with pytest.raises(kind, match=words):
        shadowc.compile(compiled.options(tiny_checkpoint, out, **changes))
    assert not out.parent.exists()


def test_compile_refuses_when_the_output_is_something_else(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not an engine"):
        shadowc.compile(compiled.options(tiny_checkpoint, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_evaluation_refuses_the_text_that_calibrated(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from shadowc.measure.evaluate import evaluate

    text = "\n\n".join(
        f"The {n} lazy dogs that a sparse engine skips are read by no other fox at all." * 4 for n in range(60)
    )
    (tmp_path / "text.txt").write_text(text)
    collect = compiled.COLLECT.model_copy(update={"data": str(tmp_path / "text.txt")})
    engine: Engine = shadowc.load(
        shadowc.compile(compiled.options(tiny_checkpoint, tmp_path / "tiny.engine", collect=collect))
    )
    with pytest.raises(InputError, match="calibrat"):
        evaluate(engine, text, densities=[])
