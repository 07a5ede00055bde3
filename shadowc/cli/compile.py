# SPDX-License-Identifier: Apache-2.0
"""`shadowc compile`: a checkpoint becomes an engine folder."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from shadowc.cli import compile_flags, flags, render

if TYPE_CHECKING:
    from shadowc.compiler import CompileSummary


COLLECTING = ("data", "criterion", "positions")
TRAINING = ("style", "labels", "neuron_block", "width", "fill")
SELECTING = (
    "head_density", "neuron_density", "scope", "select", "exempt", "min_active_heads", "min_active_neurons", "mask",
    "refresh",
)  # fmt: skip
LIMITS = ("max_batch", "max_context", "compute_capability")


def compile_model(
    context: typer.Context,
    model: flags.Model,
    out: compile_flags.Out = None,
    target: compile_flags.Target = "cpu",
    weights: compile_flags.Weights = None,
    predictor: compile_flags.Predictor = "train",
    head_density: compile_flags.HeadDensity = 0.5,
    neuron_density: compile_flags.NeuronDensity = 0.5,
    scope: compile_flags.Scope = None,
    select: compile_flags.Select = "exact",
    exempt: flags.Exempt = None,
    min_active_heads: flags.MinActiveHeads = 0,
    min_active_neurons: flags.MinActiveNeurons = 0,
    mask: compile_flags.Mask = "token",
    refresh: compile_flags.Refresh = 0,
    skip_zeros: compile_flags.SkipZeros = True,
    exact_prompts: compile_flags.ExactPrompts = False,
    data: flags.Data = "self",
    criterion: flags.Criterion = "plainact",
    positions: flags.Positions = 4096,
    fill: flags.HeadFill = "zero",
    style: flags.PredictorStyle = "shadow",
    labels: flags.PredictorLabels = None,
    neuron_block: flags.NeuronBlock = None,
    width: flags.Width = 0,
    max_batch: compile_flags.MaxBatch = 4,
    max_context: compile_flags.MaxContext = 0,
    compute_capability: compile_flags.ComputeCapability = None,
    load_format: flags.LoadFormatFlag = "auto",
    offline: flags.Offline = False,
    seed: flags.Seed = 0,
    dump_passes: compile_flags.DumpPasses = None,
    json: flags.AsJson = False,
) -> None:
    """Compile a checkpoint into an engine folder; missing stages run first, finished ones are reused."""
    if target == "cpu":
        flags.refuse_unused(context, LIMITS, "with --target cpu: an engine takes any batch and the whole context")
    _refuse_densities(head_density, neuron_density)
    _refuse_unused(context, predictor, load_format)
    summary = _compiled(
        collect={"criterion": criterion, "data": data, "positions": positions, "fill": fill, "seed": seed},
        train={"style": style, "labels": labels, "neuron_block": neuron_block, "width": width, "seed": seed},
        rest={
            "model": model, "out": out, "target": target, "weights": weights, "predictor": predictor,
            "head_density": head_density, "neuron_density": neuron_density, "scope": scope, "select": select,
            "mask": mask, "refresh": refresh, "skip_zeros": skip_zeros, "exact_prompts": exact_prompts,
            "load_format": load_format, "offline": offline, "seed": seed, "dump_passes": dump_passes,
            "max_batch": max_batch, "max_context": max_context, "compute_capability": tuple(compute_capability or ()),
            "exempt": flags.layers_of(exempt), "min_active_heads": min_active_heads,
            "min_active_neurons": min_active_neurons,
        },
    )  # fmt: skip
    if json:
        render.as_json(_as_dict(summary))
    else:
        _show(summary)


def _refuse_densities(heads: float, neurons: float) -> None:
    """Refuse what is outside 0..1 before any work."""
    from shadowc.spec.density import Density

    Density(heads, neurons)


def _refuse_unused(context: typer.Context, predictor: str, load_format: str) -> None:
    """Refuse flags that were given and have no effect with this predictor."""
    if predictor == "none":
        flags.refuse_unused(
            context,
            (*COLLECTING, *TRAINING, *SELECTING),
            "with --predictor none: a dense engine has no masks",
        )
    elif predictor != "train":
        flags.refuse_unused(context, (*COLLECTING, *TRAINING), "with --predictor FOLDER: that one is already trained")
    elif load_format == "dummy":
        untaught = (*COLLECTING, "labels")
        flags.refuse_unused(context, untaught, "with --load-format dummy: a dummy model has a random predictor")
        flags.refuse_unused(context, ("select",), "with --load-format dummy: a random predictor has no thresholds")


def _compiled(*, collect: dict[str, object], train: dict[str, object], rest: dict[str, object]) -> CompileSummary:
    from shadowc.spec.options import CollectOptions, CompileOptions, TrainOptions

    parts = {
        "collect": flags.checked(CollectOptions, collect, "compile"),
        "train": flags.checked(TrainOptions, train, "compile"),
    }
    options = flags.checked(CompileOptions, {**rest, **parts}, "compile")
    from shadowc.compiler import compile_engine

    with render.progress() as progress:
        return compile_engine(options, progress)


def _as_dict(summary: CompileSummary) -> dict[str, object]:
    return {
        "folder": str(summary.folder),
        "up_to_date": summary.up_to_date,
        "left_out": list(summary.left_out),
        "stages": [asdict(stage) for stage in summary.stages],
        "plans": {name: asdict(result) for name, result in summary.build.items()},
        "manifest": summary.manifest.model_dump(mode="json"),
    }


def _effective(summary: CompileSummary) -> dict[str, str]:
    """What a short generation at the default density really computed and read."""
    sample, part = summary.sample, summary.manifest.bytes_per_token
    if sample is None or summary.manifest.sparsity is None:
        return {}
    dense = part.records + part.lm_head + part.other
    return {
        "computed": f"{render.share(sample.active_head_share)} of the heads and "
        f"{render.share(sample.active_neuron_share)} of the neurons of the predicted layers; "
        f"{render.size(sample.bytes_read)} of {render.size(dense)} read per token"
    }


def _left_out(summary: CompileSummary) -> dict[str, str]:
    """What the checkpoint holds beside the language model."""
    count = len(summary.left_out)
    if not count:
        return {}
    more = f" and {count - 1} more" if count > 1 else ""
    return {"left out": f"{summary.left_out[0]}{more}, not part of the language model"}


def _show(summary: CompileSummary) -> None:
    from shadowc.cli.inspect import model_facts, parity_text, sparsity_facts

    if summary.up_to_date:
        render.line(f"{summary.folder} is up to date")
        return
    manifest = summary.manifest
    total = sum(entry.size for entry in manifest.files.values())
    render.facts(
        {
            **model_facts(manifest),
            **sparsity_facts(manifest),
            "parity": parity_text(manifest),
            **_effective(summary),
            **_left_out(summary),
            "folder": f"{summary.folder}, {render.size(total)}",
        }
    )
    if summary.build:
        plans = [
            (name, render.size(result.bytes), render.seconds(result.seconds), render.size(result.peak_bytes))
            for name, result in summary.build.items()
        ]
        render.table(("plan", "size", "time", "peak memory"), plans)
    if summary.stages:
        rows = [
            (
                stage.name + (" (reused)" if stage.reused else ""),
                render.seconds(stage.seconds),
                render.size(stage.peak_bytes),
            )
            for stage in summary.stages
        ]
        rows.append(
            (
                "total",
                render.seconds(sum(stage.seconds for stage in summary.stages)),
                render.size(max(stage.peak_bytes for stage in summary.stages)),
            )
        )
        render.table(("stage", "time", "peak memory"), rows)
    render.line(f'next: shadowc run {summary.folder} "Once upon a time"')
