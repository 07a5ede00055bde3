# SPDX-License-Identifier: Apache-2.0
"""The C interface of the CUDA kernels: what it refuses, what it asks for, and what it promises about memory."""

from __future__ import annotations

import ctypes
import dataclasses

import numpy as np
import pytest

from tests.emulation import operators
from tests.emulation.library import Attention, DeviceMemory, Ffn, KernelError, Mask, Select
from tests.plugins import test_sparse_attention, test_sparse_ffn

F32, F16, BF16, I8 = range(4)
SIZE, TYPE, BATCH, POINTER, HEAD, LAYERS = range(-1, -7, -1)


def ffn(mask: dict | None = None, **changes) -> Ffn:
    sizes = {"act": F16, "weight": F16, "batch": 2, "tokens": 1, "hidden": 64, "neurons": 100, "block": 16}
    units = {"batch": 2, "tail": 1, "layers": 3, "units": 7, "layer": 1}
    return Ffn(**(sizes | changes), mask=Mask(**(units | (mask or {}))))


def attention(mask: dict | None = None, **changes) -> Attention:
    sizes = {"act": F16, "weight": I8, "batch": 2, "tokens": 1, "hidden": 128, "heads": 2, "head_size": 64,
             "capacity": 32}  # fmt: skip
    units = {"batch": 1, "tail": 1, "layers": 3, "units": 2, "layer": 1}
    return Attention(**(sizes | changes), mask=Mask(**(units | (mask or {}))))


def select(**changes) -> Select:
    return Select(**({"batch": 2, "tail": 1, "layers": 3, "units": 7, "density_batch": 1} | changes))


def test_the_bindings_have_the_structs_of_the_header(kernels):
    expected = []
    for struct, last in ((Mask, "layer"), (Select, "active"), (Ffn, "read"), (Attention, "read")):
        expected += [ctypes.sizeof(struct), getattr(struct, last).offset]
    assert kernels.layout() == expected


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (ffn(), 0),
        (ffn(hidden=0), SIZE),
        (ffn(tokens=-1), SIZE),
        (ffn(block=0), SIZE),
        (ffn(mask={"units": 6}), SIZE),
        (ffn(mask={"tail": 2}), SIZE),
        (ffn(mask={"layer": 3}), SIZE),
        (ffn(batch=1 << 16, tokens=1 << 16, mask={"batch": 1}), SIZE),
        (ffn(act=I8), TYPE),
        (ffn(weight=BF16), TYPE),
        (ffn(act=7), TYPE),
        (ffn(mask={"batch": 3}), BATCH),
        (attention(), 0),
        (attention(hidden=127), SIZE),
        (attention(capacity=0), SIZE),
        (attention(mask={"units": 3}), SIZE),
        (attention(head_size=144, hidden=288), HEAD),
        (attention(weight=F32), TYPE),
        (attention(mask={"batch": 4}), BATCH),
        (select(), 0),
        (select(units=0), SIZE),
        (select(layers=65), LAYERS),
        (select(exempt_count=65), LAYERS),
        (select(density_batch=3), BATCH),
    ],
)
def test_check_names_what_is_wrong_and_workspace_is_then_0(kernels, arguments, status):
    assert kernels.check(arguments) == status
    if status:
        assert kernels.workspace(arguments) == 0


def test_every_status_has_a_sentence_of_its_own(kernels):
    texts = {kernels.text(status) for status in (0, SIZE, TYPE, BATCH, POINTER, HEAD, LAYERS, -99)}
    assert len(texts) == 8
    assert all(texts)


@pytest.mark.parametrize(
    ("make", "name"),
    [(make, name) for make in (ffn, attention) for name in ("batch", "tokens")]
    + [(attention, "capacity"), (select, "batch"), (select, "tail")],
)
@pytest.mark.parametrize("weight", [F16, I8])
def test_workspace_never_shrinks_and_stops_growing_at_a_chunk_of_rows(kernels, make, name, weight):
    fixed = {"global_": 1} if make is select else {"weight": weight, "mask": {"batch": 1}}
    sizes = [kernels.workspace(make(**fixed, **{name: count})) for count in (*range(1, 70), 200, 5000)]
    assert sizes == sorted(sizes)
    assert sizes[0] > 0
    if name != "capacity":
        assert len(set(sizes[64:])) == 1


