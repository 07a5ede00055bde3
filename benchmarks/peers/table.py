# SPDX-License-Identifier: Apache-2.0
"""The race as Markdown for the README, and as JSON with every sample."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median

from benchmarks.peers.figures import Result, Row, common_first_tokens, row
from benchmarks.peers.lineup import DENSE, TITLES, Entrant
from benchmarks.peers.machine import Machine
from benchmarks.peers.race import Outcome, Plan


@dataclass(frozen=True, slots=True)
class Event:
    """Where, when and how the race was run."""

    model: str
    machine: Machine
    threads: int
    date: str
    base: str
    """Contestant whose dense setting the ratios divide by."""
    doubt: str
    """Why the figures are not to be trusted; empty if no reason was seen."""


def markdown(event: Event, entrants: Sequence[Entrant], plan: Plan, outcome: Outcome) -> str:
    """A table with one line per contestant and setting, failures included, and what it was measured on."""
    by_label = {entrant.label: entrant for entrant in entrants}
    short, long = plan.short_prompt, plan.long_prompt
    heads = [
        "runtime", "weights", "kept", "ms per token", "lowest to highest", "ratio", "MB read", "allowed ms",
        "above it", f"first token of {short}, ms", f"first token of {long}, ms", f"prompt of {long}, tokens/s",
        "peak GB", "agrees",
    ]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for result, figures in _rows(event, plan, outcome):
        entrant = by_label[result.contestant]
        cells = [TITLES[entrant.runtime], entrant.weights, _kept(result.setting)]
        cells += _cells(figures, plan.rounds) if figures else [f"not measured: {_cell(result.failure)}"]
        cells += [""] * (len(heads) - len(cells))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_notes(event, plan, outcome, entrants)]) + "\n"


def document(event: Event, entrants: Sequence[Entrant], plan: Plan, outcome: Outcome) -> str:
    """Everything as JSON: settings, samples by round, figures, failures."""
    figures = {(result.contestant, result.setting): found for result, found in _rows(event, plan, outcome)}
    results = []
    for result in outcome.results:
        found = figures[result.contestant, result.setting]
        results.append({**asdict(result), "figures": asdict(found) if found else None})
    content = {
        "event": asdict(event),
        "plan": asdict(plan),
        "contestants": {
            entrant.label: {"runtime": entrant.runtime, "weights": entrant.weights} for entrant in entrants
        },
        "versions": outcome.versions,
        "reloaded": outcome.reloaded,
        "results": results,
    }
    return json.dumps(content, indent=2) + "\n"


def _rows(event: Event, plan: Plan, outcome: Outcome) -> list[tuple[Result, Row | None]]:
    results = outcome.results
    base = next((one for one in results if (one.contestant, one.setting) == (event.base, DENSE)), None)
    common = common_first_tokens(results, plan.rounds)
    return [(one, None if one.failure else row(one, base, common, plan.long_prompt)) for one in results]


def _kept(setting: str) -> str:
    if setting == DENSE:
        return "all"
    heads, neurons = setting.split("/")
    return f"{heads} heads, {neurons} neurons"


def _cells(figures: Row, rounds: int) -> list[str]:
    decode, above = figures.decode, figures.above_ms
    return [
        f"{decode.median:.1f}",
        f"{decode.lowest:.1f} to {decode.highest:.1f}",
        _number(figures.ratio, ".2f"),
        _number(figures.megabytes_per_token, ".0f"),
        _number(figures.allowed_ms, ".1f"),
        "" if above is None else f"{above.median:.1f} ({above.lowest:.1f} to {above.highest:.1f}; {figures.steady})",
        f"{figures.short_first.median:.0f}",
        f"{figures.long_first.median:.0f}",
        f"{figures.prefill_tokens_per_second:.0f}",
        f"{figures.peak_gigabytes:.1f}",
        f"{figures.agreeing} of {rounds}",
    ]


def _stream(streams: Sequence[float]) -> str:
    if not streams:
        return ""
    return f"; the stream read {median(streams):.1f} GB/s ({min(streams):.1f} to {max(streams):.1f})"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _notes(event: Event, plan: Plan, outcome: Outcome, entrants: Sequence[Entrant]) -> list[str]:
    counted = [sample for one in outcome.results for sample in one.samples if sample.bytes_per_token is not None]
    machine, streams = event.machine, [stream / 1e9 for sample in counted for stream in sample.streams]
    found = {TITLES[one.runtime]: outcome.versions[one.label] for one in entrants if one.label in outcome.versions}
    versions = [", ".join(f"{name} {version}" for name, version in of.items()) for of in found.values()]
    notes = [
        f"Model: the shape of {event.model}, dummy weights, batch 1, greedy, {plan.tokens} tokens after "
        f"{plan.short_prompt} of a prompt. {event.date}, {machine.cpu}, {event.threads} threads, "
        f"{machine.memory / 2**30:.0f} GiB, {machine.system}.",
        f"Medians of {plan.rounds} interleaved rounds{_stream(streams)}. *ratio*: to {event.base} in the same round. "
        "*allowed*: the bytes at 0.9 of the stream right before and behind, and 1 ms; *above it*: what samples took "
        "more, lowest to highest, of so many during which memory kept its pace within a fifth. "
        "*agrees*: rounds whose first token is that of most contestants. "
        "*peak*: of the process with all its settings, mapped files included.",
        f"Versions: {'; '.join(versions)}.",
    ]
    if outcome.reloaded:
        notes.append(f"Loaded anew for every measurement, for want of memory: {', '.join(outcome.reloaded)}.")
    if event.doubt:
        notes.append(f"**Doubtful**: {event.doubt}.")
    return [line for note in notes for line in (note, "")][:-1]
