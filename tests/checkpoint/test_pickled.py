# SPDX-License-Identifier: Apache-2.0
"""What torch.save writes: read without running any of it, copied bit for bit, or refused in words."""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from shadowc.checkpoint.opt import EMBEDDING, HEAD
from shadowc.checkpoint.pickled import check_torch, convert
from shadowc.spec.errors import InputError, SetupError, ShadowcError, UnsupportedError
from tests.checkpoint.handmade import as_torch, save, some_tensors

A_WEIGHT = "model.decoder.layers.1.fc1.weight"
MEBI = 1 << 20

State = dict[str, torch.Tensor]


def state() -> State:
    return {name: as_torch(array) for name, array in some_tensors().items()}


def through(path: Path) -> State:
    """The tensors after conversion, as the safetensors library reads them."""
    out = path.with_suffix(".safetensors")
    convert(path, out)
    return load_file(out)


def refusal(path: Path, kind: type[ShadowcError]) -> ShadowcError:
    out = path.with_name("out.safetensors")
    with pytest.raises(kind) as caught:
        convert(path, out)
    assert type(caught.value) is kind
    assert path.name in caught.value.message
    assert caught.value.hint
    assert not out.exists()
    assert "weights_only=False" not in caught.value.message + caught.value.hint
    return caught.value


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def compressed(path: Path) -> Path:
    """The same archive with its records compressed, as a zip tool writes it."""
    with zipfile.ZipFile(path) as old:
        records = {entry.filename: old.read(entry) for entry in old.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in records.items():
            new.writestr(name, content)
    return path


# What is read


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_tensors_come_through_bit_for_bit(kind: torch.dtype, options: dict[str, object], tmp_path: Path) -> None:
    tensors = {name: tensor.to(kind) for name, tensor in state().items()}
    assert_same(through(save(tmp_path / "a.bin", tensors, **options)), tensors)


def test_every_bit_pattern_of_a_half_comes_through(tmp_path: Path) -> None:
    bits = np.arange(65536, dtype="<u2").view("<i2")
    for kind in (torch.float16, torch.bfloat16):
        found = through(save(tmp_path / "a.bin", {"a": torch.from_numpy(bits).view(kind)}))["a"]
        assert np.array_equal(found.view(torch.int16).numpy(), bits)


def test_compressed_archive_is_not_mapped_but_read(tmp_path: Path) -> None:
    """torch maps compressed records as if they were numbers, and gives garbage without a word."""
    path = compressed(save(tmp_path / "a.bin", state()))
    garbage = torch.load(path, weights_only=True, mmap=True)
    assert not torch.equal(garbage[A_WEIGHT], state()[A_WEIGHT])
    assert_same(through(path), state())


def test_views_parameters_scalars_and_empty_tensors_come_through_as_their_values(tmp_path: Path) -> None:
    whole = torch.arange(24.0).reshape(4, 6)
    tensors = {"t": whole.T, "rows": whole[1:3], "column": whole[:, 2], "one": whole[3, 5], "none": whole[:0]}
    saved = {**tensors, "p": torch.nn.Parameter(torch.ones(2)), "flags": torch.tensor([True, False])}
    found = through(save(tmp_path / "a.bin", saved))
    assert_same(found, {**tensors, "p": torch.ones(2), "flags": saved["flags"]})


def test_ordered_dict_with_metadata_as_state_dict_gives_is_read(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    assert isinstance(module.state_dict(), OrderedDict)
    assert_same(through(save(tmp_path / "a.bin", module.state_dict())), dict(module.state_dict()))


@pytest.mark.parametrize("embedding", [EMBEDDING, EMBEDDING.removeprefix("model.")])
def test_head_that_shares_the_embeddings_memory_is_left_out(embedding: str, tmp_path: Path) -> None:
    tensor = torch.randn(20, 8)
    assert_same(through(save(tmp_path / "a.bin", {HEAD: tensor, embedding: tensor})), {embedding: tensor})


def test_head_with_memory_of_its_own_is_kept(tmp_path: Path) -> None:
    tensors = {HEAD: torch.randn(20, 8), EMBEDDING: torch.randn(20, 8)}
    assert_same(through(save(tmp_path / "a.bin", tensors)), tensors)


def test_progress_reaches_the_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    convert(save(tmp_path / "a.bin", state()), tmp_path / "out", lambda done, total: seen.append((done, total)))
    total = sum(tensor.nbytes for tensor in state().values())
    assert seen[-1] == (total, total)
    assert len(seen) == len(state())


def test_same_tensors_give_the_same_bytes_in_whatever_order_and_format_they_were_saved(tmp_path: Path) -> None:
    convert(save(tmp_path / "a.bin", state()), tmp_path / "a")
    backward = dict(reversed(state().items()))
    convert(save(tmp_path / "b.bin", backward, _use_new_zipfile_serialization=False), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


MEASURE = """
import resource, sys, torch
from pathlib import Path
from shadowc.checkpoint.pickled import convert
convert(Path(sys.argv[1]), Path(sys.argv[1] + ".out"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in sys.argv[2:]:
    convert(Path(name), Path(name + ".out"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_memory_is_bounded_by_one_shard(options: dict[str, object], tmp_path: Path) -> None:
    size = 48 * MEBI
    small = save(tmp_path / "small.bin", {"a": torch.zeros(8)}, **options)
    shards = [
        save(tmp_path / f"{i}.bin", {f"{i}.{j}": torch.full((size // 32,), i + 1.0) for j in range(8)}, **options)
        for i in range(3)
    ]
    assert all(path.stat().st_size > size for path in shards)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, small, *shards], capture_output=True, text=True, check=True, timeout=120
    )
    assert int(done.stdout) * 1024 < 1.5 * size


# What is refused


class Planted:
    """Unpickled by Python's own reader, it leaves a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_planted_code_is_not_run_and_is_named(options: dict[str, object], tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = save(tmp_path / "pytorch_model.bin", {**state(), "x": Planted(mark)}, **options)
    error = refusal(path, UnsupportedError)
    assert not mark.exists()
    assert "posix.mkdir" in error.message
    assert "can run any code" in error.message
    torch.load(path, weights_only=False)  # the plant is alive: without the guard it runs
    assert mark.exists()


def test_planted_code_is_not_run_when_the_environment_forces_unsafe_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = save(tmp_path / "pytorch_model.bin", {"x": Planted(tmp_path / "ran")})
    refusal(path, UnsupportedError)
    assert not (tmp_path / "ran").exists()


def test_whole_module_is_refused_by_its_class(tmp_path: Path) -> None:
    assert "Linear" in refusal(save(tmp_path / "a.bin", torch.nn.Linear(2, 2)), UnsupportedError).message


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_newer_pickle_protocol_is_refused(tmp_path: Path) -> None:
    assert (
        "Unsupported operand" in refusal(save(tmp_path / "a.bin", state(), pickle_protocol=4), UnsupportedError).message
    )


def test_tar_of_the_oldest_torch_is_refused_unread(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (tmp_path / "pickle").write_bytes(pickle.dumps(Planted(mark), 2))
    with tarfile.open(tmp_path / "a.bin", "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            archive.add(tmp_path / "pickle", name)
    assert "tar format" in refusal(tmp_path / "a.bin", UnsupportedError).message
    assert not mark.exists()


def test_torchscript_program_is_refused_as_such(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
        archive.writestr("a/constants.pkl", b"")
        archive.writestr("a/data.pkl", b"")
    assert "TorchScript" in refusal(tmp_path / "a.bin", UnsupportedError).message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"epoch": 3, "state_dict": {"a": torch.ones(1)}}, "'epoch' (int), 'state_dict' (dict)"),
        ({1: torch.ones(1)}, "1 (Tensor)"),
        ([torch.ones(1)], "holds a list"),
        (torch.ones(1), "holds a Tensor"),
    ],
)
def test_other_content_than_a_flat_dict_of_tensors_is_refused(content: object, words: str, tmp_path: Path) -> None:
    assert words in refusal(save(tmp_path / "a.bin", content), UnsupportedError).message


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: torch.eye(3).to_sparse(), "sparse_coo"),
        (lambda: torch.empty(3, device="meta"), "without data"),
        (lambda: torch.ones(2).to(torch.float8_e4m3fn), "float8_e4m3fn"),
        (lambda: torch.ones(2, dtype=torch.complex64), "complex64"),
    ],
)
def test_tensor_that_is_not_plain_numbers_is_refused_by_name(
    make: Callable[[], torch.Tensor], words: str, tmp_path: Path
) -> None:
    message = refusal(save(tmp_path / "a.bin", {"odd": make()}), UnsupportedError).message
    assert f"odd ({words}" in message or ("odd (" in message and words in message)


