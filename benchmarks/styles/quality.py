# SPDX-License-Identifier: Apache-2.0
"""Both styles on a model that says something: bits per byte on held-out text, and recall, beside their controls.

In: a model, widths, a text. Out: a JSON file with one entry per predictor, written as each is done, so that a run which
was stopped goes on behind the last one. All are ranked within layers, where both styles can be, and once more style
shadow over all layers, which only it can be.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import shadowc
from benchmarks.styles.contestants import BLOCK, Contestant
from shadowc.measure.evaluate import METHODS, evaluate
from shadowc.runtime.load import read_manifest
from shadowc.spec.density import UNIT_KINDS, Density
from shadowc.spec.options import CollectOptions, Labels, Scope, TrainOptions


@dataclass(frozen=True, slots=True)
class Taught:
    """A contestant, what it learned and how it ranks."""

    contestant: Contestant
    labels: Labels
    criterion: str = "plainact"
    scope: Scope = "local"

    @property
    def name(self) -> str:
        """Of its engine, and in the file."""
        return "-".join([self.contestant.name, self.labels, self.criterion, self.scope])


def line_up(found: Sequence[Contestant]) -> Iterator[Taught]:
    """Every contestant with both kinds of labels; shadow over all layers; dejavu with the labels of its publication."""
    yield Taught(found[0], "scores", scope="global")
    for contestant in found:
        for labels in ("scores", "top"):
            yield Taught(contestant, labels)
    yield Taught(found[-1], "top", "activation")


def options_of(taught: Taught, model: str, out: Path) -> shadowc.CompileOptions:
    """How the engine of a predictor is compiled, in fp32."""
    contestant = taught.contestant
    train = TrainOptions(style=contestant.style, labels=taught.labels, width=contestant.width, neuron_block=BLOCK)
    collect = CollectOptions(criterion=taught.criterion, fill="zero")  # as published
    return shadowc.CompileOptions(model=model, out=out, scope=taught.scope, train=train, collect=collect)


def measure(
    model: str,
    found: Sequence[Contestant],
    text: str,
    densities: Sequence[str],
    out: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Compile, evaluate and keep what is not there yet.

    Args:
        model: name or path.
        found: style shadow first.
        text: evaluated; none of it may have calibrated.
        densities: HEADS/NEURONS kept.
        out: folder of the engines and of quality.json.
        say: told what is done next.

    Raises:
        ShadowcError: an engine cannot be made, or the text calibrated it.
        ValueError: the file is of another model, text or densities.
    """
    asked = {"model": model, "text": hashlib.sha256(text.encode()).hexdigest(), "densities": list(densities)}
    path = out / "quality.json"
    content: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {"asked": asked, "rows": {}}
    if content["asked"] != asked:
        raise ValueError(f"{path} was made with {content['asked']}, asked is {asked}: name another --out")
    for taught in line_up(found):
        if taught.name in content["rows"]:
            continue
        say(f"{model}: {taught.name}")
        folder = shadowc.compile(options_of(taught, model, out / f"{taught.name}.engine"))
        first = taught.name.startswith("shadow") and taught.labels == "scores"  # controls do not ask the predictor
        methods = METHODS if first else METHODS[:1]
        shares = [Density.parse(item) for item in densities]
        report = evaluate(shadowc.load(folder), text, densities=shares, methods=methods)
        content["rows"][taught.name] = _entry(taught, folder, asdict(report))
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        unfinished.replace(path)
    return content


def _entry(taught: Taught, folder: Path, report: dict[str, Any]) -> dict[str, Any]:
    manifest = read_manifest(folder)
    part = manifest.bytes_per_token
    learned: Any = manifest.sparsity.predictor if manifest.sparsity else {}
    return {
        **asdict(taught),
        "predictor_bytes": part.predictor,
        "dense_bytes": part.records + part.lm_head + part.other,
        "report": report,
        "recall": {kind: learned["report"]["found"][kind][taught.scope] for kind in UNIT_KINDS},
        "error": learned["report"]["error"],
        "epoch": learned["report"]["epoch"],
    }
