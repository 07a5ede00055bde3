# SPDX-License-Identifier: Apache-2.0
"""Engine folders for hosts other than this package, and the hosts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.conftest import TINY, random_model, write_tokenizer
from tests.e2e.compiled import options
from tests.emit import engines
from tests.examples import hosts

if TYPE_CHECKING:
    from transformers import OPTForCausalLM


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Stages and remembered hashes go to a folder of the test run, shared by its processes."""
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if base.name.startswith("popen-") else base) / "stage-cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHADOWC_CACHE", str(root))
        yield


@pytest.fixture(scope="session")
def folders(
    tiny_model: OPTForCausalLM, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Tiny engines of every type of weights, and dense. Read only."""
    return engines.write_kinds(tmp_path_factory.mktemp("engines"), tiny_model, tiny_checkpoint)


@pytest.fixture(scope="session")
def mini(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """opt-mini with a predictor trained in seconds: fp32, int8 and int4. For slow tests. Read only."""
    import shadowc

    parent = tmp_path_factory.mktemp("mini")
    kinds = ("fp32", "int8", "int4")
    return {kind: shadowc.compile(options("opt-mini", parent / f"{kind}.engine", weights=kind)) for kind in kinds}


@pytest.fixture(scope="session")
def norms_last(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model of opt-350m's form, norms behind blocks and embeddings projected: fp32 and int8. Read only."""
    import shadowc

    parent = tmp_path_factory.mktemp("last")
    checkpoint = parent / "opt-last"
    random_model({**TINY, "word_embed_proj_dim": 32, "do_layer_norm_before": False}).save_pretrained(checkpoint)
    write_tokenizer(checkpoint)
    kinds = ("fp32", "int8")
    return {kind: shadowc.compile(options(checkpoint, parent / f"{kind}.engine", weights=kind)) for kind in kinds}


@pytest.fixture(scope="session")
def cpp_host() -> Path:
    """The program of examples/cpp, without a tokenizer."""
    if lacking := hosts.missing_for_cpp():
        pytest.skip(f"examples/cpp cannot be built: {lacking}")
    return hosts.build_cpp("cpp")


@pytest.fixture(scope="session")
def genai() -> Path:
    """The environment with stock onnxruntime-genai; needs the network once."""
    return hosts.genai_environment()
