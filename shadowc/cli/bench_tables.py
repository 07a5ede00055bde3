# SPDX-License-Identifier: Apache-2.0
"""The tables of `shadowc bench`: decoding, the parts of a token's time, prompts, break-even, and how quiet it was."""

from __future__ import annotations

from statistics import fmean, median
from typing import TYPE_CHECKING

from shadowc.cli import render
from shadowc.measure.rounds import CONTEXT_TOKENS
from shadowc.runtime.weights_memory import ENOUGH_LARGE_PAGES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shadowc.measure.bench import BenchReport, BenchRow
    from shadowc.measure.shares import Shares

SLOW_WEIGHTS = 0.85
"""Of the stream of the same round: weights that are read more slowly in every round lie in slow memory."""
_PARTS = ("predictor", "selection", "attention", "ffn", "lm_head", "framework")


def show(report: BenchReport) -> None:
    """Everything, for people."""
    _show_surroundings(report)
    _show_decoding(report)
    _show_shares(report)
    _show_prompts(report)
    _show_break_even(report)
    if report.noise.warning:
        render.line(report.noise.warning)


def _show_surroundings(report: BenchReport) -> None:
    where = f"{report.threads} threads, {report.isa}" if report.threads else report.isa
    stream = "a stream reads" if report.threads else "a copy reads and writes"
    rows = f" in each of {report.batch} rows at once" if report.batch > 1 else ""
    behind = f" behind {report.context_tokens}" if report.context_tokens != CONTEXT_TOKENS else ""
    render.line(
        f"{report.model}, {report.weights}, {where}; "
        f"median of {report.rounds} rounds of {report.tokens} tokens{behind}{rows}; "
        f"{stream} {report.stream_gigabytes_per_second:.1f} GB/s here{_apart(report.round_trip_ns_by_round)}"
    )
    large, read = report.large_pages, report.weights_stream_by_round
    known = [f"{large:.0%} of it in large pages"] if large is not None else []
    known += [f"read at {median(read):.1f} GB/s"] if read else []
    if known:
        render.line(", ".join([f"weights: {report.memory} memory", *known]))
    if report.memory == "private":
        return
    if large is not None and large < ENOUGH_LARGE_PAGES:
        others = "renewed, or private" if report.memory == "shared" else "private"
        render.line(f"small pages cost bandwidth on many machines: compare with --memory {others}")
    elif read and all(own < SLOW_WEIGHTS * one for own, one in zip(read, report.stream_by_round, strict=True)):
        render.line("the weights lie in slower memory than the stream: compare with --memory private")


def _apart(round_trips: Sequence[float]) -> str:
    return f", two threads are {median(round_trips):.0f} ns apart" if round_trips else ""


def _names(rows: Sequence[BenchRow]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns that tell the rows apart, and their cells: masks and zeros only where rows differ in them."""
    masks = len({row.mask for row in rows} - {"none"}) > 1
    zeros = len({row.skip_zeros for row in rows}) > 1
    names = []
    for row in rows:
        kept = "dense twin" if row.mask == "none" else f"{row.density_heads:g}/{row.density_neurons:g}"
        mask = [row.mask.replace("none", "")] if masks else []
        names.append((kept, *mask, *([("skipped" if row.skip_zeros else "read")] if zeros else [])))
    return ("heads/neurons", *(["mask"] if masks else []), *(["zeros"] if zeros else [])), names


def _show_decoding(report: BenchReport) -> None:
    columns, names = _names(report.rows)
    render.table(
        (
            *columns,
            "ms/token",
            "lowest to highest",
            "MB/token",
            "floor, ms",
            "above it",
            "GB/s",
            "of stream",
            "speed-up",
        ),
        [
            (
                *name,
                f"{row.ms_per_token:.2f}",
                f"{row.ms_lowest:.2f} to {row.ms_highest:.2f}",
                f"{row.megabytes_per_token:.1f}",
                f"{row.floor_ms:.2f}",
                "" if row.above_floor_ms is None else f"{row.above_floor_ms:.2f}",
                f"{row.gigabytes_per_second:.1f}",
                "" if row.share_of_stream is None else render.share(row.share_of_stream),
                f"{row.speedup:.2f}x",
            )
            for name, row in zip(names, report.rows, strict=True)
        ],
    )
    if report.batch > 1:
        render.line("a token: of a step its share of the rows; first tokens: those of all prompts")
    if not report.weights_stream_by_round:  # nor was memory read between turns
        render.line("floor: the bytes at 0.9 of the stream of the same round")
        return
    steady = fmean(row.steady_turns for row in report.rows)
    render.line(
        "floor: the bytes at 0.9 of a stream before and behind each turn; above it, of stream: where both agree "
        f"within a fifth ({render.share(steady)} of the turns)"
    )


def _show_shares(report: BenchReport) -> None:
    columns, names = _names(report.rows)
    rows = zip(names, report.rows, strict=True)
    found = [(name, row.shares) for name, row in rows if row.shares is not None]
    if not found:
        return
    unknown = sorted({operator for _, shares in found for operator in shares.unknown})
    render.line("")
    render.table(
        (
            *columns,
            "predictor",
            "selection",
            "attention",
            "FFN",
            "LM head",
            "framework",
            "ms, profiled",
        ),
        [(*name, *_parts(shares), f"{shares.ms_per_token:.2f}") for name, shares in found],
    )
    render.line(
        "parts of a token's time, in runs of their own under ONNX Runtime's profiler; "
        "framework: other nodes, gaps, the loop around the graph"
    )
    if unknown:
        most = max(shares.other for _, shares in found)
        render.line(f"in no column: {', '.join(unknown)}, up to {render.share(most)}")


def _parts(shares: Shares) -> tuple[str, ...]:
    return tuple(render.share(getattr(shares, part)) for part in _PARTS)


def _show_prompts(report: BenchReport) -> None:
    prompts = "prompt" if report.batch == 1 else f"{report.batch} prompts"
    render.line("")
    render.table(
        (f"{prompts} of {report.prompt_tokens} tokens", "first token, ms", "lowest to highest", "prompt tokens/s"),
        [
            (
                row.label,
                f"{row.first_token_ms:.1f}",
                f"{row.ms_lowest:.1f} to {row.ms_highest:.1f}",
                f"{row.tokens_per_second:.1f}",
            )
            for row in report.prompts
        ],
    )
    render.line(f"from loading the engine to the first token, once: {report.load_to_first_token_seconds:.2f} s")


def _show_break_even(report: BenchReport) -> None:
    if report.break_even:
        render.line("")
        render.facts(
            {row.label: str(row.break_even) for row in report.break_even},
            title="largest density that is faster than the dense twin, predictor and selection included",
        )
    costs = {row.label: row.mask_cost for row in report.break_even if row.mask_cost is not None}
    if costs:
        render.line("")
        render.facts(
            {
                label: f"{render.share(cost.share)}, between {render.share(cost.least)} and {render.share(cost.most)}"
                for label, cost in costs.items()
            },
            title="predictor and selection, not profiled: what density 1 adds to the dense twin's time",
        )
