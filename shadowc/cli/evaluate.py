# SPDX-License-Identifier: Apache-2.0
"""`shadowc eval`: quality on a text, beside the controls."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from shadowc.cli import flags, render

if TYPE_CHECKING:
    from shadowc.measure.evaluate import EvalReport


Protocol = Literal["decode", "prompt"]


def evaluate(
    engine: flags.Engine,
    text: Annotated[
        Path,
        typer.Option("--text", help="UTF-8 text that neither trained nor calibrated the engine.", show_default=False),
    ],
    densities: Annotated[
        str, typer.Option("--densities", help="Heads/neurons, separated by commas; one number means both.")
    ] = "1,0.5,0.2,1/0.5,1/0.2",
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            help="Whose masks: predictor, static, normalised, random; default: all, for plans the predictor's.",
            show_default=False,
        ),
    ] = None,
    window: Annotated[
        int | None, typer.Option("--window", help="Tokens per window; default: the context.", min=2, show_default=False)
    ] = None,
    protocol: Annotated[
        Protocol | None,
        typer.Option(
            "--protocol",
            help="decode: a mask for every token; prompt: one for all tokens after a prompt; default: as compiled.",
            show_default=False,
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            "--prompt-tokens",
            help="Dense tokens that a window begins with; default: 1, for protocol prompt 16.",
            min=0,
            show_default=False,
        ),
    ] = None,
    refresh: flags.Refresh = None,
    threads: flags.Threads = None,
    seed: flags.Seed = 0,
    json: flags.AsJson = False,
) -> None:
    """Measure bits per byte on a text at several densities, under the predictor's masks and under controls."""
    from typing import get_args

    from shadowc.measure.evaluate import Method
    from shadowc.measure.evaluate import evaluate as run_evaluate
    from shadowc.runtime.load import load, read_manifest
    from shadowc.spec.errors import InputError

    wanted = flags.densities_of(densities)
    names = None if methods is None else tuple(name.strip() for name in methods.split(","))
    unknown = [name for name in names or () if name not in get_args(Method)]
    if unknown:
        raise InputError(
            f"unknown method {', '.join(map(repr, unknown))}", hint=f"--methods takes {', '.join(get_args(Method))}"
        )
    content = _read(text)
    exact = read_manifest(engine).tensorrt is None  # dense text is read as masked text is
    with render.progress() as progress:
        report = run_evaluate(
            load(engine, threads=threads, refresh=refresh, exact_prompts=exact),
            content,
            densities=wanted,
            methods=names,  # type: ignore[arg-type]  # checked above
            window=window,
            protocol=protocol,
            prompt_tokens=prompt_tokens,
            seed=seed,
            progress=progress,
        )
    if json:
        render.as_json(asdict(report))
    else:
        _show(report)


def _read(path: Path) -> str:
    from shadowc.spec.errors import InputError

    try:
        return path.read_bytes().decode("utf-8")  # text mode would change line ends, and with them bytes and hash
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", hint="--text takes a UTF-8 text file") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 at byte {error.start}", hint=f"iconv -t UTF-8 {path} converts it"
        ) from None


def _show(report: EvalReport) -> None:
    render.line(
        f"{report.text_bytes:,} bytes, {report.tokens:,} tokens in windows of {report.window}, "
        f"protocol {report.protocol} after {report.prompt_tokens} dense; dense: {report.dense:.4f} bits per byte"
    )
    render.table(
        ("masks", "heads", "neurons", "bits/byte", "over dense", "active heads", "active neurons"),
        [
            (
                row.method,
                f"{row.density.heads:g}",
                f"{row.density.neurons:g}",
                f"{row.bits_per_byte:.4f}",
                f"{row.bits_per_byte - report.dense:+.4f}",
                render.share(row.active_heads),
                render.share(row.active_neurons),
            )
            for row in report.rows
        ],
    )
