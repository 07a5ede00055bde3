# SPDX-License-Identifier: Apache-2.0
"""From a name or a folder to a checked checkpoint."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shadowc.checkpoint import digest
from shadowc.checkpoint import resolve as module
from shadowc.checkpoint.opt import EMBEDDING, HEAD, PUBLISHED_NAMES
from shadowc.checkpoint.resolve import bundled_opt_mini, resolve
from shadowc.spec.errors import InputError, SetupError, ShadowcError, UnsupportedError
from tests.checkpoint.handmade import CONFIG, FACTS, contents, some_tensors, write_shards, write_single
from tests.checkpoint.test_tokenizer import slow_form

pytestmark = pytest.mark.usefixtures("no_network")

LAST_SHARD = "model-00003-of-00003.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return slow_form(write_single(tmp_path / "small", some_tensors()))


def refusal(model: str | Path, kind: type[ShadowcError], code: int, **options: object) -> ShadowcError:
    """The error that resolving gives; it carries a hint and nothing was written beside the model."""
    place = Path(model) if Path(model).is_dir() else None
    before = contents(place) if place else {}
    with pytest.raises(kind) as caught:
        resolve(str(model), **options)
    assert caught.value.exit_code == code
    assert caught.value.hint
    assert (contents(place) if place else {}) == before
    return caught.value


def test_folder_gives_facts_weights_and_tokenizer(folder: Path) -> None:
    checkpoint = resolve(str(folder))
    assert checkpoint.facts == FACTS
    assert checkpoint.folder == checkpoint.tokenizer == folder
    assert not checkpoint.dummy
    assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in some_tensors().values())
    assert np.array_equal(checkpoint.weights.tensor(HEAD), some_tensors()[EMBEDDING])


def test_a_short_name_and_a_checkpoint_of_that_name_here_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "opt-125m").mkdir()  # an engine, or anything else
    published = resolve("opt-125m", load_format="dummy").facts
    write_single(tmp_path / "opt-125m", some_tensors())
    error = refusal("opt-125m", InputError, 2, load_format="dummy")
    assert error.hint == "--model ./opt-125m for the folder, --model facebook/opt-125m for the published one"
    assert resolve("facebook/opt-125m", load_format="dummy").facts == published
    assert resolve("./opt-125m", load_format="dummy").facts.hidden == FACTS.hidden != published.hidden


def test_a_link_to_weights_that_are_gone_is_named(tmp_path: Path) -> None:
    folder = write_single(tmp_path / "small", some_tensors())
    weights = folder / "model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=r"is a link to .*gone, which is not there"):
        resolve(str(folder))


def test_folder_without_tokenizer_is_resolved(tmp_path: Path) -> None:
    assert resolve(str(write_single(tmp_path, some_tensors()))).tokenizer is None


def test_folder_is_not_written_to(folder: Path) -> None:
    before = contents(folder)
    resolve(str(folder))
    assert contents(folder) == before


@pytest.mark.parametrize("name", PUBLISHED_NAMES)
def test_dummy_of_a_published_model_needs_neither_network_nor_folder(name: str) -> None:
    checkpoint = resolve(name, load_format="dummy")
    assert checkpoint.facts.name == name
    assert checkpoint.dummy
    assert checkpoint.folder is None
    assert checkpoint.tokenizer is None
    assert re.fullmatch("dummy-0-[0-9a-f]{64}", checkpoint.identity)


def test_hub_id_of_a_published_model_is_its_short_name() -> None:
    assert resolve("facebook/opt-1.3b", load_format="dummy").facts == resolve("opt-1.3b", load_format="dummy").facts


def test_dummy_of_a_folder_takes_its_shape_and_tokenizer_and_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    checkpoint = resolve(str(folder), load_format="dummy", seed=5)
    assert checkpoint.facts == FACTS
    assert checkpoint.tokenizer == folder
    assert checkpoint.identity.startswith("dummy-5-")


def test_identity_of_dummies_tells_seed_and_shape_apart() -> None:
    of = {
        resolve(name, load_format="dummy", seed=seed).identity for name in ("opt-125m", "opt-1.3b") for seed in (0, 1)
    }
    assert len(of) == 4


# Identity


def test_identity_does_not_depend_on_name_and_place(folder: Path, tmp_path: Path) -> None:
    first = resolve(str(folder)).identity
    assert resolve(str(folder.rename(tmp_path / "other"))).identity == first


def test_identity_changes_with_one_bit_of_a_weight(folder: Path) -> None:
    first = resolve(str(folder)).identity
    path = folder / "model.safetensors"
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    assert resolve(str(folder)).identity != first


def test_identity_changes_with_config_and_tokenizer(folder: Path) -> None:
    first = resolve(str(folder)).identity
    (folder / "config.json").write_text(json.dumps({**CONFIG, "eos_token_id": 0}))
    second = resolve(str(folder)).identity
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    assert len({first, second, resolve(str(folder)).identity}) == 3


def test_second_run_hashes_nothing_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "SETTLED_SECONDS", 0.0)
    first = resolve(str(folder)).identity

    def refuse(path: Path) -> str:
        raise AssertionError(f"{path} was hashed again")

    monkeypatch.setattr(digest, "_hash", refuse)
    assert resolve(str(folder)).identity == first


def test_progress_of_hashing_reaches_the_total(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    resolve(str(folder), advance=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] >= (folder / "model.safetensors").stat().st_size


def test_cache_that_cannot_be_written_to_does_not_stop_resolving(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = resolve(str(folder)).identity
    monkeypatch.setenv("SHADOWC_CACHE", str(folder / "config.json" / "cache"))
    assert resolve(str(folder)).identity == first


# What is refused


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("opt-1.3", "opt-1.3b"), ("opt1.3b", "opt-1.3b"), ("OPT-125M", "opt-125m"), ("optmini", "opt-mini")],
)
def test_unknown_name_is_refused_with_the_nearest_known_one(typed: str, meant: str) -> None:
    error = refusal(typed, InputError, 2)
    assert repr(typed) in error.message
    assert error.hint.startswith("did you mean")
    assert meant in error.hint


def test_name_like_no_other_is_refused_with_all_names() -> None:
    assert all(name in refusal("zzz", InputError, 2).hint for name in PUBLISHED_NAMES)


@pytest.mark.parametrize("path", ["./missing", "/missing/folder", "a/b/c", "~/missing-model"])
def test_path_that_does_not_exist_is_refused(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"there is no folder {path}" in refusal(path, InputError, 2).message


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(st.sampled_from("aopt-125m/.~\\ \0\u00e9"), max_size=12) | st.sampled_from(["a" * 5000, "~nobody/x", ""])
)
def test_any_other_text_is_refused_in_words(typed: str) -> None:
    with pytest.raises(ShadowcError) as caught:
        resolve(typed, offline=True)
    assert caught.value.hint


def test_file_is_refused_with_its_folder(folder: Path) -> None:
    assert str(folder) in refusal(folder / "model.safetensors", InputError, 2).hint


def test_engine_folder_is_refused_as_such(tmp_path: Path) -> None:
    (tmp_path / "engine.json").write_text("{}")
    error = refusal(tmp_path, InputError, 2)
    assert "compiled engine" in error.message
    assert error.hint.startswith("shadowc run")


def test_folder_without_config_is_refused(tmp_path: Path) -> None:
    assert "has no config.json" in refusal(tmp_path, InputError, 2).message


@pytest.mark.parametrize(
    ("text", "words"), [("{", "is not valid JSON"), ("[]", "is not a JSON object"), ("\xff", "JSON")]
)
def test_damaged_config_is_refused_by_path(folder: Path, text: str, words: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    message = refusal(folder, InputError, 2).message
    assert str(folder / "config.json") in message
    assert words in message


@pytest.mark.parametrize("change", [{"model_type": "llama"}, {"activation_function": "gelu"}, {"enable_bias": False}])
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_model_that_is_not_handled_is_refused(folder: Path, change: dict[str, object], load_format: str) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **change}))
    refusal(folder, UnsupportedError, 3, load_format=load_format)


def test_weights_of_another_framework_are_refused_with_the_way_to_convert(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "tf_model.h5")
    error = refusal(folder, UnsupportedError, 3)
    assert "tf_model.h5" in error.message
    assert f"from_pretrained('{folder}', from_tf=True)" in error.hint


def test_truncated_shard_is_refused_by_name(tmp_path: Path) -> None:
    write_shards(tmp_path, some_tensors())
    whole = (tmp_path / LAST_SHARD).read_bytes()
    (tmp_path / LAST_SHARD).write_bytes(whole[:-1])
    assert f"{LAST_SHARD}: truncated" in refusal(tmp_path, InputError, 2).message


def test_faults_of_config_and_weights_are_reported_together(tmp_path: Path) -> None:
    write_shards(tmp_path, some_tensors(), config={**CONFIG, "num_attention_heads": 3, "ffn_dim": -1})
    (tmp_path / LAST_SHARD).unlink()
    error = refusal(tmp_path, InputError, 2)
    assert len(error.problems) == 3
    for part in ("num_attention_heads 3", "ffn_dim is -1", LAST_SHARD):
        assert part in error.message


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_tokenizer_of_another_model_is_refused(folder: Path, load_format: str) -> None:
    vocab = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({**vocab, "extra": FACTS.vocab}))
    message = refusal(folder, InputError, 2, load_format=load_format).message
    assert f"ids up to {FACTS.vocab}, the model a vocabulary of {FACTS.vocab}" in message


@pytest.mark.parametrize("tied", [True, False, None])
def test_head_of_its_own_is_refused_whatever_config_says(folder: Path, tied: bool | None) -> None:
    tensors = some_tensors()
    config = dict(CONFIG) if tied is None else {**CONFIG, "tie_word_embeddings": tied}
    write_single(folder, tensors | {HEAD: tensors[EMBEDDING] * np.float32(2)}, config)
    assert HEAD in refusal(folder, UnsupportedError, 3).message


def test_tensors_that_are_not_compiled_are_told(folder: Path) -> None:
    write_single(folder, some_tensors() | {"v_head.summary.weight": np.zeros((1, 8), "<f4")})
    assert resolve(str(folder)).unused == ("v_head.summary.weight",)


# opt-mini


def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> Path:
    """Pretend that shadowc lies in tmp_path, with an opt-mini at `place`."""
    (tmp_path / "shadowc" / "checkpoint").mkdir(parents=True)
    monkeypatch.setattr(module, "__file__", str(tmp_path / "shadowc" / "checkpoint" / "resolve.py"))
    return slow_form(write_single(tmp_path / place, some_tensors()))


@pytest.mark.parametrize("place", ["shadowc/data/opt_mini", "examples/opt_mini"])
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_opt_mini_is_found_without_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, load_format: str
) -> None:
    folder = installed(tmp_path, monkeypatch, place)
    checkpoint = resolve("opt-mini", load_format=load_format)
    assert bundled_opt_mini() == checkpoint.folder == folder
    assert checkpoint.facts == dataclasses.replace(FACTS, name="opt-mini")


def test_opt_mini_of_the_package_wins_over_the_source_checkouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = installed(tmp_path, monkeypatch, "shadowc/data/opt_mini")
    write_single(tmp_path / "examples" / "opt_mini", some_tensors())
    assert bundled_opt_mini() == package


def test_installation_without_opt_mini_names_both_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "__file__", str(tmp_path / "shadowc" / "checkpoint" / "resolve.py"))
    error = refusal("opt-mini", SetupError, 6)
    assert str(tmp_path / "shadowc" / "data" / "opt_mini") in error.message
    assert str(tmp_path / "examples" / "opt_mini") in error.message
