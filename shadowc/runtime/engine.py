# SPDX-License-Identifier: Apache-2.0
"""The engine of target cpu: a session of ONNX Runtime, and the variants of its graph.

Letters: B rows, S tokens, Z masked tokens, V vocabulary, L predicted layers, H heads, N units of neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from shadowc.runtime import stored, variants
from shadowc.runtime.causal import CausalEngine, EvaluationProtocol, Floats, Stream
from shadowc.runtime.decoder import Decoder, Outputs, ScoreSource
from shadowc.runtime.mask_trace import SEEN, MaskTrace
from shadowc.runtime.probe import Probe
from shadowc.runtime.prompts import Batch
from shadowc.runtime.session import Session
from shadowc.runtime.stored import Ranking
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError, UnsupportedError
from shadowc.spec.tensors import COUNTED, rows_of_tables

if TYPE_CHECKING:
    import onnx

    from shadowc.runtime.library import OpLibrary
    from shadowc.runtime.recording import Run
    from shadowc.runtime.weights_memory import WeightsMemory
    from shadowc.spec.manifest import EngineManifest

__all__ = ["Engine", "EvaluationProtocol", "MaskTrace", "Ranking", "Stream"]


class Engine(CausalEngine):
    """A loaded engine of target cpu; `shadowc.load` makes it.

    Args:
        folder: the engine folder, already checked.
        manifest: its engine.json.
        session: the graph that runs.
        in_place: the graph may update its cache in place (all but the reference graph).
    """

    def __init__(self, folder: Path, manifest: EngineManifest, session: Session, *, in_place: bool = True) -> None:
        super().__init__(folder, manifest)
        self._session = session
        self._in_place = in_place

    def prepare(self) -> None:
        """Build the session now, so that what cannot run is told at once; otherwise the first run does.

        Raises:
            SetupError: the op library cannot be loaded.
            IncompatibleEngineError: this ONNX Runtime cannot run the graph.
        """
        _ = self._generating.ort, self._tables  # while the folder is where it was

    @property
    def threads(self) -> int:
        """Threads that the operators use."""
        return self._session.threads

    @property
    def weights(self) -> WeightsMemory | None:
        """Where the weights lie in memory."""
        return self._session.weights

    @cached_property
    def op_library(self) -> OpLibrary:
        """The installed op library."""
        from shadowc.runtime.library import OpLibrary

        return OpLibrary.installed()

    def logits(
        self,
        ids: npt.NDArray[Any],
        density: float | Density | None = None,
        protocol: EvaluationProtocol = "decode",
        prompt_tokens: int | None = None,
        attention_mask: object = None,
        scores: ScoreSource | None = None,
    ) -> Floats:
        """See CausalEngine.logits."""
        session, outputs = self._generating, ("logits", *COUNTED)
        if scores is not None:
            self._require_ranks("scores of the caller's own")
            session = self._scored_session
        logits, _ = self._forced(
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
            InputError: as `logits`, the engine is dense, or no token is behind the dense ones.
        """
        self._require_sparse()
        logits, seen = self._forced(
            self._showing, ("logits", "read", *SEEN), ids, self._density(density), "decode",
            prompt_tokens, attention_mask, None,
        )  # fmt: skip
        if not seen:
            raise InputError(
                f"none of the {logits.shape[1]} tokens is under a mask, so there is nothing to trace",
                hint="give more tokens than prompt_tokens (1, unless said otherwise)",
            )
        return MaskTrace.joined(logits, seen)

    def prober(self, outputs: Sequence[str] = ()) -> Callable[[], Probe]:
        """Return a maker of fresh sequences that are fed step by step and show inner tensors.

        Args:
            outputs: names of inner tensors; empty: the residual stream in front of and behind every layer.
        """
        model = self.manifest.model
        shown = self.with_outputs(list(outputs) or [f"residual.{layer}" for layer in range(model.layers + 1)])
        return lambda: Probe(shown._showing, model, in_place=shown._in_place, tables=shown._tables)

    def with_outputs(self, names: Sequence[str]) -> Engine:
        """The same engine with further inner tensors as graph outputs (for `probe`-like use)."""
        return self._variant(lambda model: variants.with_outputs(model, names))

    def with_skip_zeros(self, on: bool) -> Engine:
        """The same engine with `skip_zeros` switched on or off."""
        return self._variant(lambda model: variants.with_skip_zeros(model, on))

    def with_scope(self, scope: Literal["local", "global"]) -> Engine:
        """The same engine with units ranked within each layer, or over all layers.

        Raises:
            InputError: the engine is dense.
            UnsupportedError: it has thresholds, or its layers have selections of their own.
        """
        self._require_ranks("another scope")
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

    def profiled(self, folder: Path) -> Engine:
        """The same engine under ONNX Runtime's profiler, which writes into `folder`; slower. See `recordings`."""
        return Engine(self.folder, self.manifest, replace(self._session, profile=folder), in_place=self._in_place)

    def recordings(self) -> tuple[tuple[Run, ...], ...]:
        """Of a profiled engine, the runs of each of its graphs, the one that runs once per token in front.

        It can be asked for once, and ends the profile.
        """
        return (self._generating.recording(),)

    def initialiser(self, name: str) -> npt.NDArray[Any]:
        """One stored tensor of the graph, as it lies in weights.bin.

        Raises:
            InputError: the graph has none of this name.
        """
        return stored.initialiser(self._stored_graph, self.folder, name)

    def graph(self) -> onnx.ModelProto:
        """The graph that makes a mask for every token, without its weights; do not change it."""
        return self._stored_graph

    def neuron_orders(self) -> dict[int, npt.NDArray[np.int32]]:
        """Model layer -> order [F]: entry i is the checkpoint's neuron that became record i. Empty: none was moved."""
        return stored.neuron_orders(self.folder, self.manifest)

    def head_means(self) -> dict[int, npt.NDArray[np.float32]]:
        """Model layer -> mean contexts of its heads [H,D], which skipped heads leave. Empty: they leave zero."""
        return stored.head_means(self.folder, self.manifest)

    def _decoder(self, batch: Batch, slots: int, *, masks: bool = False) -> Decoder:
        session, shown = (self._showing, self._units) if masks else (self._generating, None)
        return Decoder(
            session, self.manifest.model, batch,
            likely=slots, in_place=self._in_place, shown=shown, tables=self._tables,
        )  # fmt: skip

    @cached_property
    def _stored_graph(self) -> onnx.ModelProto:
        return self._session.load_model()

    @cached_property
    def _showing(self) -> Session:
        """The graph for those who look at scores and thresholds."""
        return replace(self._session, model=variants.told(self._stored_graph))

    @cached_property
    def _generating(self) -> Session:
        """The graph for those who look at no scores."""
        model = self._showing.load_model()
        fewer = variants.without_joined_scores(model)
        same = len(fewer.graph.output) == len(model.graph.output)
        return self._showing if same else replace(self._showing, model=fewer)

    @cached_property
    def _tables(self) -> dict[str, tuple[str, Floats]]:
        """Input of these graphs -> the density and the table of which it is the rows, see Decoder."""
        graph, weights = self._stored_graph.graph, self._session.weights
        rows = rows_of_tables(name for node in graph.node for name in node.output)
        if not rows:
            return {}
        assert weights is not None  # so `load_cpu` made the session
        stored = {tensor.name: tensor for tensor in graph.initializer}
        return {
            name: (f"density_{table.partition('.')[2]}", weights.floats(stored[table])) for name, table in rows.items()
        }

    @property
    def _units(self) -> dict[str, int]:
        """Units of a layer."""
        model = self.manifest.model
        return {"heads": model.heads, "neurons": -(-model.ffn // self._require_sparse().neuron_block)}

    def _forced(
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
        def decoder_of(batch: Batch) -> Decoder:
            return Decoder(
                session, self.manifest.model, batch,
                likely=batch.slots, in_place=self._in_place, scores=scores, tables=self._tables,
            )  # fmt: skip

        names = [name for name in wanted if name in session.outputs]
        return self._teacher_forced(decoder_of, names, ids, density, protocol, prompt_tokens, attention_mask)

    @cached_property
    def _scored_session(self) -> Session:
        return rewritten(self._session, variants.with_scores_as_inputs)

    def _require_ranks(self, what: str) -> None:
        """Refuse what an engine whose thresholds are calibrated cannot do."""
        select = self._require_sparse().select
        if select != "exact":
            raise UnsupportedError(
                f"this engine was compiled with --select {select}: its thresholds belong to its predictor's scores and "
                f"its scope, so it cannot take {what}",
                hint="shadowc compile --select exact",
            )

    def _variant(self, rewrite: Callable[[Any], Any]) -> Engine:
        return Engine(self.folder, self.manifest, rewritten(self._session, rewrite), in_place=self._in_place)


def rewritten(session: Session, rewrite: Callable[[Any], Any]) -> Session:
    """The session of a graph that was changed."""
    return replace(session, model=rewrite(session.load_model()))
