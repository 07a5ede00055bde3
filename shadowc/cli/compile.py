# SPDX-License-Identifier: Apache-2.0
"""`shadowc compile`: a checkpoint becomes an engine folder."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shadowc.cli import flags, render

if TYPE_CHECKING:
    from shadowc.compiler import CompileSummary


COLLECTING = ("data", "criterion", "positions")
TRAINING = ("style", "labels", "neuron_block", "width")
LIMITS = ("max_batch", "max_context", "compute_capability")


def compile_model(
    context: typer.Context,
    model: flags.Model,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Engine folder; default: ./MODEL.engine.", show_default=False)
    ] = None,
    target: Annotated[str, typer.Option("--target", help="cpu, tensorrt-rtx or tensorrt.")] = "cpu",
    weights: Annotated[
        flags.Weights | None,
        typer.Option(
            "--weights",
            help="Type of the weights. cpu: fp32 (default), bf16, int8, int4; "
            "TensorRT: fp16 (default), bf16, fp32, int8.",
            show_default=False,
        ),
    ] = None,
    predictor: Annotated[
        str, typer.Option("--predictor", help="train, none (a dense engine), or the folder of a trained predictor.")
    ] = "train",
    head_density: Annotated[float, typer.Option("--head-density", help="Default share of heads kept.")] = 0.5,
    neuron_density: Annotated[float, typer.Option("--neuron-density", help="Default share of neurons kept.")] = 0.5,
    scope: Annotated[
        flags.Scope | None,
        typer.Option(
            "--scope",
            help="Rank within each layer, or over all; default: global, for styles dejavu and shadow+ local.",
            show_default=False,
        ),
    ] = None,
    select: Annotated[
        flags.Select,
        typer.Option(
            "--select",
            help="exact: rank the units of every token; calibrated: keep those that reach a threshold which met the "
            "density on the calibration text; sensitivity: the same, each layer with its own share.",
        ),
    ] = "exact",
    mask: Annotated[
        flags.Mask, typer.Option("--mask", help="A mask for every token, or one for all tokens after the prompt.")
    ] = "token",
    refresh: Annotated[
        int, typer.Option("--refresh", help="Tokens for which a mask of a sequence holds; 0: until the end.", min=0)
    ] = 0,
    skip_zeros: Annotated[
        bool, typer.Option("--skip-zeros/--no-skip-zeros", help="Skip fc2 where ReLU gave 0 (exact).")
    ] = True,
    data: flags.Data = "self",
    criterion: flags.Criterion = "plainact",
    positions: flags.Positions = 4096,
    style: flags.PredictorStyle = "shadow",
    labels: flags.PredictorLabels = None,
    neuron_block: flags.NeuronBlock = None,
    width: flags.Width = 0,
    max_batch: Annotated[int, typer.Option("--max-batch", help="TensorRT: most rows at once.", min=1)] = 4,
    max_context: Annotated[
        int, typer.Option("--max-context", help="TensorRT: most tokens; 0: the model's context.", min=0)
    ] = 0,
    compute_capability: Annotated[
        list[str] | None,
        typer.Option(
            "--compute-capability",
            help="TensorRT for RTX: GPUs to build for, such as 8.6; several times.",
            show_default=False,
        ),
    ] = None,
    load_format: flags.LoadFormatFlag = "auto",
    offline: flags.Offline = False,
    seed: flags.Seed = 0,
    dump_passes: Annotated[
        Path | None, typer.Option("--dump-passes", help="Write the graph after every pass here.", show_default=False)
    ] = None,
    json: flags.AsJson = False,
) -> None:
    """Compile a checkpoint into an engine folder; missing stages run first, finished ones are reused."""
    from shadowc.spec.density import Density
    from shadowc.spec.options import CollectOptions, CompileOptions, TrainOptions

    if target == "cpu":
        flags.refuse_unused(context, LIMITS, "with --target cpu: an engine takes any batch and the whole context")
    Density(head_density, neuron_density)  # refuses what is outside 0..1 before any work
    if predictor == "none":
        flags.refuse_unused(
            context,
            (*COLLECTING, *TRAINING, "head_density", "neuron_density", "scope", "select", "mask", "refresh"),
            "with --predictor none: a dense engine has no masks",
        )
    elif predictor != "train":
        flags.refuse_unused(context, (*COLLECTING, *TRAINING), "with --predictor FOLDER: that one is already trained")
    elif load_format == "dummy":
        untaught = (*COLLECTING, "labels")
        flags.refuse_unused(context, untaught, "with --load-format dummy: a dummy model has a random predictor")
        flags.refuse_unused(context, ("select",), "with --load-format dummy: a random predictor has no thresholds")
    options = flags.checked(
        CompileOptions,
        {
            "model": model,
            "out": out,
            "target": target,
            "weights": weights,
            "predictor": predictor,
            "head_density": head_density,
            "neuron_density": neuron_density,
            "scope": scope,
            "select": select,
            "mask": mask,
            "refresh": refresh,
            "skip_zeros": skip_zeros,
            "load_format": load_format,
            "offline": offline,
            "seed": seed,
            "collect": flags.checked(
                CollectOptions, {"criterion": criterion, "data": data, "positions": positions, "seed": seed}
            ),
            "train": flags.checked(
                TrainOptions,
                {"style": style, "labels": labels, "neuron_block": neuron_block, "width": width, "seed": seed},
            ),
            "dump_passes": dump_passes,
            "max_batch": max_batch,
            "max_context": max_context,
            "compute_capability": tuple(compute_capability or ()),
        },
    )
    from shadowc.compiler import compile_engine

    with render.progress() as progress:
        summary = compile_engine(options, progress)
    if json:
        render.as_json(_as_dict(summary))
    else:
        _show(summary)


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
