# SPDX-License-Identifier: Apache-2.0
"""The whole TensorRT runtime on a device in host memory gives what the cpu engine gives, token by token."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shadowc.measure.evaluate import evaluate
from shadowc.runtime.engine import Engine
from shadowc.runtime.load import read_manifest
from shadowc.runtime.tensorrt import decoder, layout, workspace
from shadowc.runtime.tensorrt.engine import KEPT_SIZES, TensorRtEngine
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError, InternalError, SetupError, UnsupportedError
from tests.conftest import TINY
from tests.runtime.host_device import DeviceFaultError, HostDevice, HostExecution, HostPlan, load_model
from tests.runtime.tensorrt_folder import write_folder

PAD = TINY["pad_token_id"]
DENSITIES = [1.0, 0.5, Density(0.5, 0.25), 0.0]


@pytest.fixture(scope="session")
def trt_folders(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Read only."""
    parent = tmp_path_factory.mktemp("tensorrt")
    for name in ("fp32", "dense"):
        write_folder(folders[name], parent / name)
    return {name: parent / name for name in ("fp32", "dense")}


def on_host(folder: Path, *, kernels: bool = False, device: HostDevice | None = None) -> TensorRtEngine:
    """The engine as `load` makes it, on a host device instead of a GPU."""
    device, manifest = device or HostDevice(), read_manifest(folder)
    plans = {
        name: HostPlan(device, part, load_model(folder, part.onnx), kernels=kernels)
        for name, part in manifest.tensorrt.plans.items()
    }
    return TensorRtEngine(folder, manifest, device, plans)


@pytest.fixture(scope="module")
def host(trt_folders: dict[str, Path]) -> TensorRtEngine:
    return on_host(trt_folders["fp32"])


def prompts(rows: int, tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, TINY["vocab_size"], (rows, tokens), dtype=np.int64)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("rows", [1, 3])
def test_greedy_tokens_equal_the_cpu_engines(
    engine: Engine, host: TensorRtEngine, rows: int, density: float | Density
) -> None:
    ids = prompts(rows, 9, seed=rows)
    found, expected = (one.generate(ids, max_new_tokens=20, density=density) for one in (host, engine))
    np.testing.assert_array_equal(found, expected)
    assert host.last_stats.heads_by_layer.tolist() == engine.last_stats.heads_by_layer.tolist()
    assert host.last_stats.finish == engine.last_stats.finish


def test_left_padded_rows_equal_the_cpu_engines(engine: Engine, host: TensorRtEngine) -> None:
    ids = prompts(3, 9, seed=7)
    ids[1, :4] = ids[2, :1] = PAD
    found, expected = (one.generate(ids, max_new_tokens=12, density=0.5) for one in (host, engine))
    np.testing.assert_array_equal(found, expected)


def test_text_goes_in_and_comes_out_as_on_the_cpu(engine: Engine, host: TensorRtEngine) -> None:
    texts = ["a lazy neuron jumps over the record", "one head"]
    assert host.generate(texts, max_new_tokens=8) == engine.generate(texts, max_new_tokens=8)


@pytest.mark.parametrize("protocol", ["decode", "dense"])
def test_teacher_forced_logits_equal_the_cpu_engines(engine: Engine, host: TensorRtEngine, protocol: str) -> None:
    ids = prompts(2, 21, seed=3)  # more than two chunks of the decode plan, the last one a single token
    ids[1, :3] = PAD
    found, expected = (one.logits(ids, 0.5, protocol, prompt_tokens=4) for one in (host, engine))
    np.testing.assert_allclose(found, expected, atol=2e-4)
    if protocol == "decode":
        assert host.last_stats.neurons_by_layer.tolist() == engine.last_stats.neurons_by_layer.tolist()


def test_statistics_with_counting_kernels_equal_the_cpu_engines(engine: Engine, trt_folders: dict[str, Path]) -> None:
    counting = on_host(trt_folders["fp32"], kernels=True)
    ids = prompts(2, 6)
    for one in (counting, engine):
        one.generate(ids, max_new_tokens=9, min_new_tokens=9, density=Density(0.5, 0.25))
    for name in ("tokens", "new_tokens", "bytes_read", "bytes_read_kernels", "active_neurons", "dense_bytes"):
        assert getattr(counting.last_stats, name) == getattr(engine.last_stats, name), name


def test_a_dense_engine_generates_and_refuses_a_density(folders: dict[str, Path], trt_folders: dict[str, Path]) -> None:
    from shadowc.runtime.load import load

    dense, ids = on_host(trt_folders["dense"]), prompts(2, 5)
    expected = load(folders["dense"]).generate(ids, max_new_tokens=6)
    np.testing.assert_array_equal(dense.generate(ids, max_new_tokens=6), expected)
    with pytest.raises(InputError, match="engine is dense"):
        dense.generate(ids, density=0.5)


