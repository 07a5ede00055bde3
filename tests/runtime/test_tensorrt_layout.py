# SPDX-License-Identifier: Apache-2.0
"""Sizes, offsets and strides from engine.json alone, and what it must not say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from shadowc.runtime.tensorrt import layout, workspace
from shadowc.runtime.tensorrt.layout import Run
from shadowc.spec.errors import InputError, InternalError, VerificationError
from shadowc.spec.manifest import PlanPart, PlanTensor, TensorRtPart, WeightPart

B, H, D, T, V, L = 4, 2, 8, 512, 100, 3


def tensor(
    name: str, kind: str, shape: tuple[int, ...], largest: tuple[int, ...] | None = None, **more: Any
) -> PlanTensor:
    smallest = None if largest is None else tuple(max(size, 1) if size > 0 else 1 for size in shape)
    dtype = more.pop("dtype", "float16")
    return PlanTensor(
        name=name, kind=kind, dtype=dtype, shape=shape, smallest=smallest, best=largest, largest=largest, **more
    )


def part(**changes: Any) -> TensorRtPart:
    """A small engine of one layer in fp16; `changes` replace fields."""
    ids = tensor("input_ids", "token", (-1, -1), (B, 16), dtype="int64")
    weight = tensor("w", "weight", (3, 5))
    past = tensor("past_key_values.0.key", "cache", (-1, H, -1, D), (B, H, T, D))
    decode = PlanPart(
        file="decode.plan",
        onnx="decode.onnx",
        inputs=(
            ids,
            tensor("past", "state", (-1,), (B,), dtype="int64"),
            tensor("density_heads", "dial", (-1,), (B,), dtype="float32"),
            past,
            weight,
        ),
        outputs=(
            tensor("logits", "logits", (-1, -1, V), dtype="float32"),
            tensor("present.0.key", "cache", (-1, H, -1, D), alias_of=past.name),
            tensor("active.heads", "count", (-1, -1, L), dtype="int32"),
            tensor("read", "count", (4, 2, 2), dtype="int64"),
        ),
    )
    prefill = PlanPart(
        file="prefill.plan",
        onnx="prefill.onnx",
        inputs=(tensor("input_ids", "token", (-1, -1), (B, T), dtype="int64"), weight),
        outputs=(
            tensor("logits", "logits", (-1, 1, V), dtype="float32"),
            tensor("present.0.key", "cache", (-1, H, -1, D)),
        ),
    )
    fields: dict[str, Any] = {
        "family": "trt10",
        "library_version": "10.14",
        "activations": "float16",
        "max_batch": B,
        "max_context": T,
        "chunk": 16,
        "compute_capabilities": ("8.6",),
        "portable_above": None,
        "plans": {"decode": decode, "prefill": prefill},
        "plugins": (),
        "weights": (WeightPart(name="w", dtype="float16", shape=(3, 5), offset=256, bytes=30),),
    }
    return TensorRtPart(**{**fields, **changes})


DECODE = part().plans["decode"]
PREFILL = part().plans["prefill"]


def test_sizes_follow_rows_tokens_and_slots() -> None:
    run = Run(rows=3, tokens=5, slots=256)
    sizes = {one.name: layout.sizes_of(one, run) for one in (*DECODE.inputs, *DECODE.outputs)}
    assert sizes == {
        "input_ids": (3, 5),
        "past": (3,),
        "density_heads": (3,),
        "past_key_values.0.key": (3, H, 256, D),
        "w": (3, 5),
        "logits": (3, 5, V),
        "present.0.key": (3, H, 256, D),
        "active.heads": (3, 5, L),
        "read": (4, 2, 2),
    }


def test_a_prefill_gives_one_row_of_logits_and_keys_of_the_prompts_length() -> None:
    run = Run(rows=2, tokens=7, slots=7)
    assert [layout.sizes_of(one, run) for one in PREFILL.outputs] == [(2, 1, V), (2, H, 7, D)]


def test_tensors_are_packed_without_overlap_and_aligned() -> None:
    places, size = layout.pack(DECODE.inputs[:3], Run(3, 5, 256))
    assert [(name, place.offset, place.bytes) for name, place in places.items()] == [
        ("input_ids", 0, 3 * 5 * 8),
        ("past", 256, 3 * 8),
        ("density_heads", 512, 3 * 4),
    ]
    assert size == 768


def test_the_host_exchanges_ids_states_dials_logits_and_counts_only() -> None:
    given, taken = layout.exchanged(DECODE)
    assert [one.name for one in given] == ["input_ids", "past", "density_heads"]
    assert [one.name for one in taken] == ["logits", "active.heads", "read"]


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (Run(5, 1, 256), r"5 rows given, this engine takes 1 to 4 \(axis 0 of input input_ids\)"),
        (Run(1, 17, 256), r"17 tokens given, this engine takes 1 to 16 \(axis 1 of input input_ids\)"),
        (Run(1, 1, 513), r"513 tokens given, .* 1 to 512 \(axis 2 of input past_key_values.0.key\)"),
    ],
)
def test_a_run_outside_the_profile_says_input_given_and_allowed(run: Run, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        workspace.check_request(DECODE, run)
    assert "--max-" in caught.value.hint


def test_a_fixed_batch_is_no_range() -> None:
    fixed = tensor("input_ids", "token", (1, -1), (1, 16), dtype="int64")
    with pytest.raises(InputError, match="2 rows given, this engine takes 1 "):
        layout.sizes_of(fixed, Run(2, 1, 1))


@pytest.mark.parametrize(("slots", "capacity"), [(1, 256), (256, 256), (257, 512), (512, 512)])
def test_capacities_come_in_steps(slots: int, capacity: int) -> None:
    assert layout.capacity(part(), slots) == capacity


def test_a_step_beyond_the_context_is_cut_to_it() -> None:
    assert layout.capacity(part(max_context=300), 290) == 300
    with pytest.raises(InputError, match="301 tokens given, this engine takes 1 to 300"):
        layout.capacity(part(max_context=300), 301)


def test_fresh_keys_go_into_the_cache_as_one_strided_copy() -> None:
    copy = layout.row_copy("float16", (2, H, 7, D), (2, H, 256, D))
    assert (copy.to_pitch, copy.source_pitch, copy.width, copy.rows) == (256 * D * 2, 7 * D * 2, 7 * D * 2, 2 * H)


@pytest.mark.parametrize("cache", [(3, H, 256, D), (2, H + 1, 256, D), (2, H, 6, D), (2, H, 256, D + 1)])
def test_keys_that_do_not_fit_are_refused(cache: tuple[int, ...]) -> None:
    with pytest.raises(InternalError, match="do not fit"):
        layout.row_copy("float16", (2, H, 7, D), cache)


def test_an_engine_json_that_is_sound_has_no_contradictions() -> None:
    assert layout.contradictions(part(), 512) == []


def _weight(**changes: Any) -> dict[str, Any]:
    fields = {"name": "w", "dtype": "float16", "shape": (3, 5), "offset": 256, "bytes": 30, **changes}
    return {"weights": (WeightPart(**fields),)}


def _decode(change: Callable[[PlanPart], dict[str, Any]]) -> dict[str, Any]:
    return {"plans": {"decode": DECODE.model_copy(update=change(DECODE)), "prefill": PREFILL}}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (_weight(offset=512), "weight w cannot lie at byte 512 of 512"),
        (_weight(offset=-256), "weight w cannot lie"),
        (_weight(offset=128), "weight w cannot lie"),
        (_weight(bytes=32), "weight w cannot lie"),
        (_weight(name="v"), "decode plan takes a weight w that the table does not have"),
        (_weight(dtype="bfloat16"), "takes a weight w that the table does not have in this form"),
        (_weight(shape=(5, 3)), "takes a weight w that the table does not have in this form"),
        (
            _decode(lambda plan: {"inputs": (*plan.inputs, tensor("mystery", "dial", (-1,), (B,)))}),
            "nobody knows what to write into input mystery of the decode plan",
        ),
        (_decode(lambda plan: {"outputs": plan.outputs[1:]}), "the decode plan has no output logits"),
        (
            _decode(lambda plan: {"outputs": tuple(one.model_copy(update={"alias_of": ""}) for one in plan.outputs)}),
            "does not update the cache in place",
        ),
        (
            _decode(lambda plan: {"inputs": tuple(one for one in plan.inputs if one.kind != "cache")}),
            "output present.0.key of the decode plan shares the memory of no input like it",
        ),
        (
            _decode(lambda plan: {"outputs": tuple(one for one in plan.outputs if one.kind != "cache")}),
            "the two plans do not have the same caches",
        ),
    ],
)
def test_an_engine_json_that_contradicts_itself_is_refused(changes: dict[str, Any], says: str) -> None:
    assert any(says in text for text in layout.contradictions(part(**changes), 512))
    with pytest.raises(VerificationError, match="contradicts itself"):
        layout.require_consistent(part(**changes), 512, "engine.json")