def test_enqueue_refuses_null_and_misaligned_pointers(kernels):
    with DeviceMemory(kernels.library) as memory:
        for operator in (ffn(), attention(), select(global_=1)):
            with pytest.raises(KernelError) as refused:
                kernels.enqueue(operator, memory)
            assert refused.value.status == POINTER
        scores = memory.allocate(2 * 3 * 7 * 4 + 16)
        given = {"density": memory.allocate(4), "threshold": memory.allocate(24)}
        kernels.enqueue(select(scores=scores, **given), memory)
        with pytest.raises(KernelError, match="aligned to 16 bytes"):
            kernels.enqueue(select(scores=scores + 4, **given), memory)


@dataclasses.dataclass
class Call:
    """One attention call whose memory the test holds."""

    kernels: object
    memory: DeviceMemory
    arrays: dict[str, np.ndarray]
    kept: bool = True

    def run(self, **changes) -> Attention:
        a, put = self.arrays, self.memory.put
        batch, tokens, width = a["x"].shape
        heads, _, size, _ = a["w"].shape
        mask = Mask(put(a["scores"]), put(a["threshold"]), len(a["scores"]), a["scores"].shape[1], 2, heads, 1)
        cache = [put(a[name]) for name in ("past_key", "past_value")]
        arguments = Attention(
            F32, F32, batch, tokens, width, heads, size, a["past_key"].shape[2], 0, mask, put(a["x"]),
            *(put(a["w"][:, part]) for part in range(4)), *(put(a[name]) for name in ("scales", "bqkv", "bo")),
            *cache, *cache, put(a["start"]), put(a["past"]), self.memory.allocate(a["x"].nbytes),
            *([self.memory.allocate(a["x"].nbytes), self.memory.allocate(16)] if self.kept else [None, None]),
        )  # fmt: skip
        for name, value in changes.items():
            setattr(arguments, name, value)
        self.kernels.enqueue(arguments, self.memory)
        return arguments


@pytest.mark.parametrize("kv", ["all", "active"])
@pytest.mark.parametrize(("B", "S", "T"), [(1, 1, 12), (2, 7, 12), (2, 1, 300)])
def test_a_cache_bound_twice_is_updated_in_place_and_kept_elsewhere(kernels, kv, B, S, T):
    arrays = test_sparse_attention.operands(np.random.default_rng(23), B=B, S=S, Z=S, H=4, T=T, fixed_mask=True)
    given = operators.split(arrays, "wq", "wk", "wv", "wot")
    copied, _ = kernels.attention(**given, kv=kv)
    in_place, _ = kernels.attention(**given, kv=kv, in_place=True)
    np.testing.assert_array_equal(in_place["y"], copied["y"])
    for name in ("present_key", "present_value"):
        live = [test_sparse_attention.live(outputs[name], arrays) for outputs in (in_place, copied)]
        np.testing.assert_array_equal(*live)
        before = arrays[name.replace("present", "past")]
        for b, first in enumerate(arrays["past"] + S):
            np.testing.assert_array_equal(in_place[name][b, :, first:], before[b, :, first:])
            np.testing.assert_array_equal(in_place[name][b, :, : arrays["past"][b]], before[b, :, : arrays["past"][b]])


def test_outputs_that_nobody_wants_change_nothing(kernels):
    arrays = test_sparse_attention.operands(np.random.default_rng(3), B=2, S=3, Z=3, H=3, D=32, T=20)
    results = []
    for kept in (True, False):
        with DeviceMemory(kernels.library) as memory:
            arguments = Call(kernels, memory, arrays, kept).run()
            results.append(memory.get(arguments.y, arrays["x"].shape, np.dtype(np.float32)))
    np.testing.assert_array_equal(*results)
    scores = np.random.default_rng(1).standard_normal((2, 1, 3, 40), dtype=np.float32)
    with DeviceMemory(kernels.library) as memory:
        arguments = select(units=40, scores=memory.put(scores), density=memory.put(np.float32([0.5])))
        arguments.threshold = memory.allocate(24)
        kernels.enqueue(arguments, memory)
        threshold = memory.get(arguments.threshold, (2, 1, 3), np.dtype(np.float32))
    np.testing.assert_array_equal(threshold, kernels.select(scores, np.float32([0.5]))[0])


