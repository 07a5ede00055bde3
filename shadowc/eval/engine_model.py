# SPDX-License-Identifier: Apache-2.0
"""An engine folder, evaluated by its own kernels, one request at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from shadowc.eval.ledger import Ledger
from shadowc.eval.likelihood import log_likelihood
from shadowc.eval.model import METHODS, REFERENCE_PROTOCOLS, EvaluatedModel, random_scores
from shadowc.eval.request import BY_THRESHOLD, LEARNED, Outcome, Request, Setting
from shadowc.measure.expected import record_bytes
from shadowc.runtime.stored import control_names
from shadowc.spec.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    import numpy.typing as npt

    from shadowc.runtime.causal import CausalEngine
    from shadowc.spec.manifest import EngineManifest

    Scores = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]


class EngineModel(EvaluatedModel):
    """A loaded engine.

    Args:
        engine: what is measured.
        seed: of random masks.
    """

    def __init__(self, engine: CausalEngine, seed: int = 0) -> None:
        self.engine, self._seed = engine, seed
        manifest, sparsity = engine.manifest, engine.manifest.sparsity
        self.name, self.identity = f"{manifest.model.name} ({engine.folder.name})", manifest.build_key
        self.context, self.start = engine.model.positions, engine.model.bos
        held = sparsity is not None and sparsity.mask == "sequence"
        refresh = int(getattr(engine, "refresh", 0))
        if sparsity is not None and refresh != sparsity.refresh:
            self.identity += f" refresh {refresh}"  # other masks, so other answers: no sweep goes on with them
        self.protocols = ("prompt", "decode") if held else ("decode",)
        if sparsity is None:
            self.methods: tuple[str, ...] = ()
        else:
            exact = sparsity.select == "exact"
            takes_scores = manifest.tensorrt is None and exact
            stored = (*METHODS[1:], *sorted({*control_names(engine.folder, manifest)} - {*METHODS}))
            self.methods = ("predictor" if exact else sparsity.select, *(stored if takes_scores else ()))
        report = {} if sparsity is None else sparsity.predictor.get("report")
        self.recall = report.get("found", {}) if isinstance(report, dict) else {}
        self.ledger = ledger_of(manifest, refresh)

    @property
    def tokenizer(self) -> Any:
        """Callable as transformers' tokenizers are.

        Raises:
            InputError: the folder holds none.
        """
        return self.engine.tokenizer

    def refuse_calibration_text(self, content: bytes, documents: Sequence[str]) -> None:
        """Refuse a text that the predictor was calibrated on.

        Raises:
            InputError: it is that text, or shares paragraphs with it.
        """
        from shadowc.sparsity.fingerprint import fingerprint, refuse_if_calibrated

        sparsity = self.engine.manifest.sparsity
        if sparsity is not None:
            refuse_if_calibrated(fingerprint(content, documents), sparsity.predictor)

    def score(self, requests: Sequence[Request], setting: Setting) -> list[Outcome]:
        """Answer the requests, in their order.

        Raises:
            InputError: the engine has no masks, or lacks a control.
            UnsupportedError: the engine cannot follow the protocol, or takes no scores.
        """
        self.check(setting)
        return [self._answer(request, setting) for request in requests]

    def _answer(self, request: Request, setting: Setting) -> Outcome:
        engine = self.engine
        logits_SV = engine.logits(
            request.inputs[None],
            setting.density,
            "prompt" if setting.protocol == "prompt" else "decode",
            setting.dense_tokens(request),
            scores=self._control(request, setting),
        )[0]
        nats, greedy = log_likelihood(logits_SV[-request.scored :], request.targets)
        stats = engine.last_stats
        if setting.dense or not stats.tokens:
            return Outcome(nats, greedy)
        tokens = stats.tokens
        return Outcome(nats, greedy, tokens, stats.active_head_share * tokens, stats.active_neuron_share * tokens)

    def _control(self, request: Request, setting: Setting) -> Callable[[int], Scores] | None:
        """Makes the scores of the next masked tokens; None: the predictor's own."""
        if setting.dense or setting.method in LEARNED:
            return None
        if setting.method == "random":
            return random_scores(self._seed, request, *self._shapes)
        ranking = self.engine.controls(setting.method)
        return lambda tokens: (
            np.repeat(ranking.heads[None, None], tokens, axis=1),
            np.repeat(ranking.neurons[None, None], tokens, axis=1),
        )

    @cached_property
    def _shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Predicted layers and units of either kind."""
        model, sparsity = self.engine.manifest.model, self.engine.manifest.sparsity
        block = 1 if sparsity is None else sparsity.neuron_block
        return (model.layers - 1, model.heads), (model.layers - 1, -(-model.ffn // block))

    def _lacks(self, methods: Sequence[str]) -> Exception:
        target, sparsity = self.engine.manifest.target, self.engine.manifest.sparsity
        if sparsity is None:
            return InputError("a dense engine has no masks to control", hint="shadowc compile without --predictor none")
        references = [method for method in methods if method in REFERENCE_PROTOCOLS]
        if references:
            return UnsupportedError(
                f"{', '.join(references)}: a reference that torch alone can compute",
                hint="shadowc eval --model MODEL --predictor FOLDER",
            )
        if self.engine.manifest.tensorrt is None:
            if sparsity.select != "exact" or set(methods) & set(BY_THRESHOLD):
                return UnsupportedError(
                    f"{', '.join(methods)}: this engine was compiled with --select {sparsity.select} and has masks of "
                    f"method {', '.join(self.methods)}",
                    hint="compile with another --select, or shadowc eval --model MODEL --predictor FOLDER",
                )
            return InputError(
                f"{self.name} has no masks of method {', '.join(methods)}; it has: {', '.join(self.methods)}",
                hint="shadowc train --ranking FOLDER puts the ranking of another criterion into a predictor",
            )
        return UnsupportedError(
            f"{', '.join(methods)}: an engine for {target} takes scores from its own predictor only",
            hint="--methods predictor, or the same model compiled for --target cpu",
        )

    def _cannot(self, protocol: str) -> Exception:
        from shadowc.runtime.causal import SEQUENCE_FLAGS

        sparsity = self.engine.manifest.sparsity
        style = "shadow" if sparsity is None else sparsity.style
        if protocol == "paper":
            methods = "" if style == "shadow" else " --methods static,random"
            return UnsupportedError(
                "protocol 'paper' masks tokens by a later one, which no engine can do; it is for comparison only",
                hint=f"shadowc eval --model MODEL --predictor FOLDER --protocol paper{methods}",
            )
        if style != "shadow":
            return UnsupportedError(
                f"protocol 'prompt' fixes one mask for the whole sequence; a predictor of style {style} makes its "
                "masks layer by layer, for every token",
                hint="--protocol decode, or compile with a predictor of --style shadow and --mask sequence",
            )
        return UnsupportedError(
            "protocol 'prompt' fixes one mask for the whole sequence; this engine makes a mask for every token",
            hint=f"use --protocol decode, or compile with {SEQUENCE_FLAGS}",
        )


def ledger_of(manifest: EngineManifest, refresh: int) -> Ledger:
    """The bytes of an engine as they are stored."""
    attention, neurons = record_bytes(manifest)
    layers = manifest.model.layers
    return Ledger(
        layers, attention / layers, attention / layers / 2, attention / layers, neurons / layers,
        manifest.bytes_per_token.predictor, refresh,
    )  # fmt: skip
