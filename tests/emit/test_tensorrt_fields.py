# SPDX-License-Identifier: Apache-2.0
"""A plan keeps the attributes of every operator: compile compares what the plugins serialise with the graph's nodes.

Compile asks the plugins of the built network, through TensorRT's API. That this is also what lies in the plan is read
here from a plan's bytes, whose format TensorRT does not describe: so it is done for the installed version, in a test.
Defects are planted into the plugin's source.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from shadowc.emit.tensorrt.builder import BuildRequest, build_plan, plugin_operators
from shadowc.spec.errors import InternalError
from shadowc.spec.ops import OPS
from shadowc.spec.program import Program
from shadowc.spec.progress import NullProgress
from tests.emit import rtx
from tests.tensorrt_plugin import toolchain
from tests.trace import deep

SLOW = pytest.mark.slow
TEXT = re.compile(rb"\x13\x80\x01\x00(.{8})\x01\x80\x0c\x80\x01\x00\1", re.DOTALL)
NUMBER = re.compile(rb"\x07\x80\x01\x00(.{4})", re.DOTALL)
INTS = re.compile(rb"\x01\x80\x03\x80\x01\x00(.{8})", re.DOTALL)
"""How TensorRT for RTX 1.7 begins a text, a number and an array in a plan; sizes are in bytes."""


class Reader:
    """Values of a plan, one after the other."""

    def __init__(self, content: bytes, at: int) -> None:
        self._content, self._at = content, at

    def _take(self, pattern: re.Pattern[bytes]) -> bytes:
        found = pattern.match(self._content, self._at)
        assert found, f"byte {self._at} does not begin {pattern.pattern!r}"
        self._at = found.end()
        return found[1]

    def _bytes(self, pattern: re.Pattern[bytes]) -> bytes:
        (size,) = struct.unpack("<Q", self._take(pattern))
        self._at += size
        return self._content[self._at - size : self._at]

    def text(self) -> str:
        return self._bytes(TEXT).removesuffix(b"\0").decode()

    def number(self) -> int:
        return int(struct.unpack("<i", self._take(NUMBER))[0])

    def field(self) -> str:
        name, length, kind = self.text(), self.number(), self.text()
        if kind == "CHAR":
            return f"{name}={self.text()}"
        assert kind == "INT32"
        return f"{name}={','.join(map(str, struct.unpack(f'<{length}i', self._bytes(INTS))))}"


def operators_in(content: bytes) -> Iterator[str]:
    """Operator and fields of every plugin in a plan, as `plugin_operators` writes those of a graph."""
    names = {op.name for op in OPS}
    for found in TEXT.finditer(content):
        (size,) = struct.unpack("<Q", found[1])
        name = content[found.end() : found.end() + size].decode(errors="replace")
        if name in names:
            reader = Reader(content, found.start())
            assert [reader.text() for _ in range(3)] == [name, "1", "shadowc"]
            yield " ".join((name, *sorted(reader.field() for _ in range(reader.number()))))


@pytest.fixture(scope="module", autouse=True)
def needed() -> None:
    rtx.required()


@pytest.fixture(scope="module")
def made() -> Program:
    """Two predicted layers, so that their numbers differ; hardly a field has its default."""
    plan = deep.plan(8, scope="global", exempt=(0, 1), min_active_heads=1, min_active_neurons=3)
    return rtx.program(facts=dataclasses.replace(rtx.SMALL, layers=3), sparsity=plan)


@pytest.fixture
def request_(made: Program, tmp_path: Path) -> BuildRequest:
    return rtx.request(tmp_path, "decode", made)


def test_plan_holds_the_attributes_of_every_operator(request_: BuildRequest, made: Program) -> None:
    build_plan(request_, NullProgress())
    wanted = {
        **{f"layers.{n}.attention": f"SparseAttention kv=all layer={max(n - 1, 0)}" for n in range(3)},
        **{f"layers.{n}.ffn": f"SparseFFN block=8 layer={max(n - 1, 0)} skip_zeros=1" for n in range(3)},
        "select.heads": "SelectThreshold exempt=0,1 min_active=1 scope=global",
        "select.neurons": "SelectThreshold exempt=0,1 min_active=3 scope=global",
    }
    assert plugin_operators(made.graph.nodes) == wanted
    content = (request_.folder / request_.plan.file).read_bytes()
    assert Counter(operators_in(content)) == Counter(wanted.values())
    changed = content.replace(struct.pack("<Qi", 4, 8), struct.pack("<Qi", 4, 9))  # blocks of 9 neurons
    assert Counter(operators_in(changed)) != Counter(wanted.values())


ENDING = "in the plan, '.*' in the graph"
FILES = [
    ("layers.2.ffn", "layer", 0, f"layers.2.ffn is 'SparseFFN block=8 layer=0 skip_zeros=1' {ENDING}"),
    ("select.heads", "exempt", [1], f"select.heads is 'SelectThreshold exempt=1 min_active=1 scope=global' {ENDING}"),
    ("layers.1.ffn", "skip_zeros", 0, f"layers.1.ffn is 'SparseFFN block=8 layer=0 skip_zeros=0' {ENDING}"),
    ("layers.1.attention", "kv", "active", f"layers.1.attention is 'SparseAttention kv=active layer=0' {ENDING}"),
]


@pytest.mark.parametrize(
    ("node", "attribute", "value", "says"), [*FILES[:2], *(pytest.param(*case, marks=SLOW) for case in FILES[2:])]
)
def test_graph_file_that_differs_from_the_graph_is_refused(
    request_: BuildRequest, node: str, attribute: str, value: object, says: str
) -> None:
    rtx.set_attribute(request_.folder / request_.plan.onnx, node, attribute, value)
    with pytest.raises(InternalError, match=says):
        build_plan(request_, NullProgress())


DEFECTS = {
    "serialised": ("values[s].ints.data(), PluginFieldType", "values[0].ints.data(), PluginFieldType"),
    "read": ("ints.push_back(static_cast<int32_t>(number))", "ints.push_back(number == 1 ? 0 : number)"),
}
"""What the plugin's fields.cc says, and what it says with the defect."""


