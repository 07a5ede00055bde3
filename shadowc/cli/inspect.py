# SPDX-License-Identifier: Apache-2.0
"""`shadowc inspect`: what an engine folder holds, from its manifest and the list of tensors in its graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shadowc.cli import drawings, flags, render
from shadowc.cli.recall import layer_tables, met_text, summary_table
from shadowc.measure.expected import expected_bytes
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError

if TYPE_CHECKING:
    from shadowc.spec.manifest import EngineManifest, SparsityPart

DENSITIES = "1,0.5,0.2,0.1,0.5/0.2"


def inspect(
    context: typer.Context,
    engine: flags.Engine,
    densities: Annotated[
        str, typer.Option("--densities", help="Expected bytes per token are told for these, heads/neurons.")
    ] = DENSITIES,
    graph: Annotated[
        Path | None,
        typer.Option("--graph", help="Draw the sparse graph, layer by layer, into this SVG.", show_default=False),
    ] = None,
    density: flags.BothDensities = None,
    head_density: flags.HeadDensity = None,
    neuron_density: flags.NeuronDensity = None,
    json: flags.AsJson = False,
) -> None:
    """Show model, sparsity plan, passes, sizes, expected bytes, parity and recall; nothing is run or changed."""
    from shadowc.measure.expected import part_sizes

    if graph is not None:
        drawings.require_place(graph)
    manifest = read_manifest(engine)
    if manifest.sparsity is None:
        flags.refuse_unused(context, ["densities"], "on an engine without a predictor: it is dense")
    listed, parts = flags.densities_of(densities), part_sizes(engine, manifest)
    drawn = flags.density_of(density, head_density, neuron_density, manifest.sparsity)
    if graph is not None:
        _draw(manifest, graph, drawn)
    elif drawn is not None:
        raise InputError(
            "--density says what --graph draws, and there is no --graph", hint="--densities for the table of bytes"
        )
    if json:
        render.as_json(
            {
                **manifest.model_dump(mode="json"),
                "stored_bytes": parts,
                "expected_bytes": [_expected_json(manifest, one) for one in _with_own(manifest, listed)],
            }
        )
        return
    _show_model(manifest, str(engine), parts)
    _show_bytes(manifest, listed)
    _show_passes(manifest)
    _show_recall(manifest)
    _show_files(manifest)


def _show_model(manifest: EngineManifest, title: str, parts: Mapping[str, int]) -> None:
    """The model, how it was compiled, and what its parts take on the disk."""
    render.facts(
        {
            **model_facts(manifest),
            **tensorrt_facts(manifest),
            **sparsity_facts(manifest),
            "parity": parity_text(manifest),
        },
        title=title,
    )
    if parts:
        rows = [(part, render.size(size), render.share(size / sum(parts.values()))) for part, size in parts.items()]
        render.table(("stored", "size", "share"), [*rows, ("all", render.size(sum(parts.values())), "")])


def _show_bytes(manifest: EngineManifest, listed: tuple[Density, ...]) -> None:
    """What a token reads: part by part, and at the densities asked for."""
    render.table(("bytes per token", "dense", "at the default density"), bytes_rows(manifest))
    if manifest.sparsity:
        columns = ("expected per token at", "attention", "neurons", "predictor", "all", "of dense")
        render.table(columns, [_expected_row(manifest, one) for one in listed])


def _show_recall(manifest: EngineManifest) -> None:
    """What the training found on held-out text, if the predictor has a report."""
    report = recall_report(manifest)
    if manifest.sparsity and report:
        scope = manifest.sparsity.scope
        render.table(
            *summary_table(report, scope), title=f"found among the important units of held-out text, {scope} ranking"
        )
        for kind, table in layer_tables(report, scope).items():
            render.table(*table, title=f"recall per layer: {kind}, {scope} ranking")


def _show_files(manifest: EngineManifest) -> None:
    """Every file with its hash, and the versions of what made them."""
    render.table(
        ("file", "size", "sha256"),
        [(name, render.size(entry.size), entry.sha256[:16]) for name, entry in sorted(manifest.files.items())],
    )
    render.facts(dict(sorted(manifest.producer.items())), title="made with")


def _draw(manifest: EngineManifest, path: Path, density: Density | None) -> None:
    """Write the picture, and say where.

    Raises:
        InputError: the file cannot be written.
    """
    from shadowc.cli.graph_svg import svg

    own = manifest.sparsity
    default = Density(own.head_density, own.neuron_density) if own else Density()
    drawings.write(path, svg(manifest, density or default).encode())
    render.say(f"graph drawn to {path}")


def _with_own(manifest: EngineManifest, listed: tuple[Density, ...]) -> tuple[Density, ...]:
    """The engine's own density in front of those asked for."""
    own = manifest.sparsity
    return tuple(dict.fromkeys((Density(own.head_density, own.neuron_density), *listed))) if own else ()


def _expected_json(manifest: EngineManifest, density: Density) -> dict[str, object]:
    expected = expected_bytes(manifest, density)
    return {"density": asdict(density), **asdict(expected), "total": expected.total}


