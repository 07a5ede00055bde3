# SPDX-License-Identifier: Apache-2.0
"""examples/genai: the engine folder in stock onnxruntime-genai gives the tokens of `engine.generate`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import shadowc
from tests.conftest import TINY
from tests.e2e.compiled import options
from tests.emit import engines
from tests.examples import hosts

if TYPE_CHECKING:
    from transformers import OPTForCausalLM

pytestmark = [pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(900)]  # pip and compiles count for the first

BATCH = [[2, 44, 101, 7, 230, 19, 63], [2, 90, 5, 311, 200, 8, 8], [2, 17, 17, 60, 259, 301, 4]]
DENSITIES = [None, (1.0, 1.0), (0.5, 0.5), (0.5, 0.2)]
TEXTS = ["Once upon a time there was", "The boy said that", "“Naïve”, she said: 3 × 4 = 12 …\n\n  And then"]


def generate(genai: Path, folder: Path, rows: list[list[int]], most: int, *flags: object) -> list[list[int]]:
    given = ["--ids", json.dumps(rows), "--max-new-tokens", str(most), *map(str, flags)]
    result = hosts.ran([genai / "bin" / "python", hosts.GENAI / "generate.py", folder, *given])
    found: list[list[int]] = json.loads(result.stdout)
    return found


def by_python(
    folder: Path,
    rows: list[list[int]],
    most: int,
    density: tuple[float, float] | None = None,
) -> list[list[int]]:
    engine = shadowc.load(folder)
    chosen = None if density is None else shadowc.Density(*density)
    found: list[list[int]] = engine.generate(np.array(rows, np.int64), max_new_tokens=most, density=chosen).tolist()
    return found


def flags_of(density: tuple[float, float] | None) -> tuple[object, ...]:
    return () if density is None else ("--head-density", density[0], "--neuron-density", density[1])


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("kind", engines.KINDS)
def test_tokens_equal_those_of_python_single_and_batched(
    genai: Path, folders: dict[str, Path], kind: str, density: tuple[float, float] | None
) -> None:
    folder, flags = folders[kind], flags_of(density)
    batched = generate(genai, folder, BATCH, 40, *flags)
    assert batched == by_python(folder, BATCH, 40, density)
    assert generate(genai, folder, BATCH[1:2], 40, *flags) == batched[1:2]


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_tokens_of_a_model_with_norms_last_and_projections_equal_those_of_python(
    genai: Path, norms_last: dict[str, Path], kind: str, density: tuple[float, float] | None
) -> None:
    folder, flags = norms_last[kind], flags_of(density)
    batched = generate(genai, folder, BATCH, 40, *flags)
    assert batched == by_python(folder, BATCH, 40, density)
    assert len({tuple(row[len(BATCH[0]) :]) for row in batched}) > 1, "rows depend on their prompts"
    assert generate(genai, folder, BATCH[1:2], 40, *flags) == batched[1:2]


@pytest.mark.long
@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_tokens_of_opt_350m_at_its_true_sizes_equal_those_of_python(genai: Path, tmp_path: Path, weights: str) -> None:
    given = {"load_format": "dummy", "weights": weights, "exact_prompts": True}  # three prompts are rounded, one is not
    folder = shadowc.compile(options("opt-350m", tmp_path / "e", **given))
    for density in (None, (1.0, 1.0), (0.5, 0.2)):
        batched = generate(genai, folder, BATCH, 24, *flags_of(density))
        assert batched == by_python(folder, BATCH, 24, density)
        assert generate(genai, folder, BATCH[2:], 24, *flags_of(density)) == batched[2:]


def test_the_environment_is_stock_and_the_dial_turns(genai: Path, folders: dict[str, Path]) -> None:
    listed = hosts.ran([genai / "bin" / "python", "-m", "pip", "list"]).stdout
    assert "onnxruntime-genai" in listed
    assert "shadowc" not in listed
    runs = [generate(genai, folders["fp32"], BATCH[:1], 40, "--density", share) for share in (1, 0.5, 0.2)]
    assert len(set(map(str, runs))) == 3
    assert runs[1] == generate(genai, folders["fp32"], BATCH[:1], 40), "without a flag the engine's own density holds"


def test_a_dense_engine_runs(genai: Path, folders: dict[str, Path]) -> None:
    assert generate(genai, folders["dense"], BATCH, 20) == by_python(folders["dense"], BATCH, 20)


def test_prompts_of_unequal_length_give_what_each_gives_alone(genai: Path, folders: dict[str, Path]) -> None:
    rows = [BATCH[0][:4], BATCH[1], BATCH[2][:4], BATCH[0]]
    found = generate(genai, folders["fp32"], rows, 20)
    assert found == [by_python(folders["fp32"], [row], 20)[0] for row in rows]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_padding_of_onnxruntime_genai_would_be_wrong(genai: Path, folders: dict[str, Path], side: str) -> None:
    short, pads = BATCH[0][:4], [TINY["pad_token_id"]] * 3
    padded = [*pads, *short] if side == "left" else [*short, *pads]
    found = generate(genai, folders["fp32"], [padded, BATCH[1]], 20)
    alone = by_python(folders["fp32"], [short], 20)[0]
    assert found[0][7:] != alone[4:], "it has changed: generate.py need not group by length any more"
    assert found[1] == by_python(folders["fp32"], [BATCH[1]], 20)[0]


def test_rows_end_at_their_end_token(genai: Path, tiny_model: OPTForCausalLM, tmp_path: Path) -> None:
    given = len(BATCH[0])
    engines.write_engine(tmp_path / "first", tiny_model)
    end = by_python(tmp_path / "first", BATCH, 40)[0][given + 5]
    engines.write_engine(tmp_path / "second", tiny_model, eos=end)
    expected = by_python(tmp_path / "second", BATCH, 40)
    assert all(end in row[given:] for row in expected)
    assert len({row.index(end, given) for row in expected}) > 1, "some rows go on while others have ended"
    without_last = [row[:-1] for row in expected]  # onnxruntime-genai leaves out the step that ends the last row
    assert generate(genai, tmp_path / "second", BATCH, 40) == without_last


def test_the_op_library_is_found_inside_the_folder(
    genai: Path, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "Ordner mit Leerzeichen, größer"
    shutil.copytree(folders["fp32"], moved)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    relative = Path(os.path.relpath(moved))
    assert generate(genai, relative, BATCH[:1], 20) == by_python(folders["fp32"], BATCH[:1], 20)
    (moved / "libshadowc_ort.so").unlink()
    refused = hosts.run([genai / "bin" / "python", hosts.GENAI / "generate.py", moved, "--ids", "[[2]]"])
    assert refused.returncode != 0
    assert "libshadowc_ort.so" in refused.stderr


def test_beams_are_refused_not_wrong(genai: Path, folders: dict[str, Path]) -> None:
    program = (
        "import sys, numpy as np, onnxruntime_genai as og\n"
        "model = og.Model(sys.argv[1]); parameters = og.GeneratorParams(model)\n"
        "parameters.set_search_options(num_beams=2, max_length=20)\n"
        "og.Generator(model, parameters).append_tokens(np.array([[2, 5, 6]], np.int32))\n"
    )
    refused = hosts.run([genai / "bin" / "python", "-c", program, folders["fp32"]])
    assert refused.returncode != 0
    assert "must be at most the cache capacity" in refused.stderr


def test_texts_of_opt_mini_equal_those_of_python(genai: Path, mini: dict[str, Path]) -> None:
    for kind, density in (("fp32", (0.5, 0.2)), ("int8", (0.5, 0.5))):
        engine = shadowc.load(mini[kind])
        flags = [str(flag) for flag in flags_of(density)]
        result = hosts.ran(
            [
                genai / "bin" / "python",
                hosts.GENAI / "generate.py",
                mini[kind],
                *TEXTS,
                "--max-new-tokens",
                "32",
                *flags,
            ]
        )
        expected = [
            text + engine.generate(text, max_new_tokens=32, density=shadowc.Density(*density)) for text in TEXTS
        ]
        assert result.stdout.removesuffix("\n").split("\n---\n") == expected


def test_the_c_program_gives_the_tokens_of_python(genai: Path, mini: dict[str, Path], tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    library, host, adapter = hosts.genai_library(genai), tmp_path / "generate", tmp_path / "half.onnx_adapter"
    source = hosts.GENAI / "generate.c"
    ran = hosts.ran([compiler, "-Wall", "-Wextra", "-Werror", "-o", host, source, library])
    assert not ran.stderr
    hosts.ran([genai / "bin/python", hosts.GENAI / "density.py", "--heads", 0.5, "--neurons", 0.2, "--out", adapter])
    for density, arguments in ((None, []), ((0.5, 0.2), [adapter])):
        result = hosts.ran(
            [host, mini["fp32"], TEXTS[0], "40", *arguments],
            LD_LIBRARY_PATH=str(library.parent),
            ORT_LIB_PATH=str(hosts.wheel_library(genai)),
        )
        ids = shadowc.load(mini["fp32"]).tokenizer(TEXTS[0])["input_ids"]
        expected = by_python(mini["fp32"], [ids], 40, density)[0]
        assert [int(word) for word in result.stderr.split()] == expected


def test_the_cpp_example_reads_text_through_the_tokenizer_of_genai(
    genai: Path, cpp_host: Path, mini: dict[str, Path], tmp_path: Path
) -> None:
    host = hosts.build_cpp("cpp-tokenizer", TOKENIZER_LIBRARY=hosts.genai_library(genai))
    engine = shadowc.load(mini["fp32"])
    for text in TEXTS:
        found = hosts.ran([host, mini["fp32"], text, "--max-new-tokens", "24", "--density", "0.5"])
        assert found.stdout.removesuffix("\n") == engine.generate(text, max_new_tokens=24, density=0.5)
