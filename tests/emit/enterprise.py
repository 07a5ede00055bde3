# SPDX-License-Identifier: Apache-2.0
"""The part of TensorRT 10's Python API that the builder's process calls, which records what it was told.

Strict: an attribute that enterprise TensorRT does not have cannot be set, and what returns a failure there does here.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

OLD_TIMES, NEW_TIMES, DAMAGED_TIMES = b"times of before", b"times of now", b"times of nobody"
PLAN = (b"first half, ", b"second half")
STEPS = 3


class Flag(IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class Profile:
    def __init__(self, clip: bool) -> None:
        self._clip = clip
        self.shapes: dict[str, list[tuple[int, ...]]] = {}

    def set_shape(self, name: str, *ranges: Iterable[int]) -> None:
        self.shapes[name] = [tuple(sizes) for sizes in ranges]
        if self._clip:
            self.shapes[name][2] = self.shapes[name][1]

    def get_shape(self, name: str) -> list[tuple[int, ...]]:
        return self.shapes.get(name, [])


class TimingCache:
    def __init__(self, content: bytes) -> None:
        self._content = content

    def serialize(self) -> bytearray:
        return bytearray(self._content)


class Config:
    __slots__ = (
        "_log", "cache", "features", "flags", "profiles", "progress_monitor", "read", "refuse_profiles", "refuse_times",
    )  # fmt: skip

    def __init__(self, log: Any, refuse_profiles: bool, refuse_times: bool) -> None:
        self._log = log
        self.flags = {"TF32"}
        self.refuse_times = refuse_times
        self.refuse_profiles = refuse_profiles
        self.profiles: list[Profile] = []
        self.progress_monitor: Any = None
        self.cache: TimingCache | None = None
        self.features: dict[str, bool] = {}
        self.read: bytes | None = None

    def set_preview_feature(self, feature: str, on: bool) -> None:
        self.features[feature] = on

    def add_optimization_profile(self, profile: Profile) -> int:
        if self.refuse_profiles:
            self._log("ERROR", "IOptimizationProfile::isValid: Invalid optimization profiles for input tensors past")
            return -1
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def clear_flag(self, flag: str) -> None:
        self.flags.discard(flag)

    def create_timing_cache(self, content: bytes) -> TimingCache | None:
        self.read = self.read or content
        return None if content == DAMAGED_TIMES else TimingCache(content)

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if self.refuse_times and cache.serialize():
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> TimingCache | None:
        return self.cache


class Layer:
    """A layer as networks hand it out: the class of its kind must be put in by hand."""

    def __init__(self, name: str, type: str) -> None:
        self.name, self.type = name, type


class PluginLayer(Layer):
    @property
    def plugin(self) -> Any:
        parts = {
            "core": SimpleNamespace(plugin_name="SparseFFN"),
            "build": SimpleNamespace(metadata_string="layer=0 block=16 skip_zeros=1"),
        }
        return SimpleNamespace(get_capability_interface=parts.__getitem__)


class Network:
    def __init__(self, flags: int) -> None:
        self.flags = flags
        self.num_layers = self.num_inputs = self.num_outputs = 0

    def parsed(self) -> None:
        self.num_layers, self.num_inputs, self.num_outputs = 2, 1, 1

    def get_layer(self, index: int) -> Layer:
        return (Layer("layers.0.ffn", "PLUGIN_V3"), Layer("cast", "CAST"))[index]

    def get_input(self, index: int) -> Any:
        return SimpleNamespace(name="past", dtype=SimpleNamespace(name="INT64"), shape=(-1,))

    def get_output(self, index: int) -> Any:
        return SimpleNamespace(name="logits", dtype=SimpleNamespace(name="FLOAT"), shape=(-1, -1, 96))


class Enterprise:
    """Stands for the module `tensorrt`; `config` and `network` are those of the last build."""

    ILogger: Any
    NetworkDefinitionCreationFlag = Flag
    BuilderFlag = SimpleNamespace(TF32="TF32")
    PreviewFeature = SimpleNamespace(ALIASED_PLUGIN_IO_10_03="aliases")
    LayerType = SimpleNamespace(PLUGIN_V3="PLUGIN_V3")
    IPluginV3Layer = PluginLayer
    PluginCapabilityType = SimpleNamespace(CORE="core", BUILD="build")

    class IProgressMonitor: ...

    class IStreamWriter: ...

    def __init__(
        self, *, clip_profiles: bool = False, refuse_profiles: bool = False, refuse_times: bool = False
    ) -> None:
        class ILogger:
            Severity = SimpleNamespace(
                INTERNAL_ERROR="INTERNAL_ERROR", ERROR="ERROR", WARNING="WARNING", INFO="INFO", VERBOSE="VERBOSE"
            )

        self.ILogger = ILogger
        self.clip_profiles = clip_profiles
        self.refuse_profiles = refuse_profiles
        self.refuse_times = refuse_times
        self.calls: list[str] = []
        self.network: Network | None = None
        self.config: Config | None = None

    def Builder(self, logger: Any) -> Any:
        self.calls.append("builder")
        return SimpleNamespace(
            create_network=self._network,
            create_builder_config=lambda: self._config(logger),
            create_optimization_profile=lambda: Profile(self.clip_profiles),
            build_serialized_network_to_stream=self._build,
        )

    def OnnxParser(self, network: Network, logger: Any) -> Any:
        def parse(path: str) -> bool:
            assert Path(path).is_file()
            network.parsed()
            logger.log("INFO", "not worth telling")
            return True

        return SimpleNamespace(parse_from_file=parse, num_errors=0)

    def get_plugin_registry(self) -> Any:
        def load(path: str) -> object:
            self.calls.append("plugin")
            return object()

        creators = [
            SimpleNamespace(plugin_namespace="shadowc", name="SparseFFN", plugin_version="1"),
            SimpleNamespace(plugin_namespace="", name="Stranger", plugin_version="1"),
        ]
        return SimpleNamespace(load_library=load, all_creators=creators)

    def _network(self, flags: int) -> Network:
        self.network = Network(flags)
        return self.network

    def _config(self, logger: Any) -> Config:
        self.config = Config(logger.log, self.refuse_profiles, self.refuse_times)
        return self.config

    def _build(self, network: Network, config: Config, writer: Any) -> bool:
        config.progress_monitor.phase_start("outer", None, STEPS)
        for step in range(STEPS):
            config.progress_monitor.step_complete("outer", step)
        config.progress_monitor.phase_finish("outer")
        config.cache = config.cache and TimingCache(NEW_TIMES)
        return all(writer.write(part) == len(part) for part in PLAN)
