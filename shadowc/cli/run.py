# SPDX-License-Identifier: Apache-2.0
"""`shadowc run`: text in, text out, and what it cost."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shadowc.cli import drawings, flags, render
from shadowc.spec.errors import InputError

if TYPE_CHECKING:
    from shadowc.measure.mask_map import MaskMap
    from shadowc.runtime.causal import CausalEngine
    from shadowc.runtime.stats import RunStats
    from shadowc.spec.density import Density

ENDINGS = {
    "eos": "the model ended the text",
    "length": "--max-new-tokens reached",
    "context": "the model's context is full",
}


def run(
    engine: flags.Engine,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to go on from.", show_default=False)],
    density: flags.BothDensities = None,
    head_density: flags.HeadDensity = None,
    neuron_density: flags.NeuronDensity = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Tokens to generate.", min=1)] = 64,
    reference: Annotated[
        bool, typer.Option("--reference", help="Run reference.onnx: standard operators only, slow, the judge.")
    ] = False,
    mask: Annotated[
        flags.Mask | None,
        typer.Option("--mask", help="token: a mask for every token; default: as compiled.", show_default=False),
    ] = None,
    refresh: flags.Refresh = None,
    threads: flags.Threads = None,
    memory: flags.Memory = None,
    show_map: Annotated[
        bool, typer.Option("--map", help="Show which heads and neurons each token computes, as it comes.")
    ] = False,
    save_map: Annotated[
        Path | None,
        typer.Option(
            "--save-map", help="Write how often each head and neuron was computed into this PNG.", show_default=False
        ),
    ] = None,
    json: flags.AsJson = False,
) -> None:
    """Generate text, greedily; the share of the model that is computed can differ from run to run."""
    flags.density_of(density, head_density, neuron_density, None)  # a bad share is told before anything is loaded
    if save_map is not None:
        _check_map(save_map, max_new_tokens)
    from shadowc.runtime.load import load

    with render.progress() as progress, progress.stage("load"):
        loaded = load(engine, threads=threads, reference=reference, mask=mask, refresh=refresh, memory=memory)
    plan = loaded.manifest.sparsity
    wanted = flags.density_of(density, head_density, neuron_density, plan)
    used = None if plan is None else wanted or loaded.density
    if not show_map and save_map is None:
        stream = None if json else _Echo(prompt)
        text = loaded.generate(prompt, max_new_tokens=max_new_tokens, density=wanted, stream=stream)
    else:
        text = _with_map(loaded, prompt, max_new_tokens, wanted, shown=show_map, saved=save_map, quiet=json)
    stats = loaded.last_stats
    if json:
        render.as_json(_as_dict(prompt, text, used, loaded.manifest.model.ffn, stats))
        return
    render.line("" if text else prompt)
    render.facts(_cost(used, loaded.manifest.model.ffn, stats), talk=True)


def _with_map(
    engine: CausalEngine,
    prompt: str,
    most: int,
    density: Density | None,
    *,
    shown: bool,
    saved: Path | None,
    quiet: bool,
) -> str:
    """Generate with the masks on show; the text, which stands on standard output unless it is `quiet`."""
    from shadowc.cli.mask_view import map_view
    from shadowc.measure.mask_map import MaskMap

    counted = MaskMap()
    view = map_view(counted, prompt) if shown else None
    moving = view is not None and view.shows_text
    echo = None if quiet or moving else _Echo(prompt)

    def stream(piece: str) -> None:
        for shows in (echo, view.piece if view else None):
            if shows is not None:
                shows(piece)

    try:
        watch = counted.add if view is None else view.watch
        text = engine.generate(prompt, max_new_tokens=most, density=density, stream=stream, watch=watch)
    finally:
        if view is not None:
            view.close()
    if moving and not quiet and text:
        render.piece(prompt + text)
    if saved is not None:
        _save(counted, saved, engine.manifest.model.name, engine.last_stats.finish[0])
    return text


def _save(counted: MaskMap, path: Path, name: str, finish: str) -> None:
    """Write the map as a picture.

    Raises:
        InputError: there is nothing to draw, or the file cannot be written.
    """
    from shadowc.measure.mask_map import png

    if not counted.tokens:
        raise InputError(
            f"there is no map, since no token was computed under a mask: {ENDINGS[finish]} after one token",
            hint="give a shorter prompt" if finish == "context" else "give another prompt",
        )
    about = f"{name}: share of {counted.tokens} tokens that computed a unit; layers down, heads, then neurons across"
    drawings.write(path, png(counted.picture(), about))
    render.say(f"map of {counted.tokens} tokens saved to {path}")


def _check_map(path: Path, most: int) -> None:
    """Refuse, before anything is loaded, a map that could not be drawn or saved."""
    drawings.require_place(path)
    if path.suffix.lower() != ".png":
        raise InputError(f"{path} would be a PNG picture", hint=f"--save-map {path.with_suffix('.png')}")
    if most < 2:
        raise InputError(
            "there is no map of one token: the prompt's pass, which has no masks, gives the first",
            hint="--max-new-tokens 2 or more",
        )


class _Echo:
    """Shows the prompt once the first piece is there (a prompt that is refused is not shown), then every piece."""

    def __init__(self, prompt: str) -> None:
        self._prompt = prompt

    def __call__(self, piece: str) -> None:
        render.piece(self._prompt + piece)
        self._prompt = ""


def _as_dict(prompt: str, text: str, used: Density | None, ffn: int, stats: RunStats) -> dict[str, object]:
    return {
        "prompt": prompt,
        "text": text,
        "new_tokens": stats.new_tokens,
        "finish": stats.finish[0] if stats.finish else None,
        "density": {"heads": used.heads, "neurons": used.neurons} if used else None,
        "tokens_per_second": stats.tokens_per_second,
        "prefill_seconds": stats.prefill_seconds,
        "seconds": stats.seconds,
        "active_heads": stats.heads,
        "heads": stats.head_units,
        "active_neurons": stats.active_neurons,
        "neurons": ffn,
        "bytes_per_token": stats.bytes_read,
        "dense_bytes_per_token": stats.dense_bytes,
    }


def _cost(used: Density | None, ffn: int, stats: RunStats) -> dict[str, str]:
    """Return what the talk says after the text: all numbers are counted by the kernels, none is what was asked for."""
    heads, neurons = stats.head_units, stats.active_neurons
    ending = f"; {ENDINGS.get(stats.finish[0], stats.finish[0])}" if stats.finish else ""
    rows = {
        "generated": f"{stats.new_tokens} tokens{ending}",
        "speed": f"{stats.tokens_per_second:.1f} tokens/s after {render.seconds(stats.prefill_seconds)} for the prompt",
        "asked for": f"{used.heads:g} of the heads, {used.neurons:g} of the neurons" if used else "a dense engine",
        "active heads": f"{stats.heads:.1f} of {heads} per layer ({render.share(stats.heads / heads)})",
        "active neurons": f"{neurons:.0f} of {ffn} per layer ({render.share(neurons / ffn)})",
    }
    if stats.tokens and not math.isnan(stats.bytes_read):
        share = render.share(stats.bytes_read / stats.dense_bytes)
        rows["read per token"] = f"{render.size(stats.bytes_read)} of {render.size(stats.dense_bytes)} ({share})"
    return rows
