# SPDX-License-Identifier: Apache-2.0
"""OpenVINO GenAI: exported by optimum-intel with weight-only compression, run by LLMPipeline on token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import openvino  # type: ignore[import-not-found]  # in its own environment
import openvino_genai  # type: ignore[import-not-found]

from benchmarks.peers.contestants.protocol import Contestant, Generation, main, timed

COMPRESSIONS = {"int8": (8, False), "int8-sym": (8, True), "int4": (4, False)}
"""Weights -> bits, and whether the range is symmetric around zero; the exporter's default is that it is not."""


class _Stamps(openvino_genai.StreamerBase):  # type: ignore[misc]
    """Tells the clock about every token."""

    def __init__(self, on_token: Callable[[], None]) -> None:
        super().__init__()
        self._on_token = on_token

    def write(self, token: int | list[int]) -> openvino_genai.StreamingStatus:
        for _ in token if isinstance(token, list) else [token]:
            self._on_token()
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


class OpenVino(Contestant):
    """LLMPipeline with its own choice of attention backend, cache precision and dynamic quantisation."""

    packages = ("openvino", "openvino-genai", "optimum-intel", "nncf")

    def __init__(self, model: Path, weights: str, threads: int) -> None:
        self._pipeline = openvino_genai.LLMPipeline(str(model), "CPU", INFERENCE_NUM_THREADS=threads)

    @staticmethod
    def prepare(checkpoint: Path, out: Path, weights: str) -> None:
        """Export with weights in so many bits; other settings are the exporter's own."""
        from optimum.intel import (  # type: ignore[import-not-found]
            OVModelForCausalLM,
            OVWeightQuantizationConfig,
        )

        bits, symmetric = COMPRESSIONS[weights]
        compression = OVWeightQuantizationConfig(bits=bits, sym=symmetric)
        model = OVModelForCausalLM.from_pretrained(
            checkpoint, export=True, compile=False, quantization_config=compression
        )
        model.save_pretrained(out)

    def generate(self, prompt: Sequence[int], new_tokens: int, setting: str) -> Generation:
        """See Contestant."""
        config = openvino_genai.GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True, do_sample=False)
        ids = openvino.Tensor(np.array([prompt], np.int64))
        inputs = openvino_genai.TokenizedInputs(ids, openvino.Tensor(np.ones((1, len(prompt)), np.int64)))

        def run(on_token: Callable[[], None]) -> list[int]:
            result = self._pipeline.generate(inputs, config, _Stamps(on_token))
            return [int(token) for token in result.tokens[0]]

        return timed(run)


if __name__ == "__main__":
    main(OpenVino)
