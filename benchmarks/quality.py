# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.quality`, from the repository root: bits per byte of opt-mini by type of weights.

One engine per type, compiled where it is not there, on the held-out half of Python's manual; dense, under the
predictor's masks, and what is added to fp32. All but fp32 keep K/V as float16.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import shadowc
from shadowc.measure.evaluate import EvalReport, evaluate
from shadowc.spec.density import Density
from shadowc.spec.errors import ShadowcError

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = "fp32,bf16,int8,int4"
DENSITIES = "0.5/0.5,1/0.5,0.5/0.2"


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, evaluate, write the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__)
    parser.add_argument("--model", default="opt-mini", help="(%(default)s)")
    parser.add_argument("--weights", default=WEIGHTS, help="the first is the base (%(default)s)")
    parser.add_argument("--densities", default=DENSITIES, help="HEADS/NEURONS kept, by commas (%(default)s)")
    parser.add_argument("--text", type=Path, help="UTF-8 text; default: the held-out half of Python's manual")
    parser.add_argument("--out", type=Path, default=Path("build/quality"), help="engines, table, JSON (%(default)s)")
    given = parser.parse_args(arguments)
    text = heldout() if given.text is None else given.text.read_bytes().decode()
    reports = {}
    try:
        densities = [Density.parse(item) for item in given.densities.split(",")]
        for weights in given.weights.split(","):
            sys.stderr.write(f"{given.model} in {weights}\n")
            folder = given.out / f"{given.model}-{weights}.engine"
            shadowc.compile(shadowc.CompileOptions(model=given.model, weights=weights, out=folder))
            reports[weights] = evaluate(shadowc.load(folder), text, densities=densities, methods=("predictor",))
    except (ShadowcError, ValueError, TypeError) as error:
        parser.error(str(error))
    content = {weights: asdict(report) for weights, report in reports.items()}
    (given.out / "quality.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    (given.out / "quality.md").write_text(markdown(given.model, reports), "utf-8")
    sys.stdout.write((given.out / "quality.md").read_text("utf-8"))
    return 0


def heldout() -> str:
    """The text of examples/opt_mini/heldout.py, which is a script and no part of the package."""
    path = ROOT / "examples" / "opt_mini" / "heldout.py"
    spec = importlib.util.spec_from_file_location("heldout", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.heldout_text())


def markdown(model: str, reports: Mapping[str, EvalReport]) -> str:
    """One line per type of weights: bits per byte, and in brackets what is added to the first type's."""
    base = next(iter(reports.values()))
    heads = ["weights", "dense", *(f"{row.density.heads:g}/{row.density.neurons:g}" for row in base.rows)]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for weights, report in reports.items():
        pairs = [(report.dense, base.dense)]
        pairs += [(own.bits_per_byte, first.bits_per_byte) for own, first in zip(report.rows, base.rows, strict=True)]
        cells = [f"{own:.4f} ({own - first:+.4f})" for own, first in pairs]
        lines.append(f"| {' | '.join([weights, *cells])} |")
    note = (
        f"{model}, bits per byte, in brackets what is added to {next(iter(reports))}; heads/neurons kept under the "
        f"predictor's masks. {base.text_bytes:,} bytes (SHA-256 {base.text_sha256[:12]}), {base.tokens:,} tokens in "
        f"windows of {base.window}, protocol {base.protocol} after {base.prompt_tokens} dense. K/V are float16 for all "
        "weights but fp32."
    )
    return "\n".join([*lines, "", note]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
