# SPDX-License-Identifier: Apache-2.0
"""Quality of an engine on text, in bits per byte, beside its controls: `shadowc.eval` for one text and one engine.

Windows are disjoint, so every byte of the text counts once, those of the prompts included. Which tokens are masked,
and by which mask, is what `shadowc.eval.request.PROTOCOLS` says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from shadowc.eval.engine_model import EngineModel
from shadowc.eval.request import PROMPT_TOKENS, Setting
from shadowc.eval.run import evaluate as run_evaluate
from shadowc.eval.texts import corpus_of
from shadowc.spec.density import Density

if TYPE_CHECKING:
    from shadowc.runtime.causal import CausalEngine
    from shadowc.spec.progress import Progress

Method = Literal["predictor", "static", "normalised", "random"]
Protocol = Literal["decode", "prompt"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True, slots=True)
class EvalRow:
    """One method at one density."""

    method: str
    """One of METHODS, or static-CRITERION."""
    density: Density
    bits_per_byte: float
    active_heads: float
    """Share of the heads of the predicted layers that were computed, counted by the kernels."""
    active_neurons: float
    sparsity: float
    """Share of a dense token's layer bytes that a masked token does not read; the predictor's bytes count as read."""


@dataclass(frozen=True, slots=True)
class EvalReport:
    """All rows over one text; `dense` is the same engine without masks."""

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
    methods: Sequence[str] | None = None,
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
        densities: shares kept; the dense engine is always measured first.
        methods: the predictor and the controls; None: all that engines of this target take.
        window: tokens per window, the first (bos) included; None: the model's context.
        protocol: None: what the engine was compiled for.
        prompt_tokens: dense tokens that a window begins with; None: see PROMPT_TOKENS.
        seed: of the random control.
        progress: told about windows.

    Raises:
        InputError: the text is empty, shorter than the window, was used for calibration, or a control is missing from
            the engine.
        UnsupportedError: a control was asked of a plan, which has no input for scores, or the engine cannot follow the
            protocol.
    """
    model = EngineModel(engine, seed)
    chosen = protocol or model.protocols[0]
    settings = [
        Setting(method, density, chosen, prompt_tokens=prompt_tokens)
        for density in densities
        for method in (model.methods if methods is None else methods)
    ]
    model.check(Setting(protocol=chosen), *settings)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    corpus = corpus_of(model, "the evaluation text", [text], sha256, window)
    model.refuse_calibration_text(text.encode(), [text])
    dense, *rows = run_evaluate(model, [corpus], settings, progress=progress).rows
    return EvalReport(
        text_sha256=sha256,
        text_bytes=corpus.bytes,
        tokens=corpus.tokens,
        window=corpus.window,
        protocol=chosen,
        prompt_tokens=PROMPT_TOKENS[chosen] if prompt_tokens is None else prompt_tokens,
        dense=dense.metrics[0].value,
        rows=tuple(
            EvalRow(
                row.setting.method,
                row.setting.density,
                row.metrics[0].value,
                row.active_heads,
                row.active_neurons,
                row.sparsity,
            )
            for row in rows
        ),
    )
