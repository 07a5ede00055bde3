# SPDX-License-Identifier: Apache-2.0
"""What enqueue hands to the kernels: every size, type and pointer, from the plugin's own sources on the host.

The builder never calls enqueue and no GPU is here, so a pair of exchanged pointers would stay unseen without this.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.tensorrt_plugin import toolchain

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
GLUE = ("fields", "log", "operands", "plugin", "select_threshold", "sparse_attention", "sparse_ffn")

SELECT = {
    "op": "SelectThreshold", "alias0": -1, "alias1": -1, "asked": 16007, "changed": 0,
    "batch": 3, "tail": 2, "layers": 5, "units": 12, "global": 1, "min_active": 3, "density_batch": 1,
    "exempt_count": 2, "exempt": [0, 4], "scores": 1000, "density": 1001, "threshold": 2000, "active": 2001,
}  # fmt: skip
FFN = {
    "op": "SparseFFN", "alias0": -1, "alias1": -1, "asked": 16032009, "changed": 0,
    "act": 2, "weight": 3, "batch": 3, "tokens": 4, "hidden": 64, "neurons": 100, "block": 16, "skip_zeros": 1,
    "scores": 1001, "threshold": 1002, "mask_batch": 3, "tail": 2, "layers": 5, "units": 7, "layer": 2,
    "x": 1000, "w1": 1003, "w2t": 1004, "scales": 1005, "b1": 1006, "b2": 1007, "y": 2000, "read": 2001,
}  # fmt: skip
ATTENTION = {
    "op": "SparseAttention", "alias0": -1, "alias1": 10, "alias2": 11, "alias3": -1, "alias4": -1,
    "asked": 16032092048, "changed": 0,
    "act": 1, "weight": 1, "batch": 3, "tokens": 4, "hidden": 64, "heads": 2, "head_size": 32, "capacity": 40,
    "kv_active": 1, "scores": 1001, "threshold": 1002, "mask_batch": 1, "tail": 2, "layers": 5, "units": 2, "layer": 2,
    "x": 1000, "wq": 1003, "wk": 1004, "wv": 1005, "wot": 1006, "scales": 1007, "bqkv": 1008, "bo": 1009,
    "past_key": 1010, "past_value": 1011, "start": 1012, "past": 1013,
    "y": 2000, "present_key": 2001, "present_value": 2002, "context": 2003, "read": 2004,
}  # fmt: skip
EXPECTED = [call | {"workspace": 3000, "stream": 4000} for call in (SELECT, FFN, ATTENTION)]


class Glue:
    """The plugin's sources compiled for the host, one object file each."""

    def __init__(self, folder: Path, headers: Path) -> None:
        self.folder = folder
        system = [part for path in (headers, toolchain.cuda_include()) for part in ("-isystem", path)]
        own = [f"-I{toolchain.PLUGIN_SOURCES}", f"-I{toolchain.KERNEL_SOURCES}"]
        self.compile = ["g++", "-std=c++20", "-O0", "-c", *own, *system]
        for name in GLUE:
            self.add(name, (toolchain.PLUGIN_SOURCES / f"{name}.cc").read_text())
        self.add("probe", Path(__file__).with_name("enqueue_probe.cc").read_text())

    def add(self, name: str, source: str) -> None:
        (self.folder / f"{name}.cc").write_text(source)
        toolchain.run(*self.compile, f"{name}.cc", "-o", f"{name}.o", cwd=self.folder)

    def calls(self, **instead: str) -> list[dict[str, object]]:
        """What arrives at the kernels, with some object files replaced."""
        objects = [f"{instead.get(name, name)}.o" for name in (*GLUE, "probe")]
        toolchain.run("g++", *objects, "-o", "probe", cwd=self.folder)
        return [parse(line) for line in toolchain.run(self.folder / "probe").splitlines()]


def parse(line: str) -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in (word.split("=") for word in line.split()):
        if key == "exempt":
            found.setdefault(key, []).append(int(value))  # type: ignore[attr-defined]
        else:
            found[key] = value if key == "op" else int(value)
    return found


@pytest.fixture(scope="module")
def glue(tmp_path_factory, headers):
    return Glue(tmp_path_factory.mktemp("glue"), headers)


def test_kernels_get_every_size_type_and_pointer(glue):
    assert glue.calls() == EXPECTED


# --- planted defects ------------------------------------------------------------------------------------------------

TYPE_OF_WEIGHTS = "inputs_desc[FirstOf(signature, Operand::Type::kWeight)]"
DEFECTS = {  # what -> (source, what it says, what it says with the defect)
    "w1 and w2t exchanged": ("sparse_ffn", "args.w1 = call.In<void>(kW1)", "args.w1 = call.In<void>(kW2t)"),
    "past_key read as past_value": ("sparse_attention", "In<void>(kPastKey)", "In<void>(kPastValue)"),
    "start read from past": ("sparse_attention", "In<int64_t>(kStart)", "In<int64_t>(kPast)"),
    "wrong alias": ("sparse_attention", '"present_key", "BHTD", kPastKey', '"present_key", "BHTD", kPastValue'),
    "exempt layers forgotten": ("select_threshold", "args.exempt_count = ", "args.exempt_count = 0 * "),
    "bfloat16 taken for float16": ("operands", "return SHADOWC_BF16", "return SHADOWC_F16"),
    "workspace of the smallest profile": ("plugin", "inputs[i].max.d[axis]", "inputs[i].min.d[axis]"),
    "weights typed as activations": ("plugin", TYPE_OF_WEIGHTS, TYPE_OF_WEIGHTS.replace("Weight", "Activation")),
}


@pytest.mark.parametrize("what", DEFECTS)
def test_a_wrong_argument_is_noticed(glue, what):
    name, right, wrong = DEFECTS[what]
    source = (toolchain.PLUGIN_SOURCES / f"{name}.cc").read_text()
    assert source.count(right) == 1, f"{right} is no longer in {name}.cc"
    glue.add("planted", source.replace(right, wrong))
    assert glue.calls(**{name: "planted"}) != EXPECTED
