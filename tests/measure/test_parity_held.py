# SPDX-License-Identifier: Apache-2.0
"""Parity A of masks that hold for a sequence: passes on a good engine, catches what only that graph can have wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from shadowc.checkpoint.resolve import resolve
from shadowc.measure.masks import forced_heads
from shadowc.measure.parity import DENSITIES, LOGITS_TOLERANCE, ParityReport, run_of, tokens_of
from shadowc.runtime import variants
from shadowc.runtime.engine import rewritten
from shadowc.runtime.load import load_cpu, read_manifest, verify
from shadowc.runtime.probe import SequenceProbe
from shadowc.runtime.prompts import Batch, Ids
from shadowc.runtime.sequence import SequenceDecoder
from shadowc.runtime.sequence_engine import SequenceEngine
from shadowc.spec.errors import InputError, ShadowcError, UnsupportedError
from tests.e2e import compiled
from tests.measure.test_parity import LAYER, failing, named, parity_of, roll_scores

PROMPT = np.array([[2, 40, 50, 60, 70, 80]], np.int64)


def loaded(folder: Path) -> SequenceEngine:
    engine = load_cpu(folder, threads=2)
    assert isinstance(engine, SequenceEngine)
    return engine


def held_parity(engine: SequenceEngine, checkpoint: Path) -> ParityReport:
    """Parity under held masks alone: the probes of both kinds are the one under a held mask."""
    report = parity_of(engine, checkpoint, new_held_probe=engine.fixed_prober())
    assert report.held_positions == report.positions // 2
    return report


def with_defect(engine: SequenceEngine, plant: Callable[[onnx.ModelProto], None]) -> SequenceEngine:
    def rewrite(model: onnx.ModelProto) -> onnx.ModelProto:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        plant(copy)
        return copy

    engine._fixed = rewritten(engine._fixed, rewrite)
    return engine


def test_parity_passes_when_the_engine_is_sound(sequence_engine: Path, tiny_checkpoint: Path) -> None:
    report = held_parity(loaded(sequence_engine), tiny_checkpoint)
    assert report.passed()
    assert max(report.layers) < 1e-5
    assert report.selection == 0
    assert report.scores is not None
    assert report.scores < 1e-5


def other_heads(engine: SequenceEngine, checkpoint: Path) -> int:
    """A model layer whose held masks of heads are not those of LAYER; with four heads two layers may have the same."""
    facts = resolve(str(checkpoint)).facts
    ids, prefill, masked = tokens_of(facts)
    runs = [run_of(engine.fixed_prober()(), ids, density, prefill, masked) for density in DENSITIES]
    heads = {layer: [forced_heads(run, layer, facts) for run in runs] for layer in range(1, facts.layers)}
    return next(
        layer for layer, masks in heads.items()
        if any((mine != its).any() for mine, its in zip(heads[LAYER], masks, strict=True))
    )  # fmt: skip


def test_parity_names_the_layer_that_uses_another_layers_masks(sequence_engine: Path, tiny_checkpoint: Path) -> None:
    other = other_heads(loaded(sequence_engine), tiny_checkpoint)

    def shift(model: onnx.ModelProto) -> None:
        for attribute in named(model, f"layers.{LAYER}.attention").attribute:
            if attribute.name == "layer":
                attribute.i = other - 1

    assert failing(held_parity(with_defect(loaded(sequence_engine), shift), tiny_checkpoint)) == [LAYER]


def test_parity_fails_when_each_kind_uses_the_density_of_the_other(
    sequence_engine: Path, tiny_checkpoint: Path
) -> None:
    def swap(model: onnx.ModelProto) -> None:
        for kind, other in (("heads", "neurons"), ("neurons", "heads")):
            named(model, f"select.{kind}").input[1] = f"density_{other}"

    assert held_parity(with_defect(loaded(sequence_engine), swap), tiny_checkpoint).selection


def with_decoders(engine: SequenceEngine, plant: Callable[[SequenceDecoder], None]) -> Callable[[], SequenceProbe]:
    """Probes under a held mask whose decoders have a defect."""

    def prober() -> SequenceProbe:
        probe = engine.fixed_prober()()
        honest = probe._decoder_of

        def decoder_of(batch: Batch, origins_B: Ids) -> SequenceDecoder:
            decoder = honest(batch, origins_B)
            plant(decoder)
            return decoder

        probe._decoder_of = decoder_of
        return probe

    return prober


def test_parity_fails_when_the_wrong_token_makes_the_mask(sequence_engine: Path, tiny_checkpoint: Path) -> None:
    engine = loaded(sequence_engine)

    def plant(decoder: SequenceDecoder) -> None:
        honest, maker = decoder._maker.scores, decoder._maker
        maker.scores = lambda ids_BS, past: honest(ids_BS, past - 1)  # type: ignore[method-assign]

    report = parity_of(engine, tiny_checkpoint, new_held_probe=with_decoders(engine, plant))
    assert [problem.split(":")[0] for problem in report.problems()][-1] == "scores"


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_parity_fails_when_the_scores_belong_to_the_next_unit(
    sequence_engine: Path, tiny_checkpoint: Path, kind: str
) -> None:
    engine = loaded(sequence_engine)

    def roll(model: onnx.ModelProto) -> onnx.ModelProto:
        predicting = variants.predicting(model)
        roll_scores(predicting, f"scores.{kind}")
        return predicting

    rolled = rewritten(engine._session, roll)

    def plant(decoder: SequenceDecoder) -> None:
        decoder._maker._session = rolled

    report = parity_of(engine, tiny_checkpoint, new_held_probe=with_decoders(engine, plant))
    assert [problem.split(":")[0] for problem in report.problems()] == ["scores"]


# --- the compile that ends with it ---------------------------------------------------------------------------


def test_compile_checks_both_graphs_and_the_engine_generates(sequence_engine: Path, sparse_engine: Path) -> None:
    manifest = read_manifest(sequence_engine)
    assert manifest.sparsity is not None
    assert (manifest.sparsity.mask, manifest.sparsity.refresh) == ("sequence", 0)
    positions, held = manifest.parity["positions"], manifest.parity["held_positions"]
    assert isinstance(positions, int)
    assert held == positions // 2
    assert verify(sequence_engine).passed
    for name in ("model.onnx", "reference.onnx", "weights.bin"):  # other hosts get what they get from any engine
        assert (sequence_engine / name).read_bytes() == (sparse_engine / name).read_bytes(), name
    engine = loaded(sequence_engine)
    engine.generate(PROMPT, max_new_tokens=12, min_new_tokens=12)
    assert engine.last_stats.active_head_share == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"refresh": 4}, InputError, "--refresh 4 has no effect with --mask token"),
        ({"mask": "sequence", "target": "tensorrt-rtx"}, UnsupportedError, "a mask per sequence is for target cpu"),
        ({"mask": "sequence", "target": "tensorrt"}, UnsupportedError, "a mask per sequence is for target cpu"),
    ],
)
def test_compile_refuses_a_mask_that_cannot_be(
    tiny_checkpoint: Path, tmp_path: Path, changes: dict[str, object], kind: type[ShadowcError], words: str
) -> None:
    from shadowc.compiler import compile_engine

    with pytest.raises(ShadowcError, match=words) as caught:
        compile_engine(compiled.options(tiny_checkpoint, tmp_path / "e", **changes))
    assert isinstance(caught.value, kind) or words in str(caught.value.problems)
    assert not (tmp_path / "e").exists()


def test_dense_engine_takes_no_second_graph(tiny_checkpoint: Path, tmp_path: Path) -> None:
    import shadowc

    options = compiled.options(tiny_checkpoint, tmp_path / "e", predictor="none", mask="sequence")
    assert not (shadowc.compile(options) / "decode_fixed.onnx").exists()


@pytest.mark.slow
def test_opt_mini_generates_and_scores_under_one_mask(tmp_path: Path) -> None:
    """The whole way on the model that the repository carries, in int8; one mask is refreshed, the other stays."""
    import shadowc

    folder = shadowc.compile(
        compiled.options("opt-mini", tmp_path / "mini", weights="int8", mask="sequence", refresh=8, offline=True)
    )
    again, never = load_cpu(folder), load_cpu(folder, refresh=0)
    ids = np.array([again.tokenizer("Once upon a time there was a little girl")["input_ids"]])
    read = []
    for engine in (again, never, load_cpu(folder, mask="token")):
        engine.generate(ids, max_new_tokens=24, min_new_tokens=24, density=0.5)
        read.append(engine.last_stats.bytes_read)
    assert read[1] < read[0] < read[2]
    text = np.concatenate([ids, again.generate(ids, max_new_tokens=40, min_new_tokens=40, density=1.0)], axis=1)
    dense = never.logits(text, 1.0, "prompt", prompt_tokens=8)
    exact = load_cpu(folder, refresh=0, exact_prompts=True)  # the others round, in other chunks otherwise
    whole = exact.logits(text, protocol="dense")
    in_chunks = exact.logits(text, 1.0, "prompt", prompt_tokens=8)
    assert np.abs(in_chunks - whole).max() <= LOGITS_TOLERANCE * np.abs(whole).max()
    distances = [
        float(np.abs(engine.logits(text, 0.5, "prompt", prompt_tokens=8) - dense).mean()) for engine in (again, never)
    ]
    assert all(distance > 0 for distance in distances)
