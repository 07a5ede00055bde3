# SPDX-License-Identifier: Apache-2.0
"""Quality of an engine on text, in bits per byte, beside its controls.

Protocol `decode`: every token after the prompt of a window (its first token) is computed under its own
mask, as in generation, and its K/V come from masked layers too. Protocol `prompt`: the last token of the
prompt makes the mask of all tokens after it. The prompt is dense. Windows are disjoint, so every byte of
the text counts once, those of the prompts included. The controls put other scores through the same
SelectThreshold and the same kernels.

Letters: S tokens, R some of them, V vocabulary, L predicted layers, N units per layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from shadowc.spec.density import Density
from shadowc.spec.errors import InputError, UnsupportedError
from shadowc.spec.progress import NullProgress, Progress

if TYPE_CHECKING:
    import numpy.typing as npt

    from shadowc.runtime.causal import CausalEngine

Method = Literal["predictor", "static", "normalised", "random"]
Protocol = Literal["decode", "prompt"]
PROMPT_TOKENS: dict[Protocol, int] = {"decode": 1, "prompt": 16}
"""Dense tokens that a window begins with, unless a call says otherwise."""
ROWS_AT_ONCE = 64
"""Rows of logits that are widened to float64 together."""
METHODS: tuple[Method, ...] = get_args(Method)
Scores = tuple["npt.NDArray[np.float32]", "npt.NDArray[np.float32]"]
"""Heads [1,S,L,H] and neurons [1,S,L,N]."""


@dataclass(frozen=True, slots=True)
class EvalRow:
    """One method at one density."""

    method: Method
    density: Density
    bits_per_byte: float
    active_heads: float
    """Share of the heads of the predicted layers that were computed, counted by the kernels."""
    active_neurons: float


@dataclass(frozen=True, slots=True)
class EvalReport:
    """All rows over one text; `dense` is the same engine at density 1."""

    text_sha256: str
    text_bytes: int
    tokens: int
    window: int
    protocol: str
    prompt_tokens: int
    """Dense tokens that every window begins with."""
    dense: float
    rows: tuple[EvalRow, ...]


def evaluate(
    engine: CausalEngine,
    text: str,
    *,
    densities: Sequence[Density],
    methods: Sequence[Method] | None = None,
    window: int | None = None,
    protocol: Protocol | None = None,
    prompt_tokens: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> EvalReport:
    """Bits per byte of `text` under every method and density.

    Args:
        engine: what is measured.
        text: what to predict; must not have calibrated the engine's predictor.
        densities: shares kept; density 1 is always measured first.
        methods: the predictor and the controls; None: all that engines of this target take.
        window: tokens per window, the first (bos) included; None: the model's context.
        protocol: None: what the engine was compiled for.
        prompt_tokens: dense tokens that a window begins with; None: see PROMPT_TOKENS.
        seed: of the random control.
        progress: told about settings.

    Raises:
        InputError: the text is empty, was used for calibration, or a control is missing from the engine.
        UnsupportedError: a control was asked of a plan, which has no input for scores.
    """
    progress = progress or NullProgress()
    if methods is None:
        methods = METHODS if engine.manifest.tensorrt is None else ("predictor",)
    _refuse_controls_of_plans(engine, methods)
    if protocol is None:
        sparsity = engine.manifest.sparsity
        protocol = "prompt" if sparsity is not None and sparsity.mask == "sequence" else "decode"
    prompt_tokens = PROMPT_TOKENS[protocol] if prompt_tokens is None else prompt_tokens
    windows = list(_windows(engine, text, window))
    if not windows:
        raise InputError("the evaluation text holds no tokens; expected prose", hint="shadowc eval ENGINE --text FILE")
    engine.refuse_calibration_text(text)
    cut = _CutText(windows, len(text.encode()), protocol, prompt_tokens)
    jobs: list[tuple[Method, Density]] = [("predictor", Density())]
    jobs += [(method, density) for density in densities for method in methods]
    rows = []
    with progress.stage("eval"):
        for done, (method, density) in enumerate(jobs):
            rows.append(_row(engine, cut, method, density, seed))
            progress.advance(done + 1, len(jobs), "settings")
    return EvalReport(
        text_sha256=hashlib.sha256(text.encode()).hexdigest(),
        text_bytes=cut.size,
        tokens=sum(len(ids) - 1 for ids in windows),
        window=max(len(ids) for ids in windows),
        protocol=protocol,
        prompt_tokens=prompt_tokens,
        dense=rows[0].bits_per_byte,
        rows=tuple(rows[1:]),
    )


def _refuse_controls_of_plans(engine: CausalEngine, methods: Sequence[Method]) -> None:
    """Before anything is measured: the first setting of a long run would otherwise be lost with the second."""
    controls = [method for method in methods if method != "predictor"]
    if engine.manifest.tensorrt is not None and controls:
        raise UnsupportedError(
            f"{', '.join(controls)}: an engine for {engine.manifest.target} takes scores from its own predictor only",
            hint="--methods predictor, or the same model compiled for --target cpu",
        )


def _windows(engine: CausalEngine, text: str, window: int | None) -> Iterator[npt.NDArray[np.int64]]:
    """Disjoint pieces of the text's tokens, each behind one bos token."""
    model = engine.model
    ids = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
    step = min(window or model.positions, model.positions) - 1
    for at in range(0, len(ids), step):
        yield np.array([model.bos, *ids[at : at + step]], np.int64)


