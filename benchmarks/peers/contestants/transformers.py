# SPDX-License-Identifier: Apache-2.0
"""transformers on torch: eager, in a bare greedy loop, which is faster than its `generate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from benchmarks.peers.contestants.protocol import Contestant, Generation, main, timed

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Transformers(Contestant):
    """OPTForCausalLM with the attention that transformers chooses."""

    packages = ("torch", "transformers")

    def __init__(self, model: Path, weights: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(model / "checkpoint", dtype=DTYPES[weights]).eval()

    @staticmethod
    def prepare(checkpoint: Path, out: Path, weights: str) -> None:
        """Nothing to do: it reads the checkpoint as it is."""
        (out / "checkpoint").symlink_to(checkpoint.resolve())

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], new_tokens: int, setting: str) -> Generation:
        """See Contestant."""

        def run(on_token: Callable[[], None]) -> list[int]:
            cache = DynamicCache(config=self._model.config)
            ids, found = torch.tensor([list(prompt)]), list[int]()
            for _ in range(new_tokens):
                logits = self._model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1).logits
                found.append(int(logits[0, -1].argmax()))
                on_token()
                ids = torch.tensor([found[-1:]])
            return found

        return timed(run)


if __name__ == "__main__":
    main(Transformers)
