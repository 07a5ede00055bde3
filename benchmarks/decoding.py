# SPDX-License-Identifier: Apache-2.0
"""One round of decoding: all settings of one engine in one process, in turns, with the memory's pace between these.

`python -m benchmarks.decoding ENGINE --settings dense,0.5/0.2` prints a `Round` as one line of JSON. Rounds are
processes of their own so that a long series can be stopped between two of them, and so that only they need to
run undisturbed; see rounds.py.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shadowc.measure.rounds import Turn, in_turns, mean_seconds
from shadowc.measure.settings import STREAM_BYTES, STREAM_REPEATS, pace_of
from shadowc.measure.turns import Text, tokens_generated, turn_sizes
from shadowc.runtime.engine import Engine
from shadowc.runtime.load import load_cpu
from shadowc.spec.density import Density

DENSE = "dense"
ZEROS = "+zeros"
"""Behind a setting: the fc2 half of neurons whose ReLU output is 0 is not read."""
PROMPT_TOKENS = 16
WARM_TOKENS = 3
_LOWEST_TOKEN = 4
"""Ids below are OPT's special tokens."""
_SHARE = r"(?:0(?:\.\d+)?|1(?:\.0+)?)"
_SETTING = re.compile(rf"(?:{DENSE}|({_SHARE})/({_SHARE}))({re.escape(ZEROS)})?")


@dataclass(frozen=True, slots=True)
class Setting:
    """What runs: the dense twin (density None), or the engine at a density."""

    density: Density | None
    skip_zeros: bool

    @staticmethod
    def parse(text: str) -> Setting:
        """Read `dense` or HEADS/NEURONS, with or without `+zeros`.

        Raises:
            ValueError: it is neither.
        """
        found = _SETTING.fullmatch(text)
        if found is None:
            raise ValueError(
                f"{text!r}: expected {DENSE} or HEADS/NEURONS (two shares from 0 to 1, for example 0.5/0.2), "
                f"with {ZEROS} behind it to skip the zeros of ReLU"
            )
        heads, neurons, zeros = found.groups()
        return Setting(None if heads is None else Density(float(heads), float(neurons)), zeros is not None)


@dataclass(frozen=True, slots=True)
class Sample:
    """One setting in one round."""

    size: float
    """Bytes per token: what the kernels counted, and LM head, predictor, norms and biases."""
    turns: tuple[Turn, ...]
    """A few tokens each, between those of the other settings; one of all where caches may hold the weights."""

    @property
    def ms(self) -> float:
        """Per token."""
        return mean_seconds(self.turns) * 1e3


@dataclass(frozen=True, slots=True)
class Round:
    """One pass over all settings."""

    stream: float
    """Bytes per second of a sequential read, measured in front of the settings."""
    large_pages: float | None
    """Share of the weights in large pages; None where the system does not tell."""
    samples: Mapping[str, Sample]

    @staticmethod
    def of(content: Mapping[str, Any]) -> Round:
        """Read what `asdict` made of one, through JSON."""
        samples = {
            text: Sample(one["size"], tuple(Turn(**{**turn, "paces": tuple(turn["paces"])}) for turn in one["turns"]))
            for text, one in content["samples"].items()
        }
        return Round(content["stream"], content["large_pages"], samples)


def one_round(folder: Path, settings: Sequence[str], *, turn: int, tokens: int, threads: int | None = None) -> Round:
    """Decode `tokens` tokens under every setting, after some that are not timed; of a large model a few in turns.

    Args:
        folder: an engine of target cpu.
        settings: as `Setting.parse` takes them, in the order of their turns.
        turn: number of the round; each has a prompt of its own.
        tokens: timed per setting.
        threads: of the operators; None: one per core.

    Raises:
        ShadowcError: the engine cannot be loaded here.
        ValueError: a setting that is none, or more tokens than the model has room for.
    """
    wanted = {text: Setting.parse(text) for text in settings}
    first = load_cpu(folder, threads=threads, skip_zeros=False, memory="renewed")  # in large pages, whoever wrote it
    kinds = dict.fromkeys((setting.density is None, setting.skip_zeros) for setting in wanted.values())
    engines = {kind: _variant(first, twin=kind[0], skip_zeros=kind[1]) for kind in kinds}
    model = first.manifest.model
    if PROMPT_TOKENS + tokens_generated(tokens) > model.positions:
        raise ValueError(f"{tokens} tokens behind {PROMPT_TOKENS}: {model.name} has room for {model.positions} in all")
    prompt = np.random.default_rng([turn, PROMPT_TOKENS]).integers(_LOWEST_TOKEN, model.vocab, (1, PROMPT_TOKENS))

    jobs = [(engines[one.density is None, one.skip_zeros], one.density or Density()) for one in wanted.values()]
    for engine, density in jobs:
        engine.generate(prompt, WARM_TOKENS, WARM_TOKENS, density)
    stream = first.op_library.stream_read(STREAM_BYTES, first.threads, STREAM_REPEATS)
    pace = pace_of(first.op_library, first.weights, first.threads)
    if pace is None:
        samples = [_at_once(engine, prompt, density, tokens, stream) for engine, density in jobs]
    else:
        sizes = turn_sizes(tokens)
        texts = [Text(engine, prompt, density, [0, *sizes]) for engine, density in jobs]
        turns = in_turns(texts, sizes, pace)
        samples = [Sample(text.bytes_read, tuple(taken)) for text, taken in zip(texts, turns, strict=True)]
    large = None if first.weights is None else first.weights.large_pages
    return Round(stream, large, dict(zip(wanted, samples, strict=True)))


def _at_once(engine: Engine, prompt: npt.NDArray[np.int64], density: Density, tokens: int, stream: float) -> Sample:
    """One turn of all tokens: of weights that caches may hold a turn of few would be what it takes to wake up."""
    engine.generate(prompt, tokens + 1, tokens + 1, density)
    stats = engine.last_stats
    return Sample(stats.bytes_read, (Turn(stats.seconds / stats.tokens, stats.tokens, (stream, stream)),))


def _variant(first: Engine, *, twin: bool, skip_zeros: bool) -> Engine:
    """Another engine over the weights that `first`, which does not skip zeros, has in memory."""
    engine = first
    if skip_zeros:
        engine = load_cpu(first.folder, threads=first.threads, verify=False, skip_zeros=True, memory=first.weights)
    return engine.dense_twin() if twin else engine


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one round and print it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoding", description=__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--settings", required=True, help="dense, HEADS/NEURONS, with or without +zeros; by commas")
    parser.add_argument("--turn", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args(arguments)
    found = one_round(
        given.engine, given.settings.split(","), turn=given.turn, tokens=given.tokens, threads=given.threads
    )
    sys.stdout.write(json.dumps(asdict(found)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
