# SPDX-License-Identifier: Apache-2.0
"""examples/cpp: the engine folder in a C++ program gives the tokens of `engine.generate`."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import shadowc
from tests.conftest import TINY
from tests.emit import engines
from tests.examples import hosts

if TYPE_CHECKING:
    from transformers import OPTForCausalLM

PROMPT = [2, 44, 101, 7, 230, 19, 63]
DENSITIES = [None, (1.0, 1.0), (0.5, 0.5), (0.5, 0.2)]


@dataclass(frozen=True)
class Generated:
    ids: list[int]
    megabytes: float
    """Read by attention and FFN per token."""


def generate(host: Path, folder: Path, ids: Sequence[int], *flags: object) -> Generated:
    given = ",".join(map(str, ids))
    result = hosts.ran([host, folder, "--ids", given, "--threads", "2", *map(str, flags)])
    found = re.search(r"([\d.e+-]+) MB per token", result.stderr)
    return Generated([int(word) for word in result.stdout.split()], float(found[1]) if found else 0.0)


def by_python(folder: Path, ids: Sequence[int], most: int, density: tuple[float, float] | None = None) -> list[int]:
    engine = shadowc.load(folder)
    chosen = None if density is None else shadowc.Density(*density)
    rows = engine.generate(np.array([ids], np.int64), max_new_tokens=most, density=chosen)
    new: list[int] = rows[0, len(ids) :].tolist()
    return new


def flags_of(density: tuple[float, float] | None) -> tuple[object, ...]:
    return () if density is None else ("--head-density", density[0], "--neuron-density", density[1])


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("kind", engines.KINDS)
def test_tokens_equal_those_of_python_at_every_density(
    cpp_host: Path, folders: dict[str, Path], kind: str, density: tuple[float, float] | None
) -> None:
    found = generate(cpp_host, folders[kind], PROMPT, "--max-new-tokens", 40, *flags_of(density))
    assert found.ids == by_python(folders[kind], PROMPT, 40, density)


def test_density_flags_reach_the_operators_one_by_one(cpp_host: Path, folders: dict[str, Path]) -> None:
    def at(*flags: object) -> Generated:
        return generate(cpp_host, folders["fp32"], PROMPT, "--max-new-tokens", 40, *flags)

    whole, half = at("--density", 1), at("--density", engines.DENSITY.heads)
    few_heads, few_neurons = at("--head-density", 0.2), at("--neuron-density", 0.2)
    assert half == at(), "without a flag the engine's own density holds"
    assert few_heads.megabytes < half.megabytes < whole.megabytes
    assert few_neurons.megabytes < half.megabytes
    assert len({tuple(run.ids) for run in (whole, half, few_heads, few_neurons)}) == 4


def test_a_dense_engine_runs_and_takes_no_density(cpp_host: Path, folders: dict[str, Path]) -> None:
    folder = folders["dense"]
    assert generate(cpp_host, folder, PROMPT, "--max-new-tokens", 20).ids == by_python(folder, PROMPT, 20)
    refused = hosts.run([cpp_host, folder, "--ids", "2", "--density", "0.5"])
    assert refused.returncode == 2
    assert "this engine is dense" in refused.stderr


def test_generation_stops_where_the_context_ends(cpp_host: Path, folders: dict[str, Path]) -> None:
    positions = TINY["max_position_embeddings"]
    prompt = [2, *range(40, 40 + positions - 5)]
    found = generate(cpp_host, folders["fp32"], prompt).ids
    assert found == by_python(folders["fp32"], prompt, 64)
    assert len(found) == 4


def test_generation_stops_at_the_end_token(cpp_host: Path, tiny_model: OPTForCausalLM, tmp_path: Path) -> None:
    engines.write_engine(tmp_path / "first", tiny_model)
    free = generate(cpp_host, tmp_path / "first", PROMPT, "--max-new-tokens", 40).ids
    end = free[5]
    engines.write_engine(tmp_path / "second", tiny_model, eos=end)
    found = generate(cpp_host, tmp_path / "second", PROMPT, "--max-new-tokens", 40).ids
    assert found == free[: free.index(end) + 1]
    assert found == by_python(tmp_path / "second", PROMPT, 40)


def test_a_prompt_of_one_token_is_read_densely(cpp_host: Path, folders: dict[str, Path]) -> None:
    folder = folders["fp32"]
    engine = shadowc.load(folder)
    every = np.arange(4, TINY["vocab_size"])[:, None]
    dense, masked = (
        engine.logits(every, **protocol)[:, 0].argmax(axis=1)
        for protocol in ({"protocol": "dense"}, {"prompt_tokens": 0})
    )
    prompt = every[np.flatnonzero(dense != masked)[0]].tolist()  # a mask would show at once
    found = generate(cpp_host, folder, prompt, "--max-new-tokens", 20, "--density", 0.2)
    assert found.ids == by_python(folder, prompt, 20, (0.2, 0.2))


def test_a_moved_folder_is_complete(cpp_host: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    moved = tmp_path / "Ordner mit Leerzeichen, größer"
    shutil.copytree(folders["fp32"], moved)
    assert generate(cpp_host, moved, PROMPT).ids == generate(cpp_host, folders["fp32"], PROMPT).ids
    (moved / "libshadowc_ort.so").unlink()
    assert hosts.run([cpp_host, moved, "--ids", "2"]).returncode == 1, "the folder's own op library is used"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "expected an engine and a prompt, or --ids"),
        (["--ids", "2,x"], "--ids takes a whole number"),
        (["--ids", "2.5"], "--ids takes a whole number"),
        (["--ids", str(TINY["vocab_size"])], f"no token has the id {TINY['vocab_size']}"),
        (["--ids", ",".join(["2"] * TINY["max_position_embeddings"])], "leaves no room in a context of 64"),
        (["--ids", "2", "--density", "1.5"], "--density takes a number from 0 to 1"),
        (["--ids", "2", "--max-new-tokens", "0"], "--max-new-tokens takes a whole number"),
        (["--ids", "2", "--tokens", "0"], "unknown flag --tokens"),
        (["--ids"], "--ids needs a value"),
    ],
)
def test_what_cannot_be_used_is_said(cpp_host: Path, folders: dict[str, Path], arguments: list[str], said: str) -> None:
    refused = hosts.run([cpp_host, folders["fp32"], *arguments])
    assert refused.returncode == 2
    assert said in refused.stderr
    assert not refused.stdout


def test_a_build_without_tokenizer_says_so(cpp_host: Path, folders: dict[str, Path]) -> None:
    refused = hosts.run([cpp_host, folders["fp32"], "Once upon a time"])
    assert refused.returncode == 1
    assert "give --ids, or build with -DTOKENIZER_LIBRARY" in refused.stderr


def test_a_folder_that_is_no_engine_is_refused(cpp_host: Path, tmp_path: Path) -> None:
    refused = hosts.run([cpp_host, tmp_path, "--ids", "2"])
    assert refused.returncode == 2
    assert "is no engine folder of target cpu" in refused.stderr


@pytest.mark.slow
def test_an_old_runtime_is_refused(cpp_host: Path, folders: dict[str, Path]) -> None:
    system = sorted(Path("/usr/lib").glob("*/libonnxruntime.so.1.[0-9]*"))
    old = [path for path in system if int(path.name.split(".")[3]) < 23]
    if not old:
        pytest.skip("no ONNX Runtime older than 1.23 is installed")
    host = hosts.build_cpp("cpp-old", ONNXRUNTIME_LIBRARY=old[0])
    refused = hosts.run([host, folders["fp32"], "--ids", "2"])
    assert refused.returncode == 1
    assert "ONNX Runtime 1.23 or newer is needed, this is 1." in refused.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)  # the compiles count for the first
@pytest.mark.parametrize("kind", ["fp32", "int4"])
def test_opt_mini_gives_the_tokens_of_python(cpp_host: Path, mini: dict[str, Path], kind: str) -> None:
    prompt = [2, *np.random.default_rng(3).integers(4, 8000, 300).tolist()]  # in more than one chunk
    for density in DENSITIES:
        for ids in (prompt[:8], prompt):
            found = generate(cpp_host, mini[kind], ids, "--max-new-tokens", 48, *flags_of(density))
            assert found.ids == by_python(mini[kind], ids, 48, density)
