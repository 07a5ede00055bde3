# SPDX-License-Identifier: Apache-2.0
"""The engine of target cpu whose masks hold for a sequence: two graphs over one weights.bin.

decode_fixed.onnx does everything but the masks, prompts included; of model.onnx only the part that makes scores is
kept in memory. So no weight that ONNX Runtime stores in a form of its own (the LM head) is there twice. The selection
of decode_fixed.onnx is a session of its own, since it has to run once per mask and not per token.

Letters: B rows, S tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from shadowc.runtime import variants
from shadowc.runtime.engine import Engine, rewritten
from shadowc.runtime.probe import SequenceProbe
from shadowc.runtime.sequence import SELECTED, Graphs, SequenceDecoder
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError
from shadowc.spec.tensors import COUNTED
from shadowc.spec.whole import require_whole

if TYPE_CHECKING:
    import onnx

    from shadowc.runtime.causal import EvaluationProtocol, Floats
    from shadowc.runtime.decoder import ScoreSource
    from shadowc.runtime.prompts import Batch, Ids
    from shadowc.runtime.recording import Run
    from shadowc.runtime.session import Session
    from shadowc.spec.manifest import EngineManifest


class SequenceEngine(Engine):
    """A loaded engine whose masks hold for a sequence; `shadowc.load` makes it.

    Args:
        folder: the engine folder, already checked.
        manifest: its engine.json.
        session: model.onnx; built only for what needs a mask per token.
        fixed: decode_fixed.onnx, which writes K/V of all heads if `refresh` is not 0.
        refresh: see SequenceDecoder.
        in_place: see Engine.
    """

    def __init__(
        self,
        folder: Path,
        manifest: EngineManifest,
        session: Session,
        fixed: Session,
        *,
        refresh: int = 0,
        in_place: bool = True,
    ) -> None:
        super().__init__(folder, manifest, session, in_place=in_place)
        self._fixed = fixed
        self.refresh = refresh

    def prepare(self) -> None:
        """See Engine.prepare."""
        _ = [session.ort for session in (self._graphs.decoding, self._graphs.selecting, self._graphs.predicting)]

    def per_token(self) -> Engine:
        """The engine of the same folder that makes a mask for every token."""
        changed = self._require_sparse().model_copy(update={"mask": "token", "refresh": 0})
        manifest = self.manifest.model_copy(update={"sparsity": changed})
        return Engine(self.folder, manifest, self._session, in_place=self._in_place)

    def logits(
        self,
        ids: npt.NDArray[Any],
        density: float | Density | None = None,
        protocol: EvaluationProtocol = "decode",
        prompt_tokens: int | None = None,
        attention_mask: object = None,
        scores: ScoreSource | None = None,
    ) -> Floats:
        """See CausalEngine.logits; "decode" and "dense" run on model.onnx, which is loaded for them."""
        if protocol != "prompt":
            return super().logits(ids, density, protocol, prompt_tokens, attention_mask, scores)
        dense_tokens = 1 if prompt_tokens is None else prompt_tokens
        if dense_tokens < 1:
            raise InputError(
                "a mask for a whole sequence is made by the last token of its prompt; prompt_tokens is "
                f"{dense_tokens}, expected at least 1",
                hint="use prompt_tokens=1",
            )

        def decoder_of(batch: Batch) -> SequenceDecoder:
            ends_B = np.minimum(batch.starts + dense_tokens, batch.slots)
            return self._sequence_decoder(batch, ends_B - 1, scores, likely=batch.slots)

        names = [name for name in ("logits", *COUNTED) if name in (*self._graphs.decoding.outputs, *SELECTED)]
        logits_BSV, _ = self._teacher_forced(
            decoder_of, names, ids, self._density(density), protocol, dense_tokens, attention_mask
        )
        return logits_BSV

    def fixed_graph(self) -> onnx.ModelProto:
        """decode_fixed.onnx, without its weights; do not change it."""
        return self._fixed.load_model()

    def fixed_prober(self, outputs: Sequence[str] = (), *, every_head: bool = True) -> Callable[[], SequenceProbe]:
        """Return a maker of fresh sequences that show inner tensors, under a mask that holds till the end.

        Args:
            outputs: names of inner tensors; empty: the residual stream in front of and behind every layer.
            every_head: K/V of all heads are written, so that what the cache holds can be compared too; no inactive
                head reads them. False: those that the graph writes as it is.
        """
        names = list(outputs) or [f"residual.{layer}" for layer in range(self.manifest.model.layers + 1)]
        fixed = rewritten(self._fixed, lambda graph: variants.with_outputs(graph, names))
        if every_head:
            fixed = rewritten(fixed, lambda graph: variants.with_kv(graph, "all"))
        shown = SequenceEngine(self.folder, self.manifest, self._session, fixed, in_place=self._in_place)
        return lambda: SequenceProbe(shown._sequence_decoder, (*shown._graphs.decoding.outputs, *SELECTED))

    def with_outputs(self, names: Sequence[str]) -> Engine:
        """The engine with a mask per token, with further inner tensors as graph outputs."""
        return self.per_token().with_outputs(names)

    def dense_twin(self) -> Engine:
        """See Engine.dense_twin."""
        return self.per_token().dense_twin()

    def profiled(self, folder: Path) -> SequenceEngine:
        """See Engine.profiled."""
        session, fixed = (replace(one, profile=folder) for one in (self._session, self._fixed))
        return SequenceEngine(self.folder, self.manifest, session, fixed, refresh=self.refresh, in_place=self._in_place)

    def recordings(self) -> tuple[tuple[Run, ...], ...]:
        """See Engine.recordings; behind the decoding graph those that make scores and select."""
        graphs = self._graphs
        return tuple(session.recording() for session in (graphs.decoding, graphs.predicting, graphs.selecting))

    def with_refresh(self, refresh: int) -> SequenceEngine:
        """The same engine whose masks are made anew every `refresh` tokens; 0: never.

        Raises:
            InputError: `refresh` is negative or not whole.
        """
        require_whole(refresh=refresh)
        if refresh < 0:
            raise InputError(f"refresh is {refresh}, expected at least 0", hint="refresh=0 keeps the prompt's mask")
        kv = "all" if refresh else "active"
        fixed = rewritten(self._fixed, lambda graph: variants.with_kv(graph, kv))
        return SequenceEngine(
            self.folder, self.manifest, self._session, fixed, refresh=refresh, in_place=self._in_place
        )

    @cached_property
    def _graphs(self) -> Graphs:
        return Graphs(
            predicting=rewritten(self._session, variants.predicting),
            selecting=rewritten(self._fixed, variants.selecting),
            decoding=rewritten(self._fixed, lambda graph: variants.told(variants.with_thresholds_as_inputs(graph))),
        )

    def _decoder(self, batch: Batch, slots: int, *, masks: bool = False) -> SequenceDecoder:
        return self._sequence_decoder(batch, np.full(batch.rows, batch.slots - 1), likely=slots)

    def _sequence_decoder(
        self, batch: Batch, origins_B: Ids, control: ScoreSource | None = None, *, likely: int = 0
    ) -> SequenceDecoder:
        return SequenceDecoder(
            self._graphs, self.manifest.model, batch, units=self._units, origins_B=origins_B,
            refresh=self.refresh, likely=likely, in_place=self._in_place, control=control,
        )  # fmt: skip

    def _dense_tokens(self, protocol: EvaluationProtocol, prompt_tokens: int | None) -> int | None:
        return super()._dense_tokens("decode" if protocol == "prompt" else protocol, prompt_tokens)

    def _variant(self, rewrite: Callable[[Any], Any]) -> SequenceEngine:
        session, fixed = (rewritten(one, rewrite) for one in (self._session, self._fixed))
        return SequenceEngine(self.folder, self.manifest, session, fixed, refresh=self.refresh, in_place=self._in_place)
