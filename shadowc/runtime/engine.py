# SPDX-License-Identifier: Apache-2.0
"""The engine: text or token ids in, text, ids or logits out, and what it cost.

Letters: B rows, S tokens, Z masked tokens, V vocabulary, L predicted layers, H heads, N units of neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import numpy.typing as npt

from shadowc.runtime import prompts, stored, variants
from shadowc.runtime.decoder import Decoder, Outputs, ScoreSource
from shadowc.runtime.generation import greedy, limits_of, teacher_forced
from shadowc.runtime.mask_trace import SEEN, MaskTrace
from shadowc.runtime.probe import Probe
from shadowc.runtime.prompts import Batch, Ids
from shadowc.runtime.session import Session
from shadowc.runtime.stats import Meter, RunStats
from shadowc.runtime.stored import Ranking
from shadowc.runtime.stream import TextBatch
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from shadowc.runtime.library import OpLibrary
    from shadowc.spec.manifest import EngineManifest

Floats = npt.NDArray[np.float32]
Stream = Callable[[Any], object]
EvaluationProtocol = Literal["decode", "dense", "prompt"]

__all__ = ["Engine", "EvaluationProtocol", "MaskTrace", "Ranking", "Stream"]

_COUNTED = ("active.heads", "active.neurons", "read")


class Engine:
    """A loaded engine; `shadowc.load` makes it.

    Args:
        folder: the engine folder, already checked.
        manifest: its engine.json.
        session: the graph that runs.
        in_place: the graph may update its cache in place (all but the reference graph).
    """

    def __init__(self, folder: Path, manifest: EngineManifest, session: Session, *, in_place: bool = True) -> None:
        self.folder = folder
        self.manifest = manifest
        self._session = session
        self._in_place = in_place
        self._stats: RunStats | None = None

    def prepare(self) -> None:
        """Build the session now, so that what cannot run is told at once; otherwise the first run does.

        Raises:
            SetupError: the op library cannot be loaded.
            IncompatibleEngineError: this ONNX Runtime cannot run the graph.
        """
        _ = self._session.ort

    @property
    def threads(self) -> int:
        """Threads that the operators use."""
        return self._session.threads

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

    @cached_property
    def op_library(self) -> OpLibrary:
        """The installed op library."""
        from shadowc.runtime.library import OpLibrary

        return OpLibrary.installed()

    @overload
    def generate(
        self, prompt: str, max_new_tokens: int = ..., min_new_tokens: int = ...,
        density: float | Density | None = ..., stream: Stream | None = ..., attention_mask: object = ...,
    ) -> str: ...  # fmt: skip

    @overload
    def generate(
        self, prompt: list[str], max_new_tokens: int = ..., min_new_tokens: int = ...,
        density: float | Density | None = ..., stream: Stream | None = ..., attention_mask: object = ...,
    ) -> list[str]: ...  # fmt: skip

    @overload
    def generate(
        self, prompt: npt.NDArray[Any], max_new_tokens: int = ..., min_new_tokens: int = ...,
        density: float | Density | None = ..., stream: Stream | None = ..., attention_mask: object = ...,
    ) -> Ids: ...  # fmt: skip

    def generate(
        self,
        prompt: str | list[str] | npt.NDArray[Any],
        max_new_tokens: int = 64,
        min_new_tokens: int = 0,
        density: float | Density | None = None,
        stream: Stream | None = None,
        attention_mask: object = None,
    ) -> str | list[str] | Ids:
        """Continue prompts greedily; a row ends at the end token, at `max_new_tokens` or where the context ends.

        Args:
            prompt: a text, several texts, or token ids [B,S] (padding on the left).
            max_new_tokens: most tokens to add.
            min_new_tokens: the end token is not chosen before so many.
            density: share of the units to compute; a number for heads and neurons alike. None: the engine's own.
            stream: called with each new piece: text; for several texts a list of them; for ids the next ids [B].
            attention_mask: for ids, zeros, then ones in each row; None: leading pad tokens are padding.

        Returns:
            For text the new text (a list for several); for ids the ids [B,S+n], prompt included, and the pad token
            behind rows that ended early.

        Raises:
            InputError: an argument is out of range, or the prompt leaves no room in the context.
        """
        if max_new_tokens < 1 or not 0 <= min_new_tokens <= max_new_tokens:
            raise InputError(
                "expected max_new_tokens of at least 1 and min_new_tokens from 0 to that; "
                f"found {max_new_tokens} and {min_new_tokens}",
                hint="for example max_new_tokens=64, min_new_tokens=0",
            )
        chosen = self._density(density)
        model = self.manifest.model
        texts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            batch = prompts.from_ids(prompt, attention_mask, model)
            return np.concatenate(
                [batch.ids, self._generate(batch, max_new_tokens, min_new_tokens, chosen, stream)], axis=1
            )
        batch = prompts.from_texts(texts, self.tokenizer, model)
        show = stream
        if isinstance(prompt, str) and stream is not None:
            show = _only_row(stream)
        text = TextBatch(self.tokenizer, batch.ids, model.eos, show)
        self._generate(batch, max_new_tokens, min_new_tokens, chosen, text.push)
        rows = text.finish()
        return rows[0] if isinstance(prompt, str) else rows

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
            protocol: "decode": the first `prompt_tokens` are dense, each later token has its own mask, as in
                generation; "dense": no masks.
            prompt_tokens: real tokens of each row that stay dense under "decode"; None: 1.
            attention_mask: as in `generate`.
            scores: replaces the predictor: called with a number of masked tokens Z, returns scores of heads
                [1,Z,L,H] and of neuron units [1,Z,L,N] (or with B rows).

        Raises:
            InputError: an argument is out of range, or the ids are longer than the context.
            UnsupportedError: the protocol needs another kind of mask than the engine's.
        """
        session, outputs = self._session, ("logits", *_COUNTED)
        if scores is not None:
            session = self._scored_session
        logits, _ = self._teacher_forced(
            session, outputs, ids, self._density(density), protocol, prompt_tokens, attention_mask, scores
        )
        return logits

    def trace(
        self,
        ids: npt.NDArray[Any],
        density: float | Density | None = None,
        prompt_tokens: int | None = None,
        attention_mask: object = None,
    ) -> MaskTrace:
        """As `logits` under "decode", together with the scores and masks of every masked token.

        Raises:
            InputError: as `logits`, or the engine is dense.
        """
        self._require_sparse()
        logits, seen = self._teacher_forced(
            self._session, ("logits", "read", *SEEN), ids, self._density(density), "decode",
            prompt_tokens, attention_mask, None,
        )  # fmt: skip
        return MaskTrace.joined(logits, seen)

    def prober(self, outputs: Sequence[str] = ()) -> Callable[[], Probe]:
        """Return a maker of fresh sequences that are fed step by step and show inner tensors.

        Args:
            outputs: names of inner tensors; empty: the residual stream in front of and behind every layer.
        """
        model = self.manifest.model
        shown = self.with_outputs(list(outputs) or [f"residual.{layer}" for layer in range(model.layers + 1)])
        return lambda: Probe(shown._session, model, in_place=shown._in_place)

    def with_outputs(self, names: Sequence[str]) -> Engine:
        """The same engine with further inner tensors as graph outputs (for `probe`-like use)."""
        return self._variant(lambda model: variants.with_outputs(model, names))

    def with_skip_zeros(self, on: bool) -> Engine:
        """The same engine with `skip_zeros` switched on or off."""
        return self._variant(lambda model: variants.with_skip_zeros(model, on))

    def with_scope(self, scope: Literal["local", "global"]) -> Engine:
        """The same engine with units ranked within each layer, or over all layers."""
        self._require_sparse()
        other = self._variant(lambda model: variants.with_scope(model, scope))
        if self.manifest.sparsity is not None:
            changed = self.manifest.sparsity.model_copy(update={"scope": scope})
            other.manifest = self.manifest.model_copy(update={"sparsity": changed})
        return other

    def dense_twin(self) -> Engine:
        """The same weights without predictor and masks."""
        twin = self._variant(variants.dense)
        fixed = self.manifest.bytes_per_token.model_copy(update={"predictor": 0})
        twin.manifest = self.manifest.model_copy(update={"sparsity": None, "bytes_per_token": fixed})
        return twin

    def initialiser(self, name: str) -> npt.NDArray[Any]:
        """One stored tensor of the graph, as it lies in weights.bin.

        Raises:
            InputError: the graph has none of this name.
        """
        return stored.initialiser(self._session.load_model(), self.folder, name)

    def head_block(self) -> int:
        """Quantisation block of the LM head along its input; 0: it is float."""
        return stored.head_block(self._session.load_model())

    def neuron_orders(self) -> dict[int, npt.NDArray[np.int32]]:
        """Model layer -> order [F]: entry i is the checkpoint's neuron that became record i. Empty: none was moved."""
        return stored.neuron_orders(self.folder, self.manifest)

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

    def _generate(self, batch: Batch, most: int, least: int, density: Density, stream: Stream | None) -> Ids:
        model = self.manifest.model
        batch = batch.trimmed()
        prompts.check_length(batch, model, room=1)
        decoder = Decoder(self._session, model, batch, in_place=self._in_place)
        meter = Meter(self.manifest)
        new, finish = greedy(decoder, batch, limits_of(model, most, least), density, meter, stream)
        self._stats = meter.stats(new_tokens=new.shape[1], finish=finish)
        return new

    def _teacher_forced(
        self,
        session: Session,
        wanted: Iterable[str],
        ids: npt.NDArray[Any],
        density: Density,
        protocol: EvaluationProtocol,
        prompt_tokens: int | None,
        attention_mask: object,
        scores: ScoreSource | None,
    ) -> tuple[Floats, list[Outputs]]:
        model = self.manifest.model
        dense_tokens = self._dense_tokens(protocol, prompt_tokens)
        whole = prompts.from_ids(ids, attention_mask, model)
        batch = whole.trimmed()
        prompts.check_length(batch, model, room=0)
        decoder = Decoder(session, model, batch, in_place=self._in_place, scores=scores)
        meter, seen = Meter(self.manifest), []
        logits_BSV = np.zeros((whole.rows, whole.slots, model.vocab), np.float32)
        names = [name for name in wanted if name in session.outputs]
        for start, tail, outputs in teacher_forced(
            decoder, batch, density, meter, prompt_tokens=dense_tokens, outputs=names
        ):
            part_BSV = outputs.pop("logits")
            logits_BSV[:, whole.margin + start :][:, : part_BSV.shape[1]] = part_BSV
            if tail:
                seen.append(outputs)
        self._stats = meter.stats()
        return logits_BSV, seen

    def _dense_tokens(self, protocol: EvaluationProtocol, prompt_tokens: int | None) -> int | None:
        """Tokens of a row that stay dense; None: all."""
        if protocol == "prompt":
            raise UnsupportedError(
                "protocol 'prompt' fixes one mask for the whole sequence; this engine makes a mask for every token",
                hint="use protocol='decode'",
            )
        if protocol not in ("decode", "dense"):
            raise InputError(f"unknown protocol {protocol!r}", hint="use 'decode' or 'dense'")
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

    def _require_sparse(self) -> None:
        if self.manifest.sparsity is None:
            raise InputError(
                "this engine is dense: it has no predictor and no masks", hint="compile without --predictor none"
            )

    @cached_property
    def _scored_session(self) -> Session:
        return self._variant(variants.with_scores_as_inputs)._session

    def _variant(self, rewrite: Callable[[Any], Any]) -> Engine:
        model = rewrite(self._session.load_model())
        return Engine(self.folder, self.manifest, replace(self._session, model=model), in_place=self._in_place)


def _only_row(stream: Stream) -> Stream:
    return lambda pieces: stream(pieces[0])
