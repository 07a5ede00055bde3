# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.peers`, from the repository root, in shadowc's environment. See README.md beside this file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

from benchmarks.peers import machine, table
from benchmarks.peers.checkpoint import write_checkpoint
from benchmarks.peers.environments import PreparationError
from benchmarks.peers.figures import Result
from benchmarks.peers.lineup import Entrant, entrants, prepare
from benchmarks.peers.race import Outcome, Plan, race
from benchmarks.rounds import positive
from shadowc.checkpoint.resolve import read_config
from shadowc.measure.settings import STREAM_BYTES, STREAM_REPEATS
from shadowc.runtime.library import OpLibrary
from shadowc.spec.errors import ShadowcError

CONTESTANTS = (
    "shadowc:int8", "openvino:int8", "openvino:int4", "ctranslate2:int8", "ctranslate2:fp32", "transformers:bf16",
    "onnxruntime:fp32", "onnxruntime:int8",
)  # fmt: skip
DENSITIES = ("0.5/0.5", "0.5/0.2")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare, race, write the table; returns the exit status: 0 also if contestants failed, 2 for wrong options."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        field = entrants(_items(options.contestants), options.engine, _items(options.densities))
        library = OpLibrary.installed()
        options.cache = options.cache.resolve()
        here = machine.here()
        checkpoint = write_checkpoint(options.model, options.cache / "checkpoints")
    except (ValueError, ShadowcError) as error:
        parser.error(str(error))
    threads = options.threads or here.cores
    out = options.out or options.cache / f"{checkpoint.name}.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    launches, failures = {}, []
    for entrant in field:
        try:
            _note(f"preparing {entrant.label}")
            launches[entrant.label] = prepare(entrant, checkpoint, options.cache, threads)
        except PreparationError as error:
            _note(str(error))
            failures += [Result(entrant.label, setting, (), str(error)) for setting in entrant.settings]
    plan = Plan(
        rounds=options.rounds,
        tokens=options.tokens,
        short_prompt=options.short_prompt,
        long_prompt=options.long_prompt,
        vocab=int(str(read_config(checkpoint)["vocab_size"])),
        memory=machine.available_memory() - int(options.reserve_gib * 2**30),
    )
    _note("waiting for a quiet machine")
    doubt = machine.noise(here.cores)
    settings = {entrant.label: entrant.settings for entrant in field}
    outcome = race(launches, settings, plan, lambda: library.stream_read(STREAM_BYTES, threads, STREAM_REPEATS), _note)
    outcome = _in_order(replace(outcome, results=(*outcome.results, *failures)), field)
    event = table.Event(checkpoint.name, here, threads, date.today().isoformat(), options.base, doubt)
    out.write_text(table.markdown(event, field, plan, outcome), "utf-8")
    out.with_suffix(".json").write_text(table.document(event, field, plan, outcome), "utf-8")
    sys.stdout.write(out.read_text("utf-8"))
    _note(f"written: {out} and {out.with_suffix('.json')}")
    return 0


def _in_order(outcome: Outcome, field: Sequence[Entrant]) -> Outcome:
    place = {entrant.label: index for index, entrant in enumerate(field)}
    return replace(outcome, results=tuple(sorted(outcome.results, key=lambda result: place[result.contestant])))


def _note(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    add = parser.add_argument
    add("--model", default="opt-1.3b", help="short name whose shape the dummy checkpoint has, or a folder")
    add("--contestants", default=",".join(CONTESTANTS), help="RUNTIME:WEIGHTS, separated by commas (%(default)s)")
    add("--engine", action="append", default=[], metavar="LABEL=FOLDER", help="a compiled engine to run as well")
    add("--densities", default=",".join(DENSITIES), help="HEADS/NEURONS kept by shadowc's engines (%(default)s)")
    add("--base", default="openvino:int8", help="contestant that the ratios divide by (%(default)s)")
    add("--rounds", type=positive, default=5, help="(%(default)s)")
    add("--tokens", type=positive, default=32, help="timed after the first (%(default)s)")
    add("--short-prompt", type=positive, default=33, help="tokens before decoding (%(default)s)")
    add("--long-prompt", type=positive, default=512, help="tokens of the prompt that is timed (%(default)s)")
    add("--threads", type=positive, help="of every runtime; default: one per physical core")
    add("--cache", type=Path, default=Path("build/peers"), help="environments, checkpoints, models (%(default)s)")
    add("--reserve-gib", type=float, default=3.0, help="memory that the loaded contestants leave free (%(default)s)")
    add("--out", type=Path, help="Markdown file; the JSON goes beside it. Default: CACHE/MODEL.md")
    return parser


def _items(text: str) -> list[str]:
    return [item for item in text.split(",") if item]


if __name__ == "__main__":
    sys.exit(main())
