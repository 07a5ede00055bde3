# SPDX-License-Identifier: Apache-2.0
"""An evaluation as data: one JSON document, one tidy table (a line per figure), and a table in Markdown."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from shadowc.eval.metric import DRAWS, PERCENT
from shadowc.eval.request import PROTOCOLS

if TYPE_CHECKING:
    from shadowc.eval.corpus import Described
    from shadowc.eval.means import Mean
    from shadowc.eval.metric import Interval
    from shadowc.eval.request import Setting
    from shadowc.eval.run import Comparison, Evaluation, Row

Value = str | int | float | None
SHORT = {"bits_per_byte": "bits/byte", "token_perplexity": "token ppl", "word_perplexity": "word ppl"}


def as_data(evaluation: Evaluation) -> dict[str, object]:
    """Return everything, figures with their intervals, by corpus."""
    model = evaluation.model
    used = dict.fromkeys(row.setting.protocol for row in evaluation.rows)
    return {
        "model": model.name,
        "identity": model.identity,
        "seed": evaluation.seed,
        "bootstrap": {"draws": DRAWS, "percent": PERCENT, "paired": True},
        "protocols": {name: PROTOCOLS[name] for name in used},
        "dense_layer_bytes": model.ledger.dense,
        "predictor_bytes": model.ledger.predictor,
        "corpora": [
            {
                **corpus.facts,
                "rows": [_row(row) for row in evaluation.rows if row.corpus is corpus],
                "comparisons": [_comparison(one) for one in evaluation.comparisons if one.corpus is corpus],
            }
            for corpus in corpora(evaluation)
        ],
        "means": [_mean(one) for one in evaluation.means],
    }


def corpora(evaluation: Evaluation) -> tuple[Described, ...]:
    """Those of the rows, in their order."""
    return tuple({id(row.corpus): row.corpus for row in evaluation.rows}.values())


def tidy(evaluation: Evaluation) -> Iterator[dict[str, Value]]:
    """Yield a line for every figure of every row, all with the same columns."""
    for row in evaluation.rows:
        common: dict[str, Value] = {
            "model": evaluation.model.name,
            "identity": evaluation.model.identity,
            "corpus": row.corpus.name,
            "sha256": row.corpus.sha256,
            "seed": evaluation.seed,
            **_settings(row),
            **_costs(row),
        }
        for metric, found, above in zip(row.metrics, row.intervals, row.above_dense, strict=True):
            yield {
                **common,
                "metric": metric.name,
                **_interval(found),
                "standard_error": _number(metric.standard_error),
                **{f"above_dense_{name}": value for name, value in _interval(above).items()},
            }


def as_csv(evaluation: Evaluation) -> str:
    """Return the tidy table; empty cells are unknown."""
    lines = list(tidy(evaluation))
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def as_json(evaluation: Evaluation) -> str:
    """Return `as_data` as text."""
    return json.dumps(as_data(evaluation), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def columns(corpus: Described, rows: Sequence[Row]) -> tuple[str, ...]:
    """Names of the cells that `cells` gives."""
    names = [SHORT.get(metric.name, metric.name) for metric in rows[0].metrics[:2]]
    first = f"{PERCENT} %" if corpus.facts["kind"] != "task" else "± error"
    return (
        "masks", "heads", "neurons", "protocol", "scope", names[0], first, "over dense", *names[1:],
        "active heads", "active neurons", "not read", "under masks",
    )  # fmt: skip


def _masks(setting: Setting) -> tuple[str, ...]:
    """Whose masks, how dense, by which protocol and ranked over what; of a dense row its name alone."""
    if setting.dense:
        return (setting.method, "", "", "", "")
    return setting.method, f"{setting.density.heads:g}", f"{setting.density.neurons:g}", way(setting), setting.scope


def way(setting: Setting) -> str:
    """The protocol, with the dense tokens at the start where a number of them was asked for."""
    dense = "" if setting.prompt_tokens is None else f", {setting.prompt_tokens} dense"
    return setting.protocol + dense


def cells(row: Row) -> tuple[str, ...]:
    """One row for people: figures with their interval, then what they cost."""
    setting, dense = row.setting, row.setting.dense
    main = row.metrics[0]
    spread = f"± {main.standard_error:.4f}" if main.kind == "share" else span(row.intervals[0])
    return (
        *_masks(setting),
        _figure(main.value),
        spread,
        "" if dense else f"{row.above_dense[0].value:+.4f}",
        *(_figure(metric.value) for metric in row.metrics[1:2]),
        _share(row.active_heads),
        _share(row.active_neurons),
        _share(row.sparsity),
        _share(row.masked_share),
    )


def compared(one: Comparison) -> tuple[str, ...]:
    """One comparison for people."""
    found = one.difference
    known = math.isfinite(found.low)
    setting = one.one
    return (
        f"{setting.method} - {one.other.method}",
        f"{setting.density.heads:g}",
        f"{setting.density.neurons:g}",
        way(setting),
        setting.scope,
        f"{found.value:+.4f}",
        span(found),
        ("yes" if found.excludes_zero else "no") if known else "",
    )


COMPARED = ("difference", "heads", "neurons", "protocol", "scope", "of the first figure", f"{PERCENT} %", "excludes 0")


MEANS = (
    "masks",
    "heads",
    "neurons",
    "protocol",
    "scope",
    "mean",
    "± error",
    "over dense",
    f"{PERCENT} %",
    "under masks",
)


def mean_cells(one: Mean) -> tuple[str, ...]:
    """A mean over tasks for people."""
    setting, dense = one.setting, one.setting.dense
    return (
        *_masks(setting),
        _figure(one.value),
        f"± {one.standard_error:.4f}",
        "" if dense else f"{one.above_dense.value:+.4f}",
        "" if dense else span(one.above_dense),
        _share(one.masked_share),
    )


def span(found: Interval) -> str:
    """Both ends of an interval; empty where one document was all there was."""
    return f"{_figure(found.low)} to {_figure(found.high)}" if math.isfinite(found.low) else ""


def as_markdown(evaluation: Evaluation) -> str:
    """Return a heading, the facts and the tables of every corpus."""
    data = as_data(evaluation)
    lines = [f"# {data['model']}", "", f"Identity `{data['identity']}`, bootstrap seed {evaluation.seed}.", ""]
    used = dict.fromkeys(row.setting.protocol for row in evaluation.rows)
    lines += [f"- `{name}`: {PROTOCOLS[name]}" for name in used]
    for corpus in corpora(evaluation):
        rows = [row for row in evaluation.rows if row.corpus is corpus]
        facts = ", ".join(f"{name} {value}" for name, value in corpus.facts.items() if name not in ("name", "sha256"))
        lines += ["", f"## {corpus.name}", "", f"{facts}; sha256 `{corpus.sha256[:16]}`", ""]
        lines += _markdown(columns(corpus, rows), [cells(row) for row in rows])
        against = [compared(one) for one in evaluation.comparisons if one.corpus is corpus]
        if against:
            lines += ["", *_markdown(COMPARED, against)]
    for tasks, name in dict.fromkeys((one.tasks, one.name) for one in evaluation.means):
        lines += ["", f"## {name}", "", ", ".join(tasks), ""]
        same = [one for one in evaluation.means if (one.tasks, one.name) == (tasks, name)]
        lines += _markdown(MEANS, [mean_cells(one) for one in same])
    return "\n".join(lines) + "\n"


def _markdown(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (names, ["---"] * len(names), *rows)]


def _settings(row: Row | Mean) -> dict[str, Value]:
    setting = row.setting
    return {
        "method": setting.method,
        "head_density": setting.density.heads,
        "neuron_density": setting.density.neurons,
        "protocol": "" if setting.dense else setting.protocol,
        "scope": setting.scope,
        "prompt_tokens": setting.prompt_tokens,
    }


def _costs(row: Row) -> dict[str, Value]:
    return {
        "active_heads": row.active_heads,
        "active_neurons": row.active_neurons,
        "masked_share": row.masked_share,
        "effective_sparsity": row.sparsity,
        "layer_bytes_read": row.bytes_read,
    }


def _row(row: Row) -> dict[str, object]:
    figures = {
        metric.name: {
            **_interval(found),
            "standard_error": _number(metric.standard_error),
            "above_dense": _interval(above),
        }
        for metric, found, above in zip(row.metrics, row.intervals, row.above_dense, strict=True)
    }
    return {**_settings(row), **_costs(row), "metrics": figures}


def _mean(one: Mean) -> dict[str, object]:
    return {
        "name": one.name,
        "tasks": list(one.tasks),
        "shots": one.shots,
        **_settings(one),
        "masked_share": one.masked_share,
        "value": one.value,
        "standard_error": _number(one.standard_error),
        "above_dense": _interval(one.above_dense),
    }


def _comparison(one: Comparison) -> dict[str, object]:
    setting = one.one
    return {
        "methods": [setting.method, one.other.method],
        "head_density": setting.density.heads,
        "neuron_density": setting.density.neurons,
        "protocol": setting.protocol,
        "scope": setting.scope,
        "prompt_tokens": setting.prompt_tokens,
        "metric": one.metric,
        **_interval(one.difference),
    }


def _interval(found: Interval) -> Mapping[str, Value]:
    return {"value": _number(found.value), "low": _number(found.low), "high": _number(found.high)}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _figure(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"
