# SPDX-License-Identifier: Apache-2.0
"""Memory that runs short, captures that are refused, kernels that are kept, and the end of an engine."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from shadowc.runtime.tensorrt import workspace
from shadowc.runtime.tensorrt.engine import KEPT_SIZES, TensorRtEngine
from shadowc.runtime.tensorrt.plans import Scratch
from shadowc.runtime.transformers_model import OPTForCausalLM
from shadowc.spec.errors import InputError, InternalError, SetupError
from tests.runtime.host_device import HostDevice, HostExecution
from tests.runtime.host_engine import on_host, prompts


def test_only_so_many_batch_sizes_keep_their_memory(trt_folders: dict[str, Path]) -> None:
    device = HostDevice()
    host = on_host(trt_folders["fp32"], device=device)
    for rows in (1, 2, 3, 4):
        host.generate(prompts(rows, 5), max_new_tokens=3, density=0.5)
        assert len(device.graphs) <= KEPT_SIZES


def test_memory_of_other_batch_sizes_is_used_when_it_is_short(trt_folders: dict[str, Path]) -> None:
    device = HostDevice()
    host = on_host(trt_folders["fp32"], device=device)
    host.generate(prompts(4, 5), max_new_tokens=3, density=0.5)
    device.limit = sum(map(len, device.device.values())) + 1000
    host.generate(prompts(2, 5), max_new_tokens=3, density=0.5)
    with pytest.raises(SetupError, match="MB more are needed"):
        host.generate(prompts(4, 60), max_new_tokens=3, density=0.5)


def test_a_workspace_that_fails_gives_back_what_it_had_while_its_error_is_still_held(
    trt_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = HostDevice()
    host = on_host(trt_folders["fp32"], device=device)
    before = set(device.device)
    monkeypatch.setattr(workspace.Block, "bind", _short_of_memory)
    with pytest.raises(SetupError) as caught:
        host._new_space(2, 64)
    assert caught.traceback
    assert set(device.device) == before


@pytest.mark.parametrize(
    "call",
    [lambda host: host._prefill._sized(1, 30), lambda host: host._spaces[1].feed({}, 8)],
    ids=["prompt", "chunk"],
)
def test_a_prompt_or_chunk_that_finds_no_room_keeps_none(
    trt_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, call: Callable[[TensorRtEngine], object]
) -> None:
    device = HostDevice()
    host = on_host(trt_folders["fp32"], device=device)
    host.generate(prompts(1, 5), max_new_tokens=3, density=0.5)
    before = set(device.device)
    with monkeypatch.context() as patch:
        patch.setattr(workspace.Block, "bind", _short_of_memory)
        with pytest.raises(SetupError):
            call(host)
    assert set(device.device) <= before
    host.generate(prompts(1, 30), max_new_tokens=3, density=0.5)  # it goes on when there is room again


def _short_of_memory(*given: object) -> None:
    raise SetupError("memory is short")


def test_the_next_try_after_short_memory_comes_when_the_first_error_is_gone(
    trt_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    host, right, handled = on_host(trt_folders["fp32"]), TensorRtEngine._new_space, []
    host.generate(prompts(4, 5), max_new_tokens=3, density=0.5)

    def short_at_first(self: TensorRtEngine, rows: int, capacity: int) -> workspace.Workspace:
        handled.append(sys.exc_info()[1])
        if len(handled) == 1:
            _short_of_memory()
        return right(self, rows, capacity)

    monkeypatch.setattr(TensorRtEngine, "_new_space", short_at_first)
    host.generate(prompts(2, 5), max_new_tokens=3, density=0.5)
    assert handled == [None, None]


@pytest.mark.parametrize(
    "call",
    [
        lambda host: host.generate(prompts(1, 60), max_new_tokens=2, density=0.5),
        lambda host: host.logits(prompts(1, 9), 0.5),
    ],
    ids=["prompt", "chunk"],
)
def test_prompts_and_chunks_use_the_memory_of_other_batch_sizes_too(
    trt_folders: dict[str, Path], call: Callable[[TensorRtEngine], object]
) -> None:
    device = HostDevice()
    host = on_host(trt_folders["fp32"], device=device)
    for rows in (4, 1):
        host.generate(prompts(rows, 5), max_new_tokens=3, density=0.5)
    device.limit = sum(map(len, device.device.values()))
    call(host)
    assert list(host._spaces) == [1]


def test_kernels_are_kept_after_runs_of_each_plan_and_when_the_engine_closes(trt_folders: dict[str, Path]) -> None:
    host = on_host(trt_folders["fp32"])
    host.generate(prompts(1, 5), max_new_tokens=2, density=0.5)
    assert [host.plans[name].kept[:1] for name in ("prefill", "decode")] == [["execution"]] * 2
    host.plans["decode"].kept.clear()
    host.logits(prompts(1, 9), 0.5)
    assert host.plans["decode"].kept == ["execution"]
    host.close()
    assert [host.plans[name].kept[-1] for name in ("prefill", "decode")] == ["plan"] * 2


def test_closing_gives_all_memory_back(trt_folders: dict[str, Path]) -> None:
    device = HostDevice()
    host = on_host(trt_folders["fp32"], device=device)
    host.generate(prompts(2, 5), max_new_tokens=3)
    host.logits(prompts(1, 20), 0.5)
    host.close()
    assert not device.device
    assert not device.pinned
    assert not device.graphs
    assert [plan.closed for plan in host.plans.values()] == [True, True]


def test_scratch_memory_of_all_plans_is_given_back() -> None:
    device = HostDevice()
    scratch = Scratch(device)
    scratch.want(1 << 12)
    scratch.take()
    assert device.device
    scratch.close()
    scratch.close()
    assert not device.device


@pytest.mark.parametrize("others", [(2,), (1, 3, 4)], ids=["same size", "other sizes"])
def test_a_sequence_whose_place_another_one_took_is_refused(
    trt_folders: dict[str, Path], others: tuple[int, ...]
) -> None:
    model = OPTForCausalLM(on_host(trt_folders["fp32"]), 0.5)
    ids = torch.from_numpy(prompts(2, 5))
    first = model(ids)
    model(ids[:, :1], cache=first.past_key_values)
    for rows in others:
        last = model(torch.from_numpy(prompts(rows, 5)))
    with pytest.raises(InputError, match="another sequence was begun on this engine"):
        model(ids[:, :1], cache=first.past_key_values)
    model(torch.from_numpy(prompts(others[-1], 1)), cache=last.past_key_values)


@pytest.mark.parametrize(
    "call",
    [lambda host: host.generate(prompts(1, 5)), lambda host: host.logits(prompts(1, 5)),
     lambda host: host.copy_bandwidth(16, 1)],
)  # fmt: skip
def test_a_closed_engine_says_so(trt_folders: dict[str, Path], call: Callable[[TensorRtEngine], object]) -> None:
    host = on_host(trt_folders["fp32"])
    host.close()
    host.close()
    with pytest.raises(InputError, match="was closed") as caught:
        call(host)
    assert caught.value.hint


def test_closing_goes_on_behind_a_failure_and_tells_it(trt_folders: dict[str, Path]) -> None:
    device = HostDevice()
    host = on_host(trt_folders["fp32"], device=device)
    host.generate(prompts(1, 5), max_new_tokens=3)
    release, failed = device.release_graph, []

    def failing(graph: int) -> None:
        failed.append(graph)
        release(graph)
        raise InternalError("cudaGraphExecDestroy failed")

    (space,) = host._spaces.values()
    space._arena._held[-1] = (failing, space._graph)
    with pytest.raises(InternalError, match="cudaGraphExecDestroy"):
        host.close()
    assert failed
    assert not device.device
    assert not device.pinned


def _end_fails(patch: pytest.MonkeyPatch) -> None:
    def refuse(self: HostDevice) -> int:
        self.recording = None
        raise InternalError("cudaStreamEndCapture failed")

    patch.setattr(HostDevice, "end_capture", refuse)


def _run_fails(patch: pytest.MonkeyPatch) -> None:
    right = HostExecution.enqueue

    def refuse(self: HostExecution) -> None:
        if self.plan.device.recording is not None:
            raise InternalError("TensorRT could not run the plan")
        right(self)

    patch.setattr(HostExecution, "enqueue", refuse)


@pytest.mark.parametrize(
    ("plant", "says"), [(_end_fails, "cudaStreamEndCapture failed"), (_run_fails, "could not run the plan")]
)
def test_steps_that_cannot_be_recorded_run_plainly_after_one_warning(
    host: TensorRtEngine,
    trt_folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    plant: Callable[[pytest.MonkeyPatch], None],
    says: str,
) -> None:
    ids = [prompts(rows, 5) for rows in (1, 2)]
    expected = [host.generate(one, max_new_tokens=6) for one in ids]
    workspace._warn.cache_clear()
    plant(monkeypatch)
    tries: list[object] = []
    begin = HostDevice.begin_capture
    monkeypatch.setattr(HostDevice, "begin_capture", lambda self: tries.append(self) or begin(self))
    device = HostDevice()
    plain = on_host(trt_folders["fp32"], device=device)
    for one, tokens in zip(ids, expected, strict=True):
        np.testing.assert_array_equal(plain.generate(one, max_new_tokens=6), tokens)
    (warning,) = caplog.messages
    assert says in warning
    assert "SHADOWC_CUDA_GRAPH=0" in warning
    assert len(tries) == 2  # once for each batch size
    assert device.counts["launch"] == 0