def test_a_step_is_captured_once_per_batch_size_and_replayed(trt_folders: dict[str, Path]) -> None:
    device = HostDevice()
    host = on_host(trt_folders["fp32"], device=device)
    for _ in range(2):
        for rows in (1, 2):
            host.generate(prompts(rows, 5), max_new_tokens=8, min_new_tokens=8, density=0.5)
    assert device.counts["capture"] == 2
    assert device.counts["launch"] == 4 * 7 - 2  # 7 steps per call; the first of each batch size runs plainly
    allocated = device.counts["allocate"]
    host.generate(prompts(1, 5), max_new_tokens=8, min_new_tokens=8, density=0.25)
    assert device.counts["allocate"] == allocated + 2 + 1  # the prompt of another size: inputs, outputs, fresh K/V


def test_densities_of_a_replayed_step_are_those_of_the_call(engine: Engine, host: TensorRtEngine) -> None:
    ids = prompts(1, 6, seed=5)
    for density in (0.25, 1.0, 0.5):
        host.generate(ids, max_new_tokens=6, min_new_tokens=6, density=density)
        engine.generate(ids, max_new_tokens=6, min_new_tokens=6, density=density)
        assert host.last_stats.heads == engine.last_stats.heads


def test_without_graphs_the_tokens_are_the_same(
    host: TensorRtEngine, trt_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHADOWC_CUDA_GRAPH", "0")
    device = HostDevice()
    plain, ids = on_host(trt_folders["fp32"], device=device), prompts(1, 6)
    np.testing.assert_array_equal(plain.generate(ids, max_new_tokens=9), host.generate(ids, max_new_tokens=9))
    assert device.counts["capture"] == 0


def test_a_longer_context_makes_a_larger_cache_and_a_new_graph(
    engine: Engine, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shadowc.runtime.tensorrt.layout.STEP_SLOTS", 16)
    write_folder(folders["fp32"], tmp_path / "e")
    device = HostDevice()
    host = on_host(tmp_path / "e", device=device)
    for tokens in (5, 30, 10):
        ids = prompts(2, tokens, seed=tokens)
        found, expected = (one.generate(ids, max_new_tokens=8, density=0.5) for one in (host, engine))
        np.testing.assert_array_equal(found, expected)
    assert device.counts["capture"] == 2


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


def test_bench_measures_the_engine_at_each_density_beside_copies_on_the_device(
    trt_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from shadowc.measure import bench

    counting = on_host(trt_folders["fp32"], kernels=True)
    monkeypatch.setattr("shadowc.runtime.load.load", lambda folder, threads: counting)
    monkeypatch.setattr(bench, "STREAM_BYTES", 1 << 16)
    report = bench.bench(trt_folders["fp32"], densities=[Density(), Density(0.5, 0.25)], rounds=1, tokens=4)
    assert (report.threads, report.isa) == (0, "host memory (compute capability 8.6)")
    assert [row.label for row in report.rows] == ["1 heads, 1 neurons", "0.5 heads, 0.25 neurons"]
    assert report.rows[0].speedup == 1
    assert report.rows[1].megabytes_per_token < report.rows[0].megabytes_per_token
    assert all(row.skip_zeros for row in report.rows)
    assert report.stream_gigabytes_per_second > 0


def test_closing_gives_all_memory_back(trt_folders: dict[str, Path]) -> None:
    device = HostDevice()
    host = on_host(trt_folders["fp32"], device=device)
    host.generate(prompts(2, 5), max_new_tokens=3)
    host.logits(prompts(1, 20), 0.5)
    host.close()
    assert not device.device
    assert not device.pinned
    assert not device.graphs


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


def test_the_context_is_the_smaller_of_models_and_profiles(folders: dict[str, Path], tmp_path: Path) -> None:
    write_folder(folders["fp32"], tmp_path / "e", max_context=32)
    host = on_host(tmp_path / "e")
    found = host.generate(prompts(1, 28), max_new_tokens=20, min_new_tokens=20, density=0.5)
    assert found.shape == (1, 32)
    assert host.last_stats.finish == ("context",)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda host: host.generate(prompts(5, 4)), r"5 rows given, this engine takes 1 to 4 \(axis 0 of input"),
        (lambda host: host.generate(prompts(1, 70)), "prompt has 70 tokens.*holds 64"),
        (lambda host: host.logits(prompts(1, 65)), "prompt has 65 tokens.*holds 64"),
        (lambda host: host.generate(prompts(1, 4), density=2), "from 0 to 1"),
    ],
)
def test_requests_outside_the_profile_say_input_given_and_allowed(
    host: TensorRtEngine, call: Callable[[TensorRtEngine], object], says: str
) -> None:
    with pytest.raises(InputError, match=says) as caught:
        call(host)
    assert caught.value.hint


