# SPDX-License-Identifier: Apache-2.0
"""Flags that `shadowc compile` alone has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shadowc.cli import flags

Out = Annotated[
    Path | None, typer.Option("--out", "-o", help="Engine folder; default: ./MODEL.engine.", show_default=False)
]
Target = Annotated[str, typer.Option("--target", help="cpu, tensorrt-rtx or tensorrt.")]
Weights = Annotated[
    flags.Weights | None,
    typer.Option(
        "--weights",
        help="Type of the weights. cpu: fp32 (default), bf16, int8, int4; TensorRT: fp16 (default), bf16, fp32, int8.",
        show_default=False,
    ),
]
Predictor = Annotated[
    str, typer.Option("--predictor", help="train, none (a dense engine), or the folder of a trained predictor.")
]
HeadDensity = Annotated[float, typer.Option("--head-density", help="Default share of heads kept.")]
NeuronDensity = Annotated[float, typer.Option("--neuron-density", help="Default share of neurons kept.")]
Scope = Annotated[
    flags.Scope | None,
    typer.Option(
        "--scope",
        help="Rank within each layer, or over all; default: global, for styles dejavu and shadow+ local.",
        show_default=False,
    ),
]
Select = Annotated[
    flags.Select,
    typer.Option(
        "--select",
        help="exact: rank the units of every token; calibrated: keep those that reach a threshold which met the "
        "density on the calibration text; sensitivity: the same, each layer with its own share.",
    ),
]
Mask = Annotated[
    flags.Mask, typer.Option("--mask", help="A mask for every token, or one for all tokens after the prompt.")
]
Refresh = Annotated[
    int, typer.Option("--refresh", help="Tokens for which a mask of a sequence holds; 0: until the end.", min=0)
]
SkipZeros = Annotated[bool, typer.Option("--skip-zeros/--no-skip-zeros", help="Skip fc2 where ReLU gave 0 (exact).")]
ExactPrompts = Annotated[
    bool, typer.Option("--exact-prompts", help="cpu: round no activations of prompts and int4 tokens: half the pace.")
]
MaxBatch = Annotated[int, typer.Option("--max-batch", help="TensorRT: most rows at once.", min=1)]
MaxContext = Annotated[int, typer.Option("--max-context", help="TensorRT: most tokens; 0: the model's context.", min=0)]
ComputeCapability = Annotated[
    list[str] | None,
    typer.Option(
        "--compute-capability",
        help="TensorRT for RTX: GPUs to build for, such as 8.6; several times.",
        show_default=False,
    ),
]
DumpPasses = Annotated[
    Path | None, typer.Option("--dump-passes", help="Write the graph after every pass here.", show_default=False)
]