@pytest.mark.parametrize("wrongly", ["serialised", pytest.param("read", marks=SLOW)])
def test_plugin_that_changes_a_field_is_refused(request_: BuildRequest, wrongly: str, tmp_path: Path) -> None:
    plugin = planted(request_.plugin, *DEFECTS[wrongly], tmp_path)
    with pytest.raises(InternalError, match=rf"layers\.\d\.\w+ is '.*' {ENDING}"):
        build_plan(dataclasses.replace(request_, plugin=plugin), NullProgress())


def planted(plugin: Path, right: str, wrong: str, folder: Path) -> Path:
    """The installed plugin built again with a defect in fields.cc, in a folder."""
    family = plugin.stem.removeprefix("libshadowc_")
    headers = [path for version, path in toolchain.header_sets().items() if f"trt{version.split('.')[0]}" == family]
    cuda = toolchain.cuda_include()
    unused = (f"{family}_auto.dir/", "_glue.dir/fields.cc", "/empty.cc")
    objects = [path for path in toolchain.objects() if not any(part in str(path) for part in unused)]
    if not headers or cuda is None or not objects or shutil.which("g++") is None:
        pytest.skip("needs a checkout that built the plugin, its headers, CUDA's and g++")
    source = (toolchain.PLUGIN_SOURCES / "fields.cc").read_text()
    assert source.count(right) == 1, f"{right} is no longer in fields.cc"
    (folder / "fields.cc").write_text(source.replace(right, wrong))
    made = folder / plugin.name
    toolchain.run(
        "g++", "-std=c++20", "-fPIC", "-shared", "-fvisibility=hidden", "-isystem", headers[0], "-isystem", cuda,
        f"-I{toolchain.PLUGIN_SOURCES}", f"-I{toolchain.KERNEL_SOURCES}", folder / "fields.cc", *objects,
        f"-Wl,--version-script={toolchain.PLUGIN_SOURCES / 'exports.map'}", "-Wl,-Bsymbolic",
        f"-L{cuda.parent / 'lib64'}", f"-L{cuda.parent / 'lib'}", "-lcudart_static", "-lrt", "-ldl", "-lpthread",
        "-o", made,
    )  # fmt: skip
    return made
