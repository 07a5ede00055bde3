# SPDX-License-Identifier: Apache-2.0
"""CTranslate2: converted by its own converter, run by its Generator. Its tokens are strings, here `t` and the id."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import ctranslate2  # type: ignore[import-not-found]  # in its own environment

from benchmarks.peers.contestants.protocol import Contestant, Generation, main, timed


class CTranslate2(Contestant):
    """Generator; int8 rounds activations per token, as its users have it."""

    packages = ("ctranslate2",)

    def __init__(self, model: Path, weights: str, threads: int) -> None:
        kind = {"int8": "int8", "fp32": "float32", "bf16": "bfloat16"}[weights]
        self._generator = ctranslate2.Generator(
            str(model), device="cpu", compute_type=kind, inter_threads=1, intra_threads=threads
        )

    @staticmethod
    def prepare(checkpoint: Path, out: Path, weights: str) -> None:
        """Convert; weights are quantised by the converter."""
        from ctranslate2.converters import TransformersConverter  # type: ignore[import-not-found]

        kind = {"int8": "int8", "fp32": "float32", "bf16": "bfloat16"}[weights]
        converter = TransformersConverter(str(checkpoint), low_cpu_mem_usage=True, load_as_float16=weights == "int8")
        converter.convert(str(out), quantization=kind, force=True)

    def generate(self, prompt: Sequence[int], new_tokens: int, setting: str) -> Generation:
        """See Contestant."""
        words = [f"t{token}" for token in prompt]

        def run(on_token: Callable[[], None]) -> list[int]:
            def step(_: ctranslate2.GenerationStepResult) -> bool:
                on_token()
                return False

            result = self._generator.generate_batch(
                [words],
                max_length=new_tokens,
                min_length=new_tokens,
                beam_size=1,
                sampling_topk=1,
                include_prompt_in_result=False,
                callback=step,
            )
            return [int(token) for token in result[0].sequences_ids[0]]

        return timed(run)


if __name__ == "__main__":
    main(CTranslate2)