def test_scores_of_a_control_are_refused(host: TensorRtEngine) -> None:
    with pytest.raises(UnsupportedError, match="own predictor"):
        host.logits(prompts(1, 6), 0.5, scores=lambda tokens: (np.zeros(1), np.zeros(1)))


def test_eval_cuts_the_text_to_the_context_of_the_engine(folders: dict[str, Path], tmp_path: Path) -> None:
    write_folder(folders["fp32"], tmp_path / "e", max_context=32)
    report = evaluate(on_host(tmp_path / "e"), "one head of a lazy neuron is one record. " * 9, densities=[])
    assert report.window == 32


def test_eval_refuses_controls_before_it_measures_anything(
    host: TensorRtEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[object] = []
    monkeypatch.setattr(TensorRtEngine, "logits", lambda self, *given, **named: measured.append(given))
    with pytest.raises(UnsupportedError, match=r"static, random: .*own predictor") as caught:
        evaluate(host, "one head", densities=[Density(0.5)], methods=("predictor", "static", "random"))
    assert caught.value.hint.startswith("--methods predictor")
    assert not measured


def test_eval_without_methods_measures_the_predictor_alone(host: TensorRtEngine) -> None:
    report = evaluate(host, "one head of a lazy neuron", densities=[Density(0.5)])
    assert [row.method for row in report.rows] == ["predictor"]


def test_keys_that_a_kernel_dropped_are_noticed(trt_folders: dict[str, Path]) -> None:
    host = on_host(trt_folders["fp32"])
    host.plans["decode"].uncounted = -1
    with pytest.raises(InternalError, match=r"dropped keys: 5 \+ 1 slots of 64"):
        host.generate(prompts(1, 5), max_new_tokens=4, density=0.5)


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


def _wrong_pitch(patch: pytest.MonkeyPatch) -> None:
    right = layout.row_copy
    patch.setattr(workspace, "row_copy", lambda *sizes: replace(right(*sizes), to_pitch=right(*sizes).source_pitch))


def _past_stays(patch: pytest.MonkeyPatch) -> None:
    right = workspace.Workspace.step
    patch.setattr(workspace.Workspace, "step", lambda self, values: right(self, {**values, "past": values["past"] - 1}))


def _no_start(patch: pytest.MonkeyPatch) -> None:
    right = workspace.Workspace.step
    patch.setattr(
        workspace.Workspace, "step", lambda self, values: right(self, {**values, "start": 0 * values["start"]})
    )


def _always_dense(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(decoder.DeviceDecoder, "set_density", lambda self, heads, neurons: None)


def _no_upload(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(workspace.Block, "upload", lambda self: None)


def _no_download(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(workspace.Block, "download", lambda self: None)


def _nobody_waits(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(HostDevice, "synchronize", lambda self: None)


def _cache_not_shared(patch: pytest.MonkeyPatch) -> None:
    right = HostPlan.execution

    def execution(self: HostPlan, *, steady: bool) -> object:
        made = right(self, steady=steady)
        bind = made.bind

        def shifted(name: str, address: int, sizes: tuple[int, ...] | None = None) -> None:
            bind(name, address + 256 * name.startswith("present.0.key"), sizes)

        made.bind = shifted
        return made

    patch.setattr(HostPlan, "execution", execution)


def _captures_a_wait(patch: pytest.MonkeyPatch) -> None:
    right = workspace.Exchange.enqueue

    def enqueue(self: workspace.Exchange) -> None:
        right(self)
        self._inputs._device.synchronize()

    patch.setattr(workspace.Exchange, "enqueue", enqueue)


@pytest.mark.parametrize(
    "plant",
    [_wrong_pitch, _past_stays, _no_start, _always_dense, _no_upload, _no_download, _nobody_waits, _cache_not_shared,
     _captures_a_wait],
)  # fmt: skip
def test_a_planted_defect_is_found(
    engine: Engine, trt_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, plant: Callable[..., None]
) -> None:
    ids = prompts(3, 9, seed=7)
    ids[1, :4] = ids[2, :1] = PAD
    expected = engine.generate(ids, max_new_tokens=12, density=0.25)
    plant(monkeypatch)
    try:
        found = on_host(trt_folders["fp32"]).generate(ids, max_new_tokens=12, density=0.25)
    except (DeviceFaultError, InternalError):
        return
    assert not np.array_equal(found, expected)
