# SPDX-License-Identifier: Apache-2.0
"""The rows that a sweep's folder keeps, so that its tables are of every command that was finished in it.

`rows.jsonl` has a line for every setting on every corpus: what tables and pictures show, and the sums of each document,
by which rows of different commands are paired. Of a corpus it has the facts, not the requests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowc.eval.metric import Interval, Metric
from shadowc.eval.request import Setting
from shadowc.eval.run import Row
from shadowc.eval.store import DAMAGE
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError

if TYPE_CHECKING:
    from shadowc.eval.corpus import Described


@dataclass(frozen=True, slots=True)
class KeptCorpus:
    """What is kept of a corpus; see `Described`."""

    name: str
    sha256: str
    key: str
    facts: Mapping[str, str | int]


def read(path: Path) -> list[Row]:
    """Read what `write` left; folders of before there was such a file have no rows.

    Raises:
        InputError: a line is damaged.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            rows.append(_row(json.loads(line)))
        except (*DAMAGE, InputError) as error:
            raise InputError(
                f"{path}, line {number} is damaged: {error}",
                hint=f"rm '{path}'; commands that are typed again bring their rows back, nothing is computed twice",
            ) from None
    return rows


def write(path: Path, rows: Sequence[Row]) -> None:
    """Put rows in place of those that were there."""
    lines = [json.dumps(asdict(replace(row, corpus=_kept(row.corpus)))) + "\n" for row in rows]
    part = path.with_name(f"{path.name}.part")
    part.write_text("".join(lines), "utf-8")
    part.replace(path)


def joined(kept: Sequence[Row], found: Sequence[Row]) -> list[Row]:
    """Return all rows, corpus by corpus; what was found takes the place of what was kept of the same."""
    by_place = {(*_identity(row.corpus), row.setting): row for row in (*kept, *found)}
    corpora = {_identity(row.corpus): row.corpus for row in by_place.values()}
    return [
        replace(row, corpus=corpus)
        for identity, corpus in corpora.items()
        for row in by_place.values()
        if _identity(row.corpus) == identity
    ]


def _identity(corpus: Described) -> tuple[str, str]:
    """Equal for equal requests from equal files: bytes and words of a document are the file's."""
    return corpus.key, corpus.sha256


def _kept(corpus: Described) -> KeptCorpus:
    return KeptCorpus(corpus.name, corpus.sha256, corpus.key, dict(corpus.facts))


def _row(kept: dict[str, Any]) -> Row:
    setting = kept["setting"]
    metrics = tuple(
        Metric(one["name"], one["kind"], tuple(one["numerator"]), tuple(one["denominator"])) for one in kept["metrics"]
    )
    return Row(
        **{
            **kept,
            "corpus": KeptCorpus(**kept["corpus"]),
            "setting": Setting(**{**setting, "density": Density(**setting["density"])}),
            "metrics": metrics,
            **{name: tuple(Interval(**one) for one in kept[name]) for name in ("intervals", "above_dense")},
        }
    )
