# SPDX-License-Identifier: Apache-2.0
"""What every engine offers, whatever runs its graph: text or token ids in, text, ids or logits out, and the cost.

Letters: B rows, S tokens, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import numpy.typing as npt

from shadowc.runtime import prompts, stored
from shadowc.runtime.decoder import AT_ONCE
from shadowc.runtime.generation import TokenDecoder, Watch, greedy, limits_of, teacher_forced
from shadowc.runtime.prompts import Batch, Ids
from shadowc.runtime.stats import Meter, RunStats
from shadowc.runtime.stored import Ranking
from shadowc.runtime.stream import TextBatch
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError, UnsupportedError
from shadowc.spec.whole import require_whole

if TYPE_CHECKING:
    from shadowc.runtime.decoder import Outputs, ScoreSource
    from shadowc.spec.manifest import EngineManifest, ModelPart, SparsityPart

Floats = npt.NDArray[np.float32]
Stream = Callable[[Any], object]
EvaluationProtocol = Literal["decode", "dense", "prompt"]


SEQUENCE_FLAGS = "--target cpu --mask sequence"
"""Flags of an engine whose masks hold for a sequence."""


class CausalEngine(ABC):
    """A loaded engine.

    Args:
        folder: the engine folder, already checked.
        manifest: its engine.json.
    """

    def __init__(self, folder: Path, manifest: EngineManifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._stats: RunStats | None = None

    @abstractmethod
    def _decoder(self, batch: Batch, slots: int, *, masks: bool = False) -> TokenDecoder:
        """A decoder for one batch that will hold at most so many slots, and shows its masks if they are wanted."""

    @abstractmethod
    def logits(
        self,
        ids: npt.NDArray[Any],
        density: float | Density | None = None,
        protocol: EvaluationProtocol = "decode",
        prompt_tokens: int | None = None,
        attention_mask: object = None,
        scores: ScoreSource | None = None,
    ) -> Floats:
        """Teacher-forced logits [B,S,V]: what the engine predicts after each of the given tokens.

        Args:
            ids: token ids [B,S].
            density: as in `generate`.
            protocol: "decode": the first `prompt_tokens` are dense, each later token has its own mask; "prompt": the
                last of them makes the mask of all later ones; "dense": no masks.
            prompt_tokens: real tokens of each row that stay dense under "decode" and "prompt"; None: 1.
            attention_mask: as in `generate`.
            scores: replaces the predictor: called with a number of masked tokens Z, returns scores of heads
                [1,Z,L,H] and of neuron units [1,Z,L,N] (or with B rows).

        Raises:
            InputError: an argument is out of range, the ids are longer than the context, or no memory is there for
                keys and values.
            UnsupportedError: the protocol needs another kind of mask than the engine's, or its graph takes no scores.
        """

    @property
    def model(self) -> ModelPart:
        """The model's facts, with the context that this engine can hold."""
        return self.manifest.model

    @property
    def density(self) -> Density:
        """What is used when the caller names no density."""
        sparsity = self.manifest.sparsity
        return Density() if sparsity is None else Density(sparsity.head_density, sparsity.neuron_density)

    @property
    def last_stats(self) -> RunStats:
        """What the last `generate` or `logits` did.

        Raises:
            InputError: neither was called yet.
        """
        if self._stats is None:
            raise InputError("nothing has run yet", hint="call generate or logits first")
        return self._stats

    @cached_property
    def tokenizer(self) -> Any:
        """Callable as transformers' tokenizers are.

        Raises:
            InputError: the folder holds no tokenizer.
        """
        from shadowc.checkpoint.tokenizer import load_tokenizer

        return load_tokenizer(self.folder)

    @overload
    def generate(
        self, prompt: str, max_new_tokens: int = ..., min_new_tokens: int = ...,
        density: float | Density | None = ..., stream: Stream | None = ..., attention_mask: object = ...,
        watch: Watch | None = ..., stream_every: int = ...,
    ) -> str: ...  # fmt: skip

    @overload
    def generate(
        self, prompt: list[str], max_new_tokens: int = ..., min_new_tokens: int = ...,
        density: float | Density | None = ..., stream: Stream | None = ..., attention_mask: object = ...,
        watch: Watch | None = ..., stream_every: int = ...,
    ) -> list[str]: ...  # fmt: skip

    @overload
    def generate(
        self, prompt: npt.NDArray[Any], max_new_tokens: int = ..., min_new_tokens: int = ...,
        density: float | Density | None = ..., stream: Stream | None = ..., attention_mask: object = ...,
        watch: Watch | None = ..., stream_every: int = ...,
    ) -> Ids: ...  # fmt: skip

    def generate(
        self,
        prompt: str | list[str] | npt.NDArray[Any],
        max_new_tokens: int = 64,
        min_new_tokens: int = 0,
        density: float | Density | None = None,
        stream: Stream | None = None,
        attention_mask: object = None,
        watch: Watch | None = None,
        stream_every: int = 1,
    ) -> str | list[str] | Ids:
        """Continue prompts greedily; a row ends at the end token, at `max_new_tokens` or where the context ends.

        Args:
            prompt: a text, several texts, or token ids [B,S] (padding on the left).
            max_new_tokens: most tokens to add.
            min_new_tokens: the end token is not chosen before so many.
            density: share of the units to compute; a number for heads and neurons alike. None: the engine's own.
            stream: called with each new piece: text; for several texts a list of them; for ids the next ids [B].
            attention_mask: for ids, zeros, then ones in each row; None: leading pad tokens are padding.
            watch: called with the masks of every new token but the first, which the prompt's dense pass gives.
            stream_every: with `stream`, tokens that may be computed before it is told of them, up to 8; without one it
                is 8. That saves some 0.3 ms of each token of a single prompt, where the CPU runs the whole graph as one
                chain (int8, int4 and bf16 weights) and nobody watches.

        Returns:
            For text the new text (a list for several); for ids the ids [B,S+n], prompt included, and the pad token
            behind rows that ended early.

        Raises:
            InputError: an argument is out of range, the prompt leaves no room in the context, there are no masks, or no
                memory for keys and values.
            UnsupportedError: the engine's target does not show its masks.
        """
        if watch is not None:
            self._require_sparse()
        require_whole(max_new_tokens=max_new_tokens, min_new_tokens=min_new_tokens, stream_every=stream_every)
        if stream_every < 1:
            raise InputError(f"stream_every is {stream_every}, expected at least 1", hint="use stream_every=1")
        if max_new_tokens < 1 or not 0 <= min_new_tokens <= max_new_tokens:
            raise InputError(
                "expected max_new_tokens of at least 1 and min_new_tokens from 0 to that; "
                f"found {max_new_tokens} and {min_new_tokens}",
                hint="for example max_new_tokens=64, min_new_tokens=0",
            )
        chosen, at_once = self._density(density), AT_ONCE if stream is None else stream_every
        model = self.model
        texts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            batch = prompts.from_ids(prompt, attention_mask, model)
            return np.concatenate(
                [batch.ids, self._generate(batch, max_new_tokens, min_new_tokens, chosen, at_once, stream, watch)],
                axis=1,
            )
        if attention_mask is not None:
            raise InputError("attention_mask belongs to ids, the prompt is text", hint="leave attention_mask out")
        batch = prompts.from_texts(texts, self.tokenizer, model)
        show = stream
        if isinstance(prompt, str) and stream is not None:
            show = _only_row(stream)
        text = TextBatch(self.tokenizer, batch.ids, model.eos, show)
        self._generate(batch, max_new_tokens, min_new_tokens, chosen, at_once, text.push, watch)
        rows = text.finish()
        return rows[0] if isinstance(prompt, str) else rows

    def controls(self, method: str) -> Ranking:
        """The constant scores of a control that was stored when the predictor was trained.

        Raises:
            InputError: the engine has none of this name.
        """
        return stored.control(self.folder, self.manifest, method)

    def refuse_calibration_text(self, text: str) -> None:
        """Refuse to be evaluated on the text that its predictor was calibrated on.

        Raises:
            InputError: it is that text, or shares paragraphs with it.
        """
        sparsity = self.manifest.sparsity
        if sparsity is None:
            return
        from shadowc.sparsity.fingerprint import fingerprint, refuse_if_calibrated

        refuse_if_calibrated(fingerprint(text.encode(), [text]), sparsity.predictor)

    def _generate(
        self, batch: Batch, most: int, least: int, density: Density, at_once: int, stream: Stream | None,
        watch: Watch | None,
    ) -> Ids:  # fmt: skip
        model = self.model
        batch = batch.trimmed()
        prompts.check_length(batch, model, room=1)
        limits = limits_of(model, most, least)
        meter = Meter(self.manifest)
        decoder = self._decoder(batch, min(batch.slots + most, model.positions), masks=watch is not None)
        new, finish = greedy(decoder, batch, limits, density, meter, stream, watch, at_once)
        self._stats = meter.stats(new_tokens=new.shape[1], finish=finish)
        return new

    def _teacher_forced(
        self,
        decoder_of: Callable[[Batch], TokenDecoder],
        outputs: Iterable[str],
        ids: npt.NDArray[Any],
        density: Density,
        protocol: EvaluationProtocol,
        prompt_tokens: int | None,
        attention_mask: object,
    ) -> tuple[Floats, list[Outputs]]:
        """Logits [B,S,V] of all tokens, and the other outputs of every run with masked tokens."""
        model = self.model
        dense_tokens = self._dense_tokens(protocol, prompt_tokens)
        whole = prompts.from_ids(ids, attention_mask, model)
        batch = whole.trimmed()
        prompts.check_length(batch, model, room=0)
        meter, seen = Meter(self.manifest), []
        logits_BSV = np.zeros((whole.rows, whole.slots, model.vocab), np.float32)
        for start, tail, result in teacher_forced(
            decoder_of(batch), batch, density, meter, prompt_tokens=dense_tokens, outputs=tuple(outputs)
        ):
            part_BSV = result.pop("logits")
            logits_BSV[:, whole.margin + start :][:, : part_BSV.shape[1]] = part_BSV
            if tail:
                seen.append(result)
        self._stats = meter.stats()
        return logits_BSV, seen

    def _dense_tokens(self, protocol: EvaluationProtocol, prompt_tokens: int | None) -> int | None:
        """Tokens of a row that stay dense; None: all."""
        if protocol == "prompt":
            raise UnsupportedError(
                "protocol 'prompt' fixes one mask for the whole sequence; this engine makes a mask for every token",
                hint=f"use protocol='decode', or compile with {SEQUENCE_FLAGS}",
            )
        if protocol not in ("decode", "dense"):
            raise InputError(f"unknown protocol {protocol!r}", hint="use 'decode', 'prompt' or 'dense'")
        require_whole(prompt_tokens=0 if prompt_tokens is None else prompt_tokens)
        if prompt_tokens is not None and prompt_tokens < 0:
            raise InputError(f"prompt_tokens is {prompt_tokens}, expected at least 0", hint="use prompt_tokens=1")
        if protocol == "dense" or self.manifest.sparsity is None:
            return None
        return 1 if prompt_tokens is None else prompt_tokens

    def _density(self, density: float | Density | None) -> Density:
        if density is None:
            return self.density
        chosen = Density.of(density)
        if chosen != Density():
            self._require_sparse()
        return chosen

    def _require_sparse(self) -> SparsityPart:
        if self.manifest.sparsity is None:
            raise InputError(
                "this engine is dense: it has no predictor and no masks", hint="compile without --predictor none"
            )
        return self.manifest.sparsity


def _only_row(stream: Stream) -> Stream:
    return lambda pieces: stream(pieces[0])
