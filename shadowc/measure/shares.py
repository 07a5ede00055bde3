# SPDX-License-Identifier: Apache-2.0
"""Which part of a token's time is predictor, selection, attention, FFN and LM head, and what is left.

A session of its own runs under ONNX Runtime's profiler, which costs time itself, and with a node for every operator,
where timed runs have chains of them: shares are of that run, never of the timed ones, and what is between nodes is
more in it. A token's time is from the end of one step to the end of the next, so that gaps between nodes and the loop
around the graph are in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal

from shadowc.spec.errors import InternalError
from shadowc.spec.ops import PREDICT_UNITS, SELECT_THRESHOLD, SPARSE_ATTENTION, SPARSE_FFN

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from shadowc.measure.settings import Variant
    from shadowc.runtime.engine import Engine
    from shadowc.runtime.recording import NodeTime, Run

PROFILED_TOKENS = 12
Part = Literal["predictor", "selection", "attention", "ffn", "lm_head", "framework", "other"]
_OPERATORS: dict[str, Part] = {
    PREDICT_UNITS.name: "predictor",  # its selection too
    SELECT_THRESHOLD.name: "selection",
    SPARSE_ATTENTION.name: "attention",
    SPARSE_FFN.name: "ffn",
}
_WORDS: dict[str, Part] = {
    "predictor": "predictor",
    "lm_head": "lm_head",
    "project_out": "lm_head",
    "project_in": "framework",
}
"""In a node's name."""
_FIRST: dict[str, Part] = {
    "scores": "predictor",
    "mask_scores": "predictor",
    "tail": "selection",
    "threshold": "selection",
    "active": "selection",
    "limits": "selection",
    "shares": "selection",
    "logits": "lm_head",
}
"""First component of a node's name. What cuts and joins scores, thresholds and the masked tail is there for masks."""
FRAMEWORK = frozenset(
    {
        "Add", "Cast", "Concat", "Div", "Equal", "Expand", "Gather", "Identity", "LayerNormalization", "Less", "Max",
        "Min", "Mul", "Range", "ReduceSum", "Reshape", "Shape", "SkipLayerNormalization", "Slice", "Squeeze", "Sub",
        "Unsqueeze", "Where",
    }
)  # fmt: skip
"""Operators between the parts: embedding, norms, residuals, positions, lengths."""


def part_of(name: str, operator: str) -> Part:
    """The part that a node belongs to; "other": an operator that nothing is known about."""
    if operator in _OPERATORS:
        return _OPERATORS[operator]
    for word, part in _WORDS.items():
        if word in name:
            return part
    return _FIRST.get(name.split(".")[0]) or ("framework" if operator in FRAMEWORK else "other")


@dataclass(frozen=True, slots=True)
class Shares:
    """A token's time by part; the shares add up to 1."""

    ms_per_token: float
    """Under the profiler, which slows it down."""
    predictor: float
    selection: float
    attention: float
    ffn: float
    lm_head: float
    framework: float
    """Nodes between the parts, gaps, and the loop around the graph."""
    gaps: float
    """What of `framework` is in no node."""
    other: float
    """Operators that nothing is known about."""
    unknown: tuple[str, ...]
    """Those operators."""


def profile(variant: Variant, engine: Engine, prompt: npt.NDArray[np.int64]) -> list[Shares]:
    """The shares at every density of a variant, in its order.

    Args:
        variant: names the densities.
        engine: its engine.
        prompt: ids [B,S] that fit into one run of the graph.
    """
    sparsity = variant.engine.manifest.sparsity
    refresh = sparsity.refresh if variant.mask == "sequence" and sparsity else 0
    count = 2 + _whole(PROFILED_TOKENS, refresh)  # the prompt gives the first token, and the next step binds buffers
    steps = []
    with TemporaryDirectory(prefix="shadowc-profile-") as folder:
        profiled = engine.profiled(Path(folder))
        for density in variant.densities:
            profiled.generate(prompt, max_new_tokens=count, min_new_tokens=count, density=density)
            steps.append(profiled.last_stats.tokens // len(prompt))
        recordings = profiled.recordings()
    found = by_generation(recordings, steps)
    return [replace(one, ms_per_token=one.ms_per_token / len(prompt)) for one in found]


def _whole(tokens: int, refresh: int) -> int:
    """So many tokens or more, that as many masks belong to as when a sequence goes on."""
    return -(-tokens // refresh) * refresh if refresh else tokens


def by_generation(recordings: Sequence[Sequence[Run]], steps: Sequence[int]) -> Iterator[Shares]:
    """The shares of generations that followed each other.

    Args:
        recordings: the runs of each graph, that of the steps in front.
        steps: of each generation, which ran its prompt at once before; the first step is not counted.

    Raises:
        InternalError: the recording has another number of runs.
    """
    stepping = recordings[0]
    if len(stepping) != sum(steps) + len(steps) or min(steps) < 2:
        raise InternalError(f"{len(stepping)} runs were recorded of {len(steps)} prompts and {sum(steps)} steps")
    start = 0
    for count in steps:
        first, last = stepping[start + 1], stepping[start + count]
        inside = [run for runs in recordings for run in runs if first.end <= run.start and run.end <= last.end]
        yield _shares(last.end - first.end, count - 1, (node for run in inside for node in run.nodes))
        start += count + 1


def _shares(microseconds: int, tokens: int, nodes: Iterable[NodeTime]) -> Shares:
    spent: Counter[Part] = Counter()
    unknown = set()
    for node in nodes:
        part = part_of(node.name, node.operator)
        spent[part] += node.microseconds
        if part == "other":
            unknown.add(node.operator)
    gaps = microseconds - sum(spent.values())
    return Shares(
        ms_per_token=microseconds / tokens / 1e3,
        predictor=spent["predictor"] / microseconds,
        selection=spent["selection"] / microseconds,
        attention=spent["attention"] / microseconds,
        ffn=spent["ffn"] / microseconds,
        lm_head=spent["lm_head"] / microseconds,
        framework=(spent["framework"] + gaps) / microseconds,
        gaps=gaps / microseconds,
        other=spent["other"] / microseconds,
        unknown=tuple(sorted(unknown)),
    )