@dataclass(frozen=True, slots=True)
class _CutText:
    """A text in windows, and how each is read."""

    windows: Sequence[npt.NDArray[np.int64]]
    size: int
    """Bytes of the whole text."""
    protocol: Protocol
    prompt_tokens: int


def _row(engine: CausalEngine, text: _CutText, method: Method, density: Density, seed: int) -> EvalRow:
    bits, heads, neurons, tokens = 0.0, 0.0, 0.0, 0
    scores = _control(engine, method, seed)
    for ids_S in text.windows:
        logits_SV = engine.logits(ids_S[None], density, text.protocol, text.prompt_tokens, scores=scores)[0]
        bits += _bits(logits_SV[:-1], ids_S[1:])
        stats = engine.last_stats
        heads += stats.active_head_share * stats.tokens
        neurons += stats.active_neuron_share * stats.tokens
        tokens += stats.tokens
    if not tokens:  # no window is longer than its prompt
        return EvalRow(method, density, bits / text.size, 1.0, 1.0)
    return EvalRow(method, density, bits / text.size, heads / tokens, neurons / tokens)


def _bits(logits_SV: npt.NDArray[np.float32], ids_S: npt.NDArray[np.int64]) -> float:
    """Sum of -log2 p(token) in float64, a few rows at a time: a window of a large vocabulary is big enough once."""
    nats = 0.0
    for at in range(0, len(ids_S), ROWS_AT_ONCE):
        wide_RV = logits_SV[at : at + ROWS_AT_ONCE].astype(np.float64)
        chosen_R = wide_RV[np.arange(len(wide_RV)), ids_S[at : at + ROWS_AT_ONCE]]
        top_R1 = wide_RV.max(axis=1, keepdims=True)
        chosen_R -= top_R1[:, 0]
        wide_RV -= top_R1
        np.exp(wide_RV, out=wide_RV)
        nats += float((np.log(wide_RV.sum(axis=1)) - chosen_R).sum())
    return nats / float(np.log(2))


def _control(engine: CausalEngine, method: Method, seed: int) -> Callable[[int], Scores] | None:
    """Makes the scores of the next `tokens` tokens; None: the predictor's own."""
    if method == "predictor":
        return None
    if method == "random":
        rng = np.random.default_rng(seed)
        model, sparsity = engine.manifest.model, engine.manifest.sparsity
        if sparsity is None:
            raise InputError("a dense engine has no masks to control", hint="shadowc compile without --predictor none")
        layers, units = model.layers - 1, -(-model.ffn // sparsity.neuron_block)
        return lambda tokens: (
            rng.random((1, tokens, layers, model.heads), np.float32),
            rng.random((1, tokens, layers, units), np.float32),
        )
    ranking = engine.controls(method)
    return lambda tokens: (
        np.repeat(ranking.heads[None, None], tokens, axis=1),
        np.repeat(ranking.neurons[None, None], tokens, axis=1),
    )