def test_views_that_unfold_to_more_than_the_file_are_refused(tmp_path: Path) -> None:
    huge = torch.ones(1).expand(10**12)
    assert "unfold to 4000000000000 bytes" in refusal(save(tmp_path / "a.bin", {"a": huge}), UnsupportedError).message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "truncated: it has 0 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"<html>404</html>", "is not a file that torch.save writes"),
        (b"PK\x03\x04 the beginning of an archive", "its table of contents"),
        (b"\x80\x02K\x01.", "damaged"),
    ],
)
def test_file_of_another_kind_is_refused_in_words(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(content)
    assert words in refusal(tmp_path / "a.bin", InputError).message


PLACE = st.integers(0, 1 << 20)
"""A byte of a file, modulo its length: that of the legacy format differs from save to save, a strategy may not."""


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_file_cut_anywhere_is_refused(options: dict[str, object], tmp_path: Path, data: st.DataObject) -> None:
    whole = save(tmp_path / "whole.bin", {"a": torch.ones(50), "b": torch.ones(3)}, **options).read_bytes()
    (tmp_path / "a.bin").write_bytes(whole[: data.draw(PLACE) % len(whole)])
    assert "truncated" in refusal(tmp_path / "a.bin", InputError).message


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_file_with_any_byte_changed_is_read_or_refused_in_words(
    options: dict[str, object], tmp_path: Path, data: st.DataObject
) -> None:
    content = bytearray(save(tmp_path / "whole.bin", {"a": torch.ones(5), "b": torch.ones(3)}, **options).read_bytes())
    content[data.draw(PLACE) % len(content)] = data.draw(st.integers(0, 255))
    (tmp_path / "a.bin").write_bytes(content)
    with contextlib.suppress(InputError, UnsupportedError):
        convert(tmp_path / "a.bin", tmp_path / "out")


@pytest.mark.parametrize("version", ["2.9.1", "2.9.1+cu130", "1.13.0", "2.6.0a0"])
def test_torch_with_an_unsafe_reader_is_refused(version: str) -> None:
    with pytest.raises(SetupError, match="CVE-2026-24747") as caught:
        check_torch(version)
    assert "2.10" in caught.value.hint


@pytest.mark.parametrize("version", ["2.10.0", "2.13.0+cpu", "3.0.0"])
def test_torch_with_a_safe_reader_is_accepted(version: str) -> None:
    check_torch(version)
