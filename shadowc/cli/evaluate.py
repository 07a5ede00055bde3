# SPDX-License-Identifier: Apache-2.0
"""`shadowc eval`: quality on texts and tasks, beside the controls, in torch or on an engine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from shadowc.cli import flags, render

if TYPE_CHECKING:
    from shadowc.cli.eval_inputs import Ground, Masks, Subject
    from shadowc.eval.run import Evaluation
    from shadowc.spec.progress import Progress

TORCH_ONLY = ("predictor", "scope", "exempt", "min_active_heads", "min_active_neurons", "load_format", "offline")
ENGINE_ONLY = ("refresh", "threads")
TASKS_ONLY = ("task", "shots")
TEXTS_ONLY = ("window",)


def evaluate(
    context: typer.Context,
    engine: Annotated[
        Path | None, typer.Argument(metavar="[ENGINE]", help="Engine folder; or --model.", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Instead of an engine: a checkpoint, in torch.", show_default=False),
    ] = None,
    predictor: Annotated[
        Path | None,
        typer.Option("--predictor", help="With --model: what `shadowc train` made of it.", show_default=False),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(
            "--text", help="UTF-8 text, or .jsonl with a field text: bits per byte. Unseen text.", show_default=False
        ),
    ] = None,
    wikitext: Annotated[
        Path | None,
        typer.Option("--wikitext", help="Raw WikiText split: word perplexity as in lm-eval.", show_default=False),
    ] = None,
    tasks: Annotated[
        Path | None,
        typer.Option("--tasks", help="Folder with TASK/eval.jsonl and TASK/fewshot.jsonl.", show_default=False),
    ] = None,
    task: Annotated[
        str, typer.Option("--task", help="all, or of piqa, copa, openbookqa, winogrande, rte, hellaswag, arc_easy.")
    ] = "all",
    shots: Annotated[str, typer.Option("--shots", help="Solved examples before a question; several: 0,5.")] = "0",
    limit: Annotated[
        int | None,
        typer.Option("--limit", help="First windows, pages and examples only.", min=1, show_default=False),
    ] = None,
    densities: Annotated[
        str, typer.Option("--densities", help="Heads/neurons, separated by commas; one number means both.")
    ] = "1,0.5,0.2,1/0.5,1/0.2",
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            help="Whose masks: predictor, static, normalised, random (default: all that there are); oracle, prompt; "
            "calibrated, sensitivity: the predictor's, by thresholds.",
            show_default=False,
        ),
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option("--scope", help="local, global, or local,global; default: the predictor's.", show_default=False),
    ] = None,
    window: Annotated[
        int | None, typer.Option("--window", help="Tokens per window; default: the context.", min=2, show_default=False)
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            "--protocol",
            help="decode: a mask for every token; prompt: one for all tokens after a prompt; paper: the last token's "
            "for all, not causal; several with commas; default: decode, of an engine as compiled.",
            show_default=False,
        ),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            "--prompt-tokens",
            help="Dense tokens at the start; default: 1 of a window, for protocol prompt 16, of a task the prompt.",
            min=0,
            show_default=False,
        ),
    ] = None,
    sweep: Annotated[
        Path | None,
        typer.Option("--sweep", help="Folder for CSV, JSON, plots and a table; goes on there.", show_default=False),
    ] = None,
    exempt: flags.Exempt = None,
    min_active_heads: flags.MinActiveHeads = 0,
    min_active_neurons: flags.MinActiveNeurons = 0,
    load_format: flags.LoadFormatFlag = "auto",
    offline: flags.Offline = False,
    refresh: flags.Refresh = None,
    threads: flags.Threads = None,
    seed: flags.Seed = 0,
    json: flags.AsJson = False,
) -> None:
    """Measure quality on texts and tasks at several densities, under the predictor's masks and under controls."""
    from shadowc.cli.eval_inputs import Ground, Masks, Subject
    from shadowc.sparsity.kept import Kept

    flags.refuse_unused(context, *((TORCH_ONLY, "for an engine") if model is None else (ENGINE_ONLY, "with --model")))
    if tasks is None:
        flags.refuse_unused(context, TASKS_ONLY, "without --tasks")
    elif text is None and wikitext is None:
        flags.refuse_unused(context, TEXTS_ONLY, "on --tasks alone")
    kept = Kept(flags.layers_of(exempt), min_active_heads, min_active_neurons)
    subject = Subject(engine, model, predictor, load_format, offline, refresh, threads, seed, kept)
    masks = Masks.read(methods, densities, protocol, scope, prompt_tokens)
    ground = Ground.read(text, wikitext, tasks, task, shots, window, limit)
    with render.progress() as progress:
        evaluation = _evaluate(subject, masks, ground, sweep, progress)
    if json:
        from shadowc.eval.report import as_data

        render.as_json(as_data(evaluation))
        return
    from shadowc.cli.eval_tables import show

    show(evaluation)
    if sweep is not None:
        render.line(f"written: {sweep}")


def _evaluate(subject: Subject, masks: Masks, ground: Ground, sweep: Path | None, progress: Progress) -> Evaluation:
    """Load, evaluate, and write what a sweep leaves."""
    from shadowc.eval.run import evaluate as run_evaluate

    if sweep is None:
        model = subject.load(progress)
        return run_evaluate(
            model, list(ground.corpora(model)), masks.settings(model), seed=subject.seed, progress=progress
        )
    from shadowc.eval import sweep as sweeps

    sweeps.check(sweep)
    model = subject.load(progress)
    return sweeps.run(sweep, model, ground.corpora(model), masks.settings(model), subject.seed, progress)
