# SPDX-License-Identifier: Apache-2.0
"""Generates text from an engine folder of target cpu with stock onnxruntime-genai; shadowc is not needed.

    python generate.py mini "Once upon a time there was" "The boy said" --density 0.5

Greedy, and the same tokens as `shadowc run`. README.md beside this file says which versions were tested.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og  # type: ignore[import-not-found]
from density import share, write_adapter

DENSITY = "density"


class Host:
    """A loaded engine folder.

    Args:
        folder: the engine folder.
        heads: share of the heads to compute; None: the engine's own.
        neurons: share of the neurons to compute; None: the engine's own.
    """

    def __init__(self, folder: Path, heads: float | None = None, neurons: float | None = None) -> None:
        config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
        self._positions = int(config["model"]["context_length"])
        self._model = og.Model(str(folder))
        self._adapters = og.Adapters(self._model)
        self._dialled = heads is not None or neurons is not None
        if self._dialled:
            with tempfile.TemporaryDirectory() as parent:
                path = Path(parent) / "density.onnx_adapter"
                write_adapter(path, heads, neurons)
                self._adapters.load(str(path), DENSITY)

    @cached_property
    def _tokenizer(self) -> Any:
        """Made on first use: an engine without tokenizer takes ids."""
        tokenizer = og.Tokenizer(self._model)
        tokenizer.update_options(add_special_tokens="true")  # OPT was trained with </s> in front of every text
        return tokenizer

    def texts(self, prompts: Sequence[str], most: int) -> list[str]:
        """The prompts and what follows them."""
        rows = self.ids([[int(token) for token in self._tokenizer.encode(prompt)] for prompt in prompts], most)
        return [str(self._tokenizer.decode(np.array(row, np.int32))) for row in rows]

    def ids(self, prompts: Sequence[Sequence[int]], most: int) -> list[list[int]]:
        """Prompts and at most so many new tokens each; prompts of equal length run as one batch.

        onnxruntime-genai pads prompts of unequal length on the right, and the operators take padding on the left only:
        the two must never share a batch.
        """
        results: list[list[int]] = [[] for _ in prompts]
        for length in sorted({len(prompt) for prompt in prompts}):
            chosen = [index for index, prompt in enumerate(prompts) if len(prompt) == length]
            for index, row in zip(chosen, self._batch([prompts[index] for index in chosen], most), strict=True):
                results[index] = row
        return results

    def _batch(self, rows: Sequence[Sequence[int]], most: int) -> list[list[int]]:
        parameters = og.GeneratorParams(self._model)
        length = min(len(rows[0]) + most, self._positions)
        parameters.set_search_options(do_sample=False, batch_size=len(rows), max_length=length)
        generator = og.Generator(self._model, parameters)
        if self._dialled:
            generator.set_active_adapter(self._adapters, DENSITY)
        generator.append_tokens(np.array(rows, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
        return [[int(token) for token in generator.get_sequence(row)] for row in range(len(rows))]


def main() -> None:
    """Generate from texts, or from token ids for programs."""
    parser = argparse.ArgumentParser(description="Generate text from an engine folder with onnxruntime-genai.")
    parser.add_argument("engine", type=Path)
    parser.add_argument("prompts", nargs="*", metavar="PROMPT")
    parser.add_argument("--ids", type=json.loads, help="prompts as token ids instead, for example [[2,1715,668]]")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--density", type=share, help="share of heads and neurons to compute, 0 to 1")
    parser.add_argument("--head-density", type=share)
    parser.add_argument("--neuron-density", type=share)
    arguments = parser.parse_args()
    if bool(arguments.prompts) == bool(arguments.ids):
        parser.error("give prompts, or --ids")

    def chosen(one: float | None) -> float | None:
        return arguments.density if one is None else one

    host = Host(arguments.engine, chosen(arguments.head_density), chosen(arguments.neuron_density))
    if arguments.ids:
        json.dump(host.ids(arguments.ids, arguments.max_new_tokens), sys.stdout)
        print()
    else:
        print("\n---\n".join(host.texts(arguments.prompts, arguments.max_new_tokens)))


if __name__ == "__main__":
    main()