@pytest.mark.parametrize(
    ("start", "past"),
    [(0, 10), (0, 12), (0, 2**62), (0, -1), (0, -(2**63)), (-1, 5), (9, 5), (2**63 - 1, 5)],
)
@pytest.mark.parametrize("B", [1, 2])
def test_positions_outside_the_cache_report_minus_one_and_touch_nothing_else(kernels, start, past, B):
    arrays = test_sparse_attention.operands(np.random.default_rng(31), B=B, S=3, Z=3, H=2, T=12)
    arrays |= {name: np.nan_to_num(arrays[name]) for name in ("past_key", "past_value")}
    arrays["start"][:], arrays["past"][:] = 0, 4
    given = operators.split(arrays, "wq", "wk", "wv", "wot")
    assert kernels.attention(**given)[1] != (-1, -1)
    arrays["start"][-1], arrays["past"][-1] = start, past
    outputs, read = kernels.attention(**given, in_place=True)
    assert read == (-1, -1)
    if B == 2:  # the other entry is served
        assert np.isfinite(outputs["y"][0]).all()


@pytest.mark.parametrize("act", list(operators.ACTIVATIONS))
@pytest.mark.parametrize("weight", ["float32", "int8"])
@pytest.mark.parametrize("D", [32, 64, 80, 96, 128])
def test_attention_equals_its_definition_for_every_head_size_and_type(kernels, act, weight, D):
    from shadowc.spec.ops import SPARSE_ATTENTION
    from tests.plugins import kernels as cpu_kernels

    rng = np.random.default_rng(D)
    arrays = test_sparse_attention.operands(rng, B=2, S=2, Z=1, H=3, D=D, T=40, dtype=weight)
    arrays = operators.rounded(arrays, act)
    found = operators.run(kernels, SPARSE_ATTENTION, act, arrays, layer=1)
    expected = cpu_kernels.oracle_run(SPARSE_ATTENTION, arrays, layer=1)
    for name in ("y", "context"):
        cpu_kernels.assert_close(found[name], expected[name], operators.TOLERANCES[act])
    for name in ("present_key", "present_value"):
        live = (test_sparse_attention.live(outputs[name], arrays) for outputs in (found, expected))
        cpu_kernels.assert_close(*live, operators.TOLERANCES[act])


@pytest.mark.parametrize("act", list(operators.ACTIVATIONS))
@pytest.mark.parametrize("weight", ["float32", "int8"])
@pytest.mark.parametrize("B", [1, 2, 4, 5, 16])
def test_ffn_equals_its_definition_for_every_batch_and_type(kernels, act, weight, B):
    from shadowc.spec.ops import SPARSE_FFN
    from tests.plugins import kernels as cpu_kernels

    arrays = test_sparse_ffn.operands(np.random.default_rng(B), B=B, F=200, E=320, block=16, dtype=weight)
    arrays = operators.rounded(arrays, act)
    found = operators.run(kernels, SPARSE_FFN, act, arrays, layer=1, block=16)
    expected = cpu_kernels.oracle_run(SPARSE_FFN, arrays, layer=1, block=16)
    cpu_kernels.assert_close(found["y"], expected["y"], operators.TOLERANCES[act])


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["local", "global"])
def test_select_takes_as_much_as_the_largest_model_has(kernels, scope):
    from tests.plugins import numpy_reference

    scores = np.random.default_rng(5).standard_normal((1, 1, 64, 36864), dtype=np.float32)
    for density in (0.1, 0.5):
        found = kernels.select(scores, np.float32([density]), scope=scope, exempt=[0, 63], min_active=4000)
        expected = numpy_reference.select_threshold(scores, np.float32([density]), scope, [0, 63], 4000)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