def _expected_row(manifest: EngineManifest, density: Density) -> tuple[str, ...]:
    expected, dense = expected_bytes(manifest, density), expected_bytes(manifest)
    sizes = (expected.attention, expected.neurons, expected.predictor, expected.total)
    name = f"{density.heads:g} heads, {density.neurons:g} neurons"
    return (name, *map(render.size, sizes), render.share(expected.total / dense.total))


def _show_passes(manifest: EngineManifest) -> None:
    """What each pass did to each graph; refusals are told in full."""
    graphs = list(manifest.passes)
    names = list(dict.fromkeys(step.name for steps in manifest.passes.values() for step in steps))
    if not names:
        return
    told = {(graph, step.name): step for graph, steps in manifest.passes.items() for step in steps}

    def counts(graph: str, name: str) -> str:
        step = told.get((graph, name))
        return "-" if step is None else ", ".join(f"{count} {what}" for what, count in step.counts.items()) or "done"

    render.table(("pass", *graphs), [(name, *(counts(graph, name) for graph in graphs)) for name in names])
    for (graph, name), step in told.items():
        for refusal in step.refusals:
            render.line(f"  {graph}, {name}: {refusal}")


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
        **({"prompts": "computed as exactly as tokens"} if manifest.exact_prompts else {}),
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
    exempt = f", dense layers 0, {', '.join(str(layer + 1) for layer in plan.exempt)}" if plan.exempt else ""
    least = f"{plan.min_active_heads} heads, {plan.min_active_neurons} blocks of neurons"
    floor = {"kept at least": f"{least} in a layer"} if plan.min_active_heads or plan.min_active_neurons else {}
    return {
        "sparsity": f"a mask per {plan.mask}{again}, {selection_text(plan)}, "
        f"blocks of {plan.neuron_block} neurons{exempt}",
        "skipped heads": "leave their mean, which is part of the biases" if plan.fill == "mean" else "leave zero",
        "density": f"{plan.head_density:g} of the heads, {plan.neuron_density:g} of the neurons, unless a run says so",
        **floor,
        **_density_met(plan),
        "predictor": f"style {plan.style}, {predictor_text(plan.predictor)}, "
        f"{render.size(manifest.bytes_per_token.predictor)} read per {'mask' if plan.mask == 'sequence' else 'token'}",
    }


def selection_text(plan: SparsityPart) -> str:
    """Return how masks come from scores."""
    if plan.select == "exact":
        return f"ranked {plan.scope}ly"
    each = "one for all layers" if plan.scope == "global" else "one for each layer"
    return f"calibrated thresholds, {each}{' by its sensitivity' if plan.select == 'sensitivity' else ''}"


def _density_met(plan: SparsityPart) -> dict[str, str]:
    """Return what held-out text met under calibrated thresholds, beside what was asked for."""
    report = plan.predictor.get("report")
    met = report.get("met") if isinstance(report, Mapping) else None
    if plan.select == "exact" or not isinstance(met, Mapping):
        return {}
    budget = "sensitivity" if plan.select == "sensitivity" else plan.scope
    return {"density met": met_text(met, budget)}


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
    single = [parity.get(name, 0) for name in ("positions", "layer_tolerance", "logits", "logits_tolerance")]
    if not isinstance(layers, list) or not layers or not all(isinstance(n, (int, float)) for n in layers + single):
        return "not recorded"
    prefix = "" if parity.get("on_device", True) else "not run on a device; the graphs on the CPU in float32: "
    positions, layer_tolerance, logits, logits_tolerance = single
    return prefix + (
        f"{positions} positions against torch: worst layer {max(layers):.1e} "
        f"(tolerance {layer_tolerance:.0e}), logits {logits:.1e} (tolerance {logits_tolerance:.0e})"
    )


def bytes_rows(manifest: EngineManifest) -> list[tuple[str, str, str]]:
    """Return what one token reads, part by part, dense and at the engine's default density."""
    plan = manifest.sparsity
    default = Density(plan.head_density, plan.neuron_density) if plan else None
    dense, kept = expected_bytes(manifest), expected_bytes(manifest, default)
    rows = [
        ("attention records", dense.attention, kept.attention),
        ("neuron records", dense.neurons, kept.neurons),
        ("LM head", dense.lm_head, kept.lm_head),
        ("predictor", None, kept.predictor),
        ("norms, biases, embedding rows", dense.other, kept.other),
        ("all", dense.total, kept.total),
    ]
    if dense.cache:
        rows.append(("K/V, of each token before", dense.cache, kept.cache))
    return [(name, "-" if one is None else render.size(one), render.size(other)) for name, one, other in rows]


def recall_report(manifest: EngineManifest) -> Mapping[str, object] | None:
    """Return the training's report on its held-out positions; None for a dummy or a foreign predictor without one."""
    report = manifest.sparsity.predictor.get("report") if manifest.sparsity else None
    return report if isinstance(report, Mapping) and "found" in report else None
