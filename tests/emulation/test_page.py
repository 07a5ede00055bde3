# SPDX-License-Identifier: Apache-2.0
"""docs/gpu-kernels.md says what the kernels do."""

from __future__ import annotations

import importlib.util
import re

import numpy as np
import pytest

from tests.emulation import build, operators
from tests.plugins import test_sparse_attention, test_sparse_ffn


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_kernels_page", build.ROOT / "scripts" / "gpu_kernels_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_the_script_writes(script):
    written = (build.ROOT / "docs" / "gpu-kernels.md").read_text(encoding="utf-8")
    assert written == script.page(), "run scripts/gpu_kernels_page.py"


def test_every_kernel_that_is_launched_is_on_the_page(script):
    sources = "".join(path.read_text(encoding="utf-8") for path in build.KERNELS.glob("*.cu"))
    launched = set(re.findall(r"SHADOWC_LAUNCH\(\(?(\w+)", sources))
    named = set(re.findall(r"`(\w+)`", "".join(row[0] for row in script.LAUNCHES)))
    assert launched - named == {"clear", "clear_histograms"}, "those set counters to zero"
    assert named <= launched


@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
def test_the_weights_in_the_table_are_those_that_the_kernels_count(kernels, script, density):
    """Table rows hold the weights that `read` counts, and little else."""
    E, F, H, D = 256, 512, 4, 64
    model = script.Model("small", 2, E, F, H)
    rows = {row.kernel: row.size for row in script.moved(model, 4, density)}
    rng = np.random.default_rng(1)
    ffn = test_sparse_ffn.operands(rng, F=F, E=E, shared=True)
    ffn["scores"][:], ffn["threshold"][:] = (np.arange(F) >= density * F) * -1.0, -0.5
    _, read = kernels.ffn(**operators.split(ffn, "w1", "w2t"))
    neurons = int(density * F)
    extra = neurons * 12 + 2 * E + 4 * script.splits(model, 4) * E
    assert rows["hidden_of_listed"] + rows["sum_members (w2t)"] - extra == read[1]

    attention = test_sparse_attention.operands(rng, H=H, D=D, T=20, shared=True)
    attention["scores"][:], attention["threshold"][:] = (np.arange(H) >= density * H) * -1.0, -0.5
    _, read = kernels.attention(**operators.split(attention, "wq", "wk", "wv", "wot"))
    heads = int(density * H)
    extra = (heads + 2 * H) * D * 4 + 2 * E + 4 * heads * D + 4 * E + heads * D * 4 + 4 * script.splits(model, 4) * E
    assert rows["project"] + rows["sum_members (wot)"] - extra == read[1]
