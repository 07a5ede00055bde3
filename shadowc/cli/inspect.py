# SPDX-License-Identifier: Apache-2.0
"""`shadowc inspect`: what an engine folder holds, from its manifest alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from shadowc.cli import flags, render
from shadowc.cli.recall import layer_tables, summary_table

if TYPE_CHECKING:
    from shadowc.spec.manifest import EngineManifest

KV_SHARE = 0.5
"""Of a head's record, the k and v rows: read for every head while masks may change."""


def inspect(engine: flags.Engine, json: flags.AsJson = False) -> None:
    """Show the model, the sparsity plan, sizes, parity and the predictor's recall; nothing is loaded or changed."""
    manifest = read_manifest(engine)
    if json:
        render.as_json(manifest.model_dump(mode="json"))
        return
    render.facts(
        {
            **model_facts(manifest),
            **tensorrt_facts(manifest),
            **sparsity_facts(manifest),
            "parity": parity_text(manifest),
        },
        title=str(engine),
    )
    render.table(("bytes per token", "dense", "at the default density"), bytes_rows(manifest))
    report = recall_report(manifest)
    if manifest.sparsity and report:
        scope = manifest.sparsity.scope
        render.table(
            *summary_table(report, scope), title=f"found among the important units of held-out text, {scope} ranking"
        )
        for kind, table in layer_tables(report, scope).items():
            render.table(*table, title=f"recall per layer: {kind}, {scope} ranking")
    render.table(
        ("file", "size", "sha256"),
        [(name, render.size(entry.size), entry.sha256[:16]) for name, entry in sorted(manifest.files.items())],
    )
    render.facts(dict(sorted(manifest.producer.items())), title="made with")


def read_manifest(folder: Path) -> EngineManifest:
    """Read engine.json without loading anything else.

    Raises:
        InputError: the folder is missing or not an engine.
        IncompatibleEngineError: the manifest is of a newer schema or damaged.
    """
    from shadowc.runtime.load import read_manifest as read

    return read(folder)


def model_facts(manifest: EngineManifest) -> dict[str, str]:
    """Return the model and how it is stored."""
    model = manifest.model
    return {
        "model": f"{model.name}: {model.layers} layers, hidden {model.hidden}, {model.heads} heads, "
        f"{model.ffn} neurons, vocabulary {model.vocab:,}, context {model.positions}",
        "source": model.source,
        "target": f"{manifest.target}, {manifest.weights} weights",
    }


def tensorrt_facts(manifest: EngineManifest) -> dict[str, str]:
    """Return what a plan fixes: library, cards and profile; nothing for target cpu."""
    part = manifest.tensorrt
    if part is None:
        return {}
    from shadowc.runtime.tensorrt.bindings import TITLES

    cards = f"compute capability {', '.join(part.compute_capabilities)}"
    plans = [f"{name} {render.size(manifest.files[plan.file].size)}" for name, plan in sorted(part.plans.items())]
    return {
        "built with": f"{TITLES[part.family]} {part.library_version}, for {part.family} plugins",
        "runs on": cards + (f", and from {part.portable_above} on" if part.portable_above else ""),
        "holds": f"1 to {part.max_batch} rows, contexts of up to {part.max_context} tokens",
        "plans": f"{', '.join(plans)}; activations and cache are {part.activations}",
    }


def sparsity_facts(manifest: EngineManifest) -> dict[str, str]:
    """Return how masks are made."""
    plan = manifest.sparsity
    if plan is None:
        return {"sparsity": "none: a dense engine"}
    again = f", fresh every {plan.refresh} tokens" if plan.refresh else ""
    exempt = f", layers {', '.join(map(str, plan.exempt))} exempt" if plan.exempt else ""
    return {
        "sparsity": f"a mask per {plan.mask}{again}, ranked {plan.scope}ly, "
        f"blocks of {plan.neuron_block} neurons{exempt}",
        "density": f"{plan.head_density:g} of the heads, {plan.neuron_density:g} of the neurons, unless a run says so",
        "predictor": f"style {plan.style}, {predictor_text(plan.predictor)}, "
        f"{render.size(manifest.bytes_per_token.predictor)} read per token",
    }


