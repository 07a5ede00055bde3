# SPDX-License-Identifier: Apache-2.0
"""Writes a density as an adapter file, the form in which every host of onnxruntime-genai can choose it per request.

onnxruntime-genai feeds a graph only the inputs that it knows, and inputs without a default. An adapter, which is made
for LoRA, is the way to give values to inputs that have one, and `density_heads` and `density_neurons` are such inputs.

    python density.py --heads 0.5 --neurons 0.2 --out half.onnx_adapter
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnxruntime


def write_adapter(path: Path, heads: float | None, neurons: float | None) -> None:
    """Write an adapter of fewer than 200 bytes; a share that is None stays the engine's own.

    Args:
        path: the file, by custom *.onnx_adapter.
        heads: share of the heads to compute, 0 to 1.
        neurons: share of the neurons to compute, 0 to 1.
    """
    shares = {"density_heads": heads, "density_neurons": neurons}
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters(
        {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.array([share], np.float32))
            for name, share in shares.items()
            if share is not None
        }
    )
    adapter.export_adapter(str(path))


def share(text: str) -> float:
    """A share of the units, as an argument."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not within 0 and 1")
    return value


def main() -> None:
    """Write one adapter."""
    parser = argparse.ArgumentParser(description="Write a density as an adapter for onnxruntime-genai.")
    parser.add_argument("--heads", type=share, help="share of the heads to compute, 0 to 1")
    parser.add_argument("--neurons", type=share, help="share of the neurons to compute, 0 to 1")
    parser.add_argument("--out", type=Path, required=True, help="the file to write, NAME.onnx_adapter")
    arguments = parser.parse_args()
    if arguments.heads is None and arguments.neurons is None:
        parser.error("give --heads, --neurons or both")
    write_adapter(arguments.out, arguments.heads, arguments.neurons)


if __name__ == "__main__":
    main()
