# SPDX-License-Identifier: Apache-2.0
"""The whole TensorRT runtime on a device in host memory gives what the cpu engine gives, token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shadowc.measure.evaluate import evaluate
from shadowc.runtime.engine import Engine
from shadowc.runtime.tensorrt import decoder, layout, workspace
from shadowc.runtime.tensorrt.engine import TensorRtEngine
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError, InternalError, UnsupportedError
from tests.conftest import TINY
from tests.runtime.host_device import DeviceFaultError, HostDevice, HostPlan
from tests.runtime.host_engine import on_host, prompts
from tests.runtime.tensorrt_folder import write_folder

PAD = TINY["pad_token_id"]
DENSITIES = [1.0, 0.5, Density(0.5, 0.25), 0.0]


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


def test_bench_measures_the_engine_at_each_density_beside_copies_on_the_device(
    trt_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from shadowc.measure import bench, settings

    counting = on_host(trt_folders["fp32"], kernels=True)
    monkeypatch.setattr("shadowc.runtime.load.load", lambda folder, threads, memory: counting)
    monkeypatch.setattr(settings, "STREAM_BYTES", 1 << 16)
    report = bench.bench(trt_folders["fp32"], densities=[Density(), Density(0.5, 0.25)], rounds=1, tokens=4)
    assert (report.threads, report.isa) == (0, "host memory (compute capability 8.6)")
    assert [row.label for row in report.rows] == ["1 heads, 1 neurons", "0.5 heads, 0.25 neurons"]
    assert report.rows[0].speedup == 1
    assert report.rows[1].megabytes_per_token < report.rows[0].megabytes_per_token
    assert all(row.skip_zeros for row in report.rows)
    assert report.stream_gigabytes_per_second > 0
    assert [row.shares for row in report.rows] == [None, None]  # a plan has no nodes to look at
    assert report.break_even == ()  # and no dense twin
    assert [row.label for row in report.prompts] == ["a mask per token, skip zeros"]
    assert report.prompts[0].first_token_ms > 0
    with pytest.raises(UnsupportedError, match="they cannot be changed"):
        bench.bench(trt_folders["fp32"], densities=[Density()], rounds=1, tokens=4, skip_zeros=False)


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
