# SPDX-License-Identifier: Apache-2.0
"""The predictor as a value: scores, files, errors, size."""

from __future__ import annotations

import dataclasses
import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from shadowc.checkpoint.opt import OptFacts, published_config
from shadowc.sparsity.networks import BUDGET, blocks_of, cost_share, default_width, minmax_scaled
from shadowc.sparsity.predictor import META_FILE, TENSORS_FILE, Predictor, check_folder
from shadowc.spec.errors import InputError, SetupError
from shadowc.spec.program import SparsityPlan

FLOAT32 = 1e-5


@pytest.fixture
def predictor(small_facts: OptFacts) -> Predictor:
    made = Predictor.dummy(small_facts, block=24, width=32, seed=3)
    layers, heads, blocks = 2, 4, 3
    controls = {"static": (np.ones((layers, heads), np.float32), np.ones((layers, blocks), np.float32))}
    return dataclasses.replace(made, controls=controls)


def test_scores_equal_torchs_linear_layers(predictor: Predictor) -> None:
    context_ME = np.random.default_rng(0).standard_normal((6, 16)).astype(np.float32)
    a = torch.from_numpy(context_ME)
    low, high = a.amin(1, keepdim=True), a.amax(1, keepdim=True)
    z = (a - low) / (high - low).clamp(min=1e-12)
    tensors = {name: torch.from_numpy(np.asarray(value)) for name, value in predictor.tensors().items()}
    heads_MLH, neurons_MLN = predictor.scores(context_ME)
    for found, name, shape in ((heads_MLH, "heads", (6, 2, 4)), (neurons_MLN, "neurons", (6, 2, 3))):
        hidden = torch.nn.functional.linear(z, tensors[f"{name}.fc1.weight"], tensors[f"{name}.fc1.bias"]).relu()
        expected = torch.nn.functional.linear(hidden, tensors[f"{name}.fc2.weight"], tensors[f"{name}.fc2.bias"])
        assert found.shape == shape
        np.testing.assert_allclose(found, expected.reshape(shape).numpy(), atol=FLOAT32)


def test_scaling_survives_a_constant_context() -> None:
    assert np.isfinite(minmax_scaled(np.full((2, 8), 3, np.float32))).all()


def test_files_give_the_same_predictor_back(predictor: Predictor, tmp_path: Path, small_facts: OptFacts) -> None:
    predictor.save(tmp_path / "p")
    loaded = Predictor.load(tmp_path / "p", small_facts)
    assert loaded.tensors().keys() == predictor.tensors().keys()
    for name, value in predictor.tensors().items():
        assert np.array_equal(loaded.tensors()[name], value), name
    assert loaded.meta == predictor.meta
    assert np.array_equal(loaded.controls["static"][1], predictor.controls["static"][1])
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == [META_FILE, TENSORS_FILE]


