# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime on the dense graph that optimum-onnx exports, with a cache that grows from call to call.

The cache stays in ONNX Runtime's own buffers: what one run returns is bound to the next, nothing is copied in Python.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from benchmarks.peers.contestants.protocol import Contestant, Generation, main, timed

BLOCK = 128
"""int8 weights share a factor over so many inputs."""


class OnnxRuntime(Contestant):
    """InferenceSession of stock operators: MatMul in fp32, MatMulNBits (8 bits, int8 activations) in int8."""

    packages = ("onnxruntime", "optimum-onnx")

    def __init__(self, model: Path, weights: str, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            str(model / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self._outputs = [value.name for value in self._session.get_outputs()]
        self._past = {
            value.name: (1, value.shape[1], 0, value.shape[3])
            for value in self._session.get_inputs()
            if value.name.startswith("past_key_values.")
        }
        self._takes_positions = any(value.name == "position_ids" for value in self._session.get_inputs())

    @staticmethod
    def prepare(checkpoint: Path, out: Path, weights: str) -> None:
        """Export in fp32, quantise the products if asked to."""
        if weights == "int8":
            _quantise(checkpoint, out)
            return
        from optimum.exporters.onnx import main_export  # type: ignore[import-not-found]

        main_export(
            str(checkpoint), out, task="text-generation-with-past", dtype="fp32", do_validation=False, device="cpu"
        )

    def generate(self, prompt: Sequence[int], new_tokens: int, setting: str) -> Generation:
        """See Contestant."""

        def run(on_token: Callable[[], None]) -> list[int]:
            cache = {
                name: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
                for name, shape in self._past.items()
            }
            ids, found, length = np.array([prompt], np.int64), list[int](), len(prompt)
            for _ in range(new_tokens):
                logits, cache = self._step(ids, length, cache)
                found.append(int(logits[0, -1].argmax()))
                on_token()
                ids, length = np.array([found[-1:]], np.int64), length + 1
            return found

        return timed(run)

    def _step(
        self, ids: np.ndarray, length: int, cache: dict[str, onnxruntime.OrtValue]
    ) -> tuple[np.ndarray, dict[str, onnxruntime.OrtValue]]:
        """Logits [1,S,V] and the cache behind `ids` [1,S], whose last token is number `length` of the sequence."""
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", np.ones((1, length), np.int64))
        if self._takes_positions:
            binding.bind_cpu_input("position_ids", np.arange(length - ids.shape[1], length, dtype=np.int64)[None])
        for name, value in cache.items():
            binding.bind_ortvalue_input(name, value)
        for name in self._outputs:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        results = dict(zip(self._outputs, binding.get_outputs(), strict=True))
        return results["logits"].numpy(), {name: results[name.replace("past_key_values", "present")] for name in cache}


def _quantise(checkpoint: Path, out: Path) -> None:
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

    plain = out / "fp32"
    plain.mkdir()
    # In a process of its own, whose memory is free again before the weights are read.
    export = [sys.executable, "-m", "benchmarks.peers.contestants.onnxruntime", "prepare", "--weights", "fp32"]
    subprocess.run([*export, "--checkpoint", str(checkpoint), "--model", str(plain)], check=True)
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=True, accuracy_level=4, bits=8)
    quantizer = MatMulNBitsQuantizer(onnx.load(plain / "model.onnx"), algo_config=config)
    quantizer.process()
    quantizer.model.save_model_to_file(str(out / "model.onnx"), use_external_data_format=True)
    shutil.rmtree(plain)


if __name__ == "__main__":
    main(OnnxRuntime)
