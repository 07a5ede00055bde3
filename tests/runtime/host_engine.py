# SPDX-License-Identifier: Apache-2.0
"""Engines for TensorRT on a device in host memory, and prompts for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shadowc.runtime.load import read_manifest
from shadowc.runtime.tensorrt.engine import TensorRtEngine
from tests.conftest import TINY
from tests.runtime.host_device import HostDevice, HostPlan, load_model


def on_host(folder: Path, *, kernels: bool = False, device: HostDevice | None = None) -> TensorRtEngine:
    """The engine as `load` makes it, on a host device instead of a GPU."""
    device, manifest = device or HostDevice(), read_manifest(folder)
    plans = {
        name: HostPlan(device, part, load_model(folder, part.onnx), kernels=kernels)
        for name, part in manifest.tensorrt.plans.items()
    }
    return TensorRtEngine(folder, manifest, device, plans)


def prompts(rows: int, tokens: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, TINY["vocab_size"], (rows, tokens), dtype=np.int64)
