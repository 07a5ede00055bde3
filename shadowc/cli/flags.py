# SPDX-License-Identifier: Apache-2.0
"""Flags that several commands share, declared once; defaults come from the options of the stages."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from shadowc.runtime.cores import MOST_THREADS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from shadowc.spec.density import Density
    from shadowc.spec.manifest import SparsityPart

Weights = Literal["fp32", "fp16", "bf16", "int8", "int4"]
Scope = Literal["local", "global"]
Select = Literal["exact", "calibrated", "sensitivity"]
Mask = Literal["token", "sequence"]
LoadFormat = Literal["auto", "dummy"]
Style = Literal["shadow", "dejavu", "shadow+"]
Labels = Literal["scores", "top", "graded", "expected"]
Fill = Literal["mean", "zero"]
MemoryKind = Literal["shared", "renewed", "private"]

# --- the model
Model = Annotated[
    str,
    typer.Option("--model", "-m", help="opt-125m … opt-66b, opt-mini, a hub id, or a folder.", show_default=False),
]
AnyModel = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="opt-125m … opt-66b, opt-mini, a hub id, a folder, or a GGUF file; also of Llama-type models.",
        show_default=False,
    ),
]
LoadFormatFlag = Annotated[
    LoadFormat, typer.Option("--load-format", help="dummy: seeded random weights of the true shape, no download.")
]
Offline = Annotated[bool, typer.Option("--offline", help="Never use the network (HF_HUB_OFFLINE=1 means the same).")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.", min=0)]

# --- calibration and training
Data = Annotated[
    str, typer.Option("--data", help="Calibration text: self (sampled from the model), or a .txt or .jsonl file.")
]
Criterion = Annotated[str, typer.Option("--criterion", help="Importance of a unit; `shadowc criteria` lists them.")]
Positions = Annotated[
    int, typer.Option("--positions", "--samples", help="Token positions to record.", min=16, show_default=True)
]
HeadFill = Annotated[
    Fill,
    typer.Option(
        "--fill", help="What a skipped head leaves: zero, or (at no cost) its mean over the calibration text."
    ),
]
NeuronBlock = Annotated[
    int | None,
    typer.Option(
        "--neuron-block",
        help="Neurons that are skipped together; default: 16, for style shadow+ 1.",
        min=1,
        show_default=False,
    ),
]
PredictorStyle = Annotated[
    Style,
    typer.Option(
        "--style",
        help="shadow: layer 0 tells what all later layers compute; dejavu: each layer for itself; shadow+: the same, "
        "and with shares of one budget.",
    ),
]
PredictorLabels = Annotated[
    Labels | None,
    typer.Option(
        "--labels",
        help="What is learned: scores, top of each layer, graded, expected; default: scores for shadow, top for "
        "dejavu, for shadow+ graded, or expected if the criterion does not compare layers (activation, l2norm).",
        show_default=False,
    ),
]
Width = Annotated[
    int, typer.Option("--width", help="Hidden width of the predictor; 0: within 3 % of the model.", min=0)
]
Epochs = Annotated[int, typer.Option("--epochs", help="Passes over the recorded positions.", min=1)]

# --- running
Engine = Annotated[Path, typer.Argument(metavar="ENGINE", help="Engine folder.", show_default=False)]
BothDensities = Annotated[
    float | None,
    typer.Option("--density", help="Share of heads and neurons kept; default: the engine's own.", show_default=False),
]
HeadDensity = Annotated[float | None, typer.Option("--head-density", help="Share of heads kept.", show_default=False)]
NeuronDensity = Annotated[
    float | None, typer.Option("--neuron-density", help="Share of neurons kept.", show_default=False)
]
Refresh = Annotated[
    int | None,
    typer.Option(
        "--refresh",
        help="Tokens for which a mask of a sequence holds, 0: until the end; default: the engine's own.",
        min=0,
        show_default=False,
    ),
]
Exempt = Annotated[
    str | None,
    typer.Option("--exempt", help="Layers that stay dense beside layer 0, by commas.", show_default=False),
]
MinActiveHeads = Annotated[
    int, typer.Option("--min-active-heads", help="Heads that every masked layer keeps at least.", min=0)
]
MinActiveNeurons = Annotated[
    int, typer.Option("--min-active-neurons", help="The same of neurons, in whole blocks.", min=0)
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", help="Threads; default: one per core.", min=1, max=MOST_THREADS, show_default=False),
]
Memory = Annotated[
    MemoryKind | None,
    typer.Option(
        "--memory",
        help="Weights: mapped from the file (shared), the same in large pages (renewed), or copied. Default: shared.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]


def density_of(
    both: float | None, heads: float | None, neurons: float | None, default: SparsityPart | None
) -> Density | None:
    """The density that the flags ask for, on top of the engine's own; None: nothing was asked for.

    Raises:
        InputError: a share is outside 0..1, or --density comes with a single share.
    """
    from shadowc.spec.density import Density
    from shadowc.spec.errors import InputError

    if both is not None and (heads is not None or neurons is not None):
        raise InputError(
            "--density sets heads and neurons; it was given together with a flag for one of them",
            hint="use either --density, or --head-density and --neuron-density",
        )
    if both is not None:
        return Density.of(both)
    if heads is None and neurons is None:
        return None
    own = Density(default.head_density, default.neuron_density) if default else Density()
    return Density(own.heads if heads is None else heads, own.neurons if neurons is None else neurons)


def densities_of(text: str) -> tuple[Density, ...]:
    """Densities from a list such as `1,0.5,0.5/0.2` (heads/neurons).

    Raises:
        InputError: an entry is not a number or outside 0..1.
    """
    from shadowc.spec.density import Density
    from shadowc.spec.errors import InputError

    found, hint = [], "for example --densities 1,0.5,0.5/0.2"
    for entry in text.split(","):
        try:
            found.append(Density.parse(entry))
        except InputError as error:
            raise InputError(error.message, hint=hint) from None
    return tuple(found)


def layers_of(text: str | None) -> tuple[int, ...]:
    """Layers from a list such as `1,2,23`.

    Raises:
        InputError: an entry is not a number.
    """
    from shadowc.spec.errors import InputError

    entries = [] if text is None else [entry.strip() for entry in text.split(",")]
    for entry in entries:
        if not entry.isdecimal():
            raise InputError(
                f"a list of layers was expected, found {entry!r} in it", hint="for example --exempt 1,2,23"
            )
    return tuple(map(int, entries))


def refuse_unused(context: typer.Context, names: Iterable[str], because: str) -> None:
    """Refuse flags that were typed and would have no effect.

    Args:
        context: of the command that runs.
        names: parameters of the command's function.
        because: ends the sentence "--data has no effect ".

    Raises:
        InputError: at least one of them did not keep its default by itself.
    """
    from shadowc.spec.errors import InputError

    typed = [f"--{name.replace('_', '-')}" for name in names if _was_typed(context, name)]
    if typed:
        verb = "has" if len(typed) == 1 else "have"
        raise InputError(
            f"{', '.join(typed)} {verb} no effect {because}", hint="leave it out" if verb == "has" else "leave them out"
        )


def _was_typed(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name not in ("DEFAULT", "DEFAULT_MAP")


def checked(options: Callable[..., Any], values: Mapping[str, object], command: str) -> Any:
    """Build frozen options; what pydantic finds wrong becomes one InputError with all findings.

    Raises:
        InputError: a value is out of its range or of the wrong kind, or two do not go together; names the command.
    """
    from pydantic import ValidationError

    from shadowc.spec.errors import InputError

    try:
        return options(**values)
    except ValidationError as error:
        findings = [_finding(item["loc"], item["msg"]) for item in error.errors()]
        raise InputError(
            f"{len(findings)} option value{'s' if len(findings) > 1 else ''} cannot be used",
            hint=f"shadowc {command} --help lists what each flag takes",
            problems=findings,
        ) from None


def _finding(place: tuple[int | str, ...], message: str) -> str:
    """What pydantic found, as of a flag; without a place it is of several together."""
    message = message.removeprefix("Value error, ")
    names = [part for part in place if isinstance(part, str)]  # numbers are places in a list, no part of the flag
    return f"--{'-'.join(names).replace('_', '-')}: {message}" if names else message