def predictor_text(predictor: Mapping[str, object]) -> str:
    """Return where the predictor comes from, in one line."""
    parts = [str(predictor.get("origin", "not described"))]
    if "criterion" in predictor:
        parts.append(f"criterion {predictor['criterion']}")
    if "labels" in predictor:
        parts.append(f"labels {predictor['labels']}")
    widths = predictor.get("widths")
    if isinstance(widths, Mapping):
        parts.append(f"width {' and '.join(str(width) for width in dict.fromkeys(widths.values()))}")
    cost = predictor.get("parameters_share")
    if isinstance(cost, float):
        parts.append(f"{render.share(cost)} of the model's parameters")
    if "positions" in predictor:
        parts.append(f"{predictor['positions']} positions of text ({predictor.get('source', 'unknown')})")
    return ", ".join(parts)


def parity_text(manifest: EngineManifest) -> str:
    """Return the result of the compile's own check against torch."""
    parity = manifest.parity
    layers = parity.get("layers")
    if not isinstance(layers, list) or not layers:
        return "not recorded"
    prefix = "" if parity.get("on_device", True) else "not run on a device; the graphs on the CPU in float32: "
    return prefix + (
        f"{parity.get('positions', 0)} positions against torch: worst layer {max(layers):.1e} "
        f"(tolerance {parity.get('layer_tolerance', 0):.0e}), logits {parity.get('logits', 0):.1e} "
        f"(tolerance {parity.get('logits_tolerance', 0):.0e})"
    )


def bytes_rows(manifest: EngineManifest) -> list[tuple[str, str, str]]:
    """Return what one token reads, part by part, dense and at the engine's default density."""
    part, plan, model = manifest.bytes_per_token, manifest.sparsity, manifest.model
    records = attention, ffn = record_bytes(manifest)
    heads, neurons = (plan.head_density, plan.neuron_density) if plan else (1.0, 1.0)
    first = 1 / model.layers  # layer 0 stays dense
    reads = first + (1 - first) * heads  # of the cache: active heads attend
    held = plan is not None and plan.mask == "sequence"
    again = 1 / plan.refresh if plan and plan.refresh else 0.0  # how often a mask is made
    if not held or again:
        heads = KV_SHARE + (1 - KV_SHARE) * heads  # a later token may need the K/V of a head that this one skips
    predictor = part.predictor * again if held else part.predictor
    context = first * again if held else 0.0  # layer 0's attention is computed once more for a mask
    kept = (attention * (first + context + (1 - first) * heads), ffn * (first + (1 - first) * neurons))
    other = part.lm_head + part.other
    rows = [
        ("attention records", *map(render.size, (attention, kept[0]))),
        ("neuron records", *map(render.size, (ffn, kept[1]))),
        ("LM head", *[render.size(part.lm_head)] * 2),
        ("predictor", "-", render.size(predictor)),
        ("norms, biases, embedding rows", *[render.size(part.other)] * 2),
        ("all", render.size(sum(records) + other), render.size(sum(kept) + other + predictor)),
    ]
    if part.cache:
        rows.append(("K/V, of each token before", render.size(part.cache), render.size(part.cache * reads)))
    return [(name, dense, sparse) for name, dense, sparse in rows]


def record_bytes(manifest: EngineManifest) -> tuple[float, float]:
    """Return the bytes of all attention records and of all neuron records, split by their number of rows."""
    model = manifest.model
    attention, ffn = 4 * model.heads * model.head_size, 2 * model.ffn
    records = manifest.bytes_per_token.records
    return records * attention / (attention + ffn), records * ffn / (attention + ffn)


def recall_report(manifest: EngineManifest) -> Mapping[str, object] | None:
    """Return the training's report on its held-out positions; None for a dummy or a foreign predictor without one."""
    report = manifest.sparsity.predictor.get("report") if manifest.sparsity else None
    return report if isinstance(report, Mapping) and "found" in report else None