def test_saving_twice_gives_the_same_bytes(predictor: Predictor, tmp_path: Path) -> None:
    for name in ("a", "b"):
        predictor.save(tmp_path / name)
    for name in (META_FILE, TENSORS_FILE):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_older_predictor_is_replaced_as_a_whole(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "p"
    predictor.save(out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(*_: Any, **__: Any) -> Any:
        raise InterruptedError

    other = dataclasses.replace(predictor, meta={"seed": 9})
    with monkeypatch.context() as patched:
        patched.setattr(json, "dumps", fail)
        with pytest.raises(InterruptedError):
            other.save(out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    other.save(out)
    assert Predictor.load(out).meta == {"seed": 9}
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


@pytest.mark.parametrize("also", [(), (META_FILE,), (META_FILE, TENSORS_FILE)])
def test_a_folder_with_other_things_is_not_touched(predictor: Predictor, tmp_path: Path, also: tuple[str, ...]) -> None:
    out = tmp_path / "p"
    predictor.save(out)
    for name in {META_FILE, TENSORS_FILE} - set(also):
        (out / name).unlink()
    (out / "notes.txt").write_text("precious")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(InputError, match="nothing was written") as caught:
        predictor.save(out)
    assert caught.value.hint
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_place_that_cannot_be_written_is_an_input_error(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="Not a directory"):
        predictor.save(tmp_path / "file" / "p")


def test_a_full_disk_is_a_setup_error(predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(SetupError, match=r"no space left .* no predictor was written"):
        predictor.save(tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_known_for_a_predictor_by_its_two_files(predictor: Predictor, tmp_path: Path) -> None:
    predictor.save(tmp_path / "p")
    check_folder(str(tmp_path / "p"))
    (tmp_path / "p" / TENSORS_FILE).unlink()
    for path in (tmp_path / "p", tmp_path / "none", tmp_path / ("x" * 300)):
        with pytest.raises(InputError, match="not a predictor"):
            check_folder(path)


def test_as_a_source_its_names_are_prefixed_and_sorted(predictor: Predictor) -> None:
    source = predictor.as_source()
    kinds = [f"predictor.{kind}.{part}" for kind in ("heads", "neurons") for part in ("fc1.bias", "fc1.weight")]
    assert set(kinds) < set(source.names())
    assert list(source.names()) == sorted(source.names())
    assert source.tensor("predictor.order.2").dtype == np.int32
    assert not any("control" in name for name in source.names())


def test_blocks_of_one_neuron_have_no_order(small_facts: OptFacts, tmp_path: Path) -> None:
    made = Predictor.dummy(small_facts, block=1)
    assert not any(name.startswith("order") for name in made.tensors())
    made.save(tmp_path)
    assert np.array_equal(Predictor.load(tmp_path).orders_LF, np.tile(np.arange(64), (2, 1)))


def test_dummies_are_seeded_and_score_tokens_differently(small_facts: OptFacts) -> None:
    first, again, other = (Predictor.dummy(small_facts, 16, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.heads.fc1_weight_PE, again.heads.fc1_weight_PE)
    assert not np.array_equal(first.heads.fc1_weight_PE, other.heads.fc1_weight_PE)
    heads_MLH, _ = first.scores(np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32))
    assert not np.allclose(heads_MLH[0], heads_MLH[1])


def test_plan_carries_widths_block_and_scope(predictor: Predictor) -> None:
    assert predictor.plan("global", exempt=(1,), min_active_heads=1) == SparsityPlan(32, 32, 24, "global", (1,), 1, 0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / META_FILE).unlink(), f"has no {META_FILE}"),
        (lambda folder: (folder / TENSORS_FILE).unlink(), f"has no {TENSORS_FILE}"),
        (lambda folder: (folder / META_FILE).write_text("{"), "is damaged"),
        (lambda folder: (folder / META_FILE).write_text("[]"), "does not have schema"),
        (lambda folder: (folder / META_FILE).write_text("[" * 100_000), "is damaged"),
        (lambda folder: (folder / META_FILE).write_text('{"schema": 1, "report": []}'), "is damaged: report"),
        (lambda folder: (folder / META_FILE).write_text('{"schema": 1, "model": "a"}'), "is damaged: model"),
        (lambda folder: (folder / META_FILE).write_text('{"schema": 2}'), "does not have schema"),
        (lambda folder: (folder / META_FILE).write_text('{"schema": 1}'), "not a complete predictor"),
        (
            lambda folder: (folder / TENSORS_FILE).write_bytes((folder / TENSORS_FILE).read_bytes()[:-9]),
            "damaged or cut short",
        ),
    ],
)
def test_damaged_files_are_refused(predictor: Predictor, tmp_path: Path, damage: Any, message: str) -> None:
    predictor.save(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        Predictor.load(tmp_path)
    assert "shadowc train" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("heads.fc2.bias", None, "not a complete predictor: 'heads.fc2.bias'"),
        ("order.2", None, "not a complete predictor: 'order.2'"),
        ("heads.fc2.weight", lambda v: v[:-1], r"heads.fc2.weight has shape \[7, 32\], expected \[8, 32\]"),
        ("neurons.fc2.weight", lambda v: v[:-3], r"neurons.fc2.weight has shape \[3, 32\], expected \[6, 32\]"),
        ("neurons.fc1.weight", lambda v: v[:, :-1], r"expected \[32, 16\]"),
        ("neurons.fc1.bias", lambda v: v * np.nan, "numbers that are not finite"),
        ("order.1", np.zeros_like, "order.1 is not a permutation of the 64 neurons"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(
    predictor: Predictor, tmp_path: Path, name: str, change: Any, message: str
) -> None:
    predictor.save(tmp_path)
    tensors = load_file(tmp_path / TENSORS_FILE)
    value = tensors.pop(name)
    if change is not None:
        tensors[name] = np.ascontiguousarray(change(value))
    save_file(tensors, tmp_path / TENSORS_FILE)
    with pytest.raises(InputError, match=message):
        Predictor.load(tmp_path)


def test_a_predictor_of_another_shape_is_refused_with_all_differences(
    predictor: Predictor, tmp_path: Path, small_facts: OptFacts
) -> None:
    predictor.save(tmp_path)
    other = dataclasses.replace(small_facts, name="opt-other", layers=5, ffn=128)
    with pytest.raises(InputError, match="trained for planted and does not fit opt-other") as caught:
        Predictor.load(tmp_path, other)
    assert len(caught.value.problems) == 2
    assert "shadowc train" in caught.value.hint


def test_a_predictor_of_the_same_shape_fits_and_says_whose_it_is(
    predictor: Predictor, tmp_path: Path, small_facts: OptFacts
) -> None:
    predictor.save(tmp_path)
    loaded = Predictor.load(tmp_path, dataclasses.replace(small_facts, name="fine-tuned"))
    assert loaded.meta["model"]["name"] == "planted"


@pytest.mark.parametrize("name", ["opt-125m", "opt-1.3b", "opt-6.7b", "opt-13b", "opt-30b", "opt-66b"])
def test_default_width_keeps_to_the_budget_and_uses_it(name: str) -> None:
    facts = OptFacts.from_config(published_config(name), name)
    width = default_width(facts, 16)
    assert width % 32 == 0
    assert cost_share(facts, 16, width) <= BUDGET
    assert width == 1024 or cost_share(facts, 16, width + 32) > BUDGET


def test_cost_share_counts_what_the_tensors_hold(small_facts: OptFacts) -> None:
    made = Predictor.dummy(small_facts, 16, 64)
    e, f = small_facts.hidden, small_facts.ffn
    layer = 4 * (e * e + e) + (2 * e * f + f + e)
    assert cost_share(small_facts, 16, 64) == pytest.approx(made.parameters / (3 * layer + small_facts.vocab * e))


def test_a_tiny_model_still_gets_a_predictor(small_facts: OptFacts) -> None:
    assert default_width(small_facts, 16) == 32
    assert blocks_of(64, 24) == 3


def test_the_meta_file_is_readable_json(predictor: Predictor, tmp_path: Path) -> None:
    predictor.save(tmp_path)
    meta = json.loads((tmp_path / META_FILE).read_text())
    assert meta["shape"] == {"layers": 2, "block": 24, "ffn": 64}
