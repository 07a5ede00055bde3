# SPDX-License-Identifier: Apache-2.0
"""`python -m benchmarks.engines`, from the repository root: engines beside the masked torch model, on a text.

For every predictor and type of weights an engine is compiled where it is not there. On each window it and torch choose
units by themselves; counted is how many both choose, and by how many bits per byte the engine lies above torch. Ends
with status 1 if an engine's masks are not those of its predictor.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import shadowc
from shadowc.checkpoint.models import resolve_model
from shadowc.eval.engine_model import EngineModel
from shadowc.eval.texts import text_corpus
from shadowc.measure.mask_overlap import OverlapReport, OverlapRow, overlap
from shadowc.runtime.engine import Engine
from shadowc.runtime.load import load_cpu
from shadowc.sparsity.predictor import Predictor
from shadowc.sparsity.reference import MaskedModel, load_torch_model
from shadowc.spec.density import UNIT_KINDS, Density
from shadowc.spec.errors import ShadowcError, VerificationError

WEIGHTS = "fp32,int8"
DENSITIES = "1/0.5,0.75/0.14,0.5/0.5"
Found = dict[str, OverlapReport]
"""Name of a predictor's folder and weights -> report."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, compare, write CSV, JSON and the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=__doc__)
    parser.add_argument("--model", default="opt-mini", help="(%(default)s)")
    parser.add_argument("--predictor", type=Path, action="append", required=True, help="folder; may be repeated")
    parser.add_argument("--weights", default=WEIGHTS, help="by commas (%(default)s)")
    parser.add_argument("--densities", default=DENSITIES, help="HEADS/NEURONS kept, by commas (%(default)s)")
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text, or .jsonl; unseen by the predictors")
    parser.add_argument("--window", type=int, help="tokens per window; default: the context")
    parser.add_argument("--limit", type=int, help="first windows only")
    parser.add_argument("--out", type=Path, default=Path("build/engines"), help="engines, tables (%(default)s)")
    given = parser.parse_args(arguments)
    try:
        densities = [Density.parse(item) for item in given.densities.split(",")]
        found = measure(given, densities)
    except (ShadowcError, ValueError, TypeError) as error:
        parser.error(str(error))
    predictors = {folder.name: digest(folder) for folder in given.predictor}
    (given.out / "engines.json").write_text(as_json(found, predictors), "utf-8")
    (given.out / "engines.csv").write_text(as_csv(found, predictors), "utf-8")
    (given.out / "engines.md").write_text(markdown(found), "utf-8")
    sys.stdout.write((given.out / "engines.md").read_text("utf-8"))
    return _checked(found)


def measure(given: argparse.Namespace, densities: Sequence[Density]) -> Found:
    """Compare every engine with torch, which is loaded once."""
    checkpoint = resolve_model(given.model, load_format="auto", offline=False, seed=0)
    model = load_torch_model(checkpoint)
    found = {}
    for folder in given.predictor:
        predictor = Predictor.load(folder, checkpoint.facts)
        for weights in given.weights.split(","):
            name = f"{folder.name} {weights}"
            sys.stderr.write(f"{name}\n")
            out = given.out / f"{folder.name}-{weights}.engine"
            options = shadowc.CompileOptions(model=given.model, weights=weights, predictor=str(folder), out=out)
            shadowc.compile(options)
            engine = load_cpu(out, exact_prompts=True)
            found[name] = compared(engine, MaskedModel(model, predictor.plan(None), predictor), given, densities)
    return found


def compared(
    engine: Engine, masked: MaskedModel, given: argparse.Namespace, densities: Sequence[Density]
) -> OverlapReport:
    """Compare one engine with torch on the text."""
    corpus = text_corpus(EngineModel(engine), given.text, given.window, given.limit)
    return overlap(engine, masked, corpus, densities)


def digest(folder: Path) -> str:
    """SHA-256 of a predictor's tensors."""
    return hashlib.sha256((folder / "predictor.safetensors").read_bytes()).hexdigest()


def _checked(found: Found) -> int:
    """Say which engine's masks are not its predictor's; returns the exit status."""
    failed = 0
    for name, report in found.items():
        try:
            report.require()
        except VerificationError as error:
            failed = 1
            sys.stderr.write(f"{name}: {error}\n" + "".join(f"  {problem}\n" for problem in error.problems))
    return failed


def as_json(found: Found, predictors: dict[str, str]) -> str:
    """Everything, with the hashes of text, engines and predictors."""
    content = {"predictors": predictors, "engines": {name: asdict(report) for name, report in found.items()}}
    return json.dumps(content, indent=1) + "\n"


def as_csv(found: Found, predictors: dict[str, str]) -> str:
    """A line for every engine and density."""
    text = io.StringIO()
    writer: csv.DictWriter[str] | None = None
    for name, report in found.items():
        folder = name.rpartition(" ")[0]
        common = {"predictor": folder, "predictor_sha256": predictors[folder], "style": report.style}
        common |= {"weights": report.weights, "engine": report.engine, "text_sha256": report.text_sha256}
        for row in report.rows:
            line = {**common, **_line(row)}
            if writer is None:
                writer = csv.DictWriter(text, list(line), lineterminator="\n")
                writer.writeheader()
            writer.writerow(line)
    return text.getvalue()


def _line(row: OverlapRow) -> dict[str, float]:
    shares = {f"{kind}_{name}": value for kind in UNIT_KINDS for name, value in asdict(getattr(row, kind)).items()}
    return {
        "head_density": row.density.heads,
        "neuron_density": row.density.neurons,
        "masked_tokens": row.masked,
        **shares,
        "engine_bits_per_byte": row.engine,
        "torch_bits_per_byte": row.torch,
        **{f"above_torch_{end}": value for end, value in asdict(row.above).items()},
    }


COLUMNS = (
    "predictor", "weights", "heads / neurons kept", "heads: both of either", "neurons", "heads alike", "neurons",
    "tokens with equal masks", "engine, bits/byte", "torch", "engine - torch, 95 %",
)  # fmt: skip


def markdown(found: Found) -> str:
    """One line for every engine and density."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    for name, report in found.items():
        for row in report.rows:
            cells = (
                name.rpartition(" ")[0],
                report.weights,
                f"{row.density.heads:g} / {row.density.neurons:g}",
                *(f"{getattr(row, kind).shared:.2%}" for kind in UNIT_KINDS),
                *(f"{getattr(row, kind).alike:.2%}" for kind in UNIT_KINDS),
                f"{min(row.heads.tokens_alike, row.neurons.tokens_alike):.1%}",
                f"{row.engine:.4f}",
                f"{row.torch:.4f}",
                f"{row.above.value:+.5f} [{row.above.low:+.5f}, {row.above.high:+.5f}]",
            )
            lines.append(f"| {' | '.join(cells)} |")
    report = next(iter(found.values()))
    note = f"{report.tokens:,} tokens in windows of {report.window}, text {report.text_sha256[:12]}; protocol decode."
    return "\n".join([*lines, "", note]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
