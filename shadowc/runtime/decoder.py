# SPDX-License-Identifier: Apache-2.0
"""One batch of sequences moving through a session: cache, masks, bound buffers.

Letters: B rows, S new tokens, Z masked tokens of them, P slots of the mask, V vocabulary, L predicted layers,
H heads, D head size, N units of neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from shadowc.runtime.cache import KvCache
from shadowc.runtime.mask_trace import TokenMasks
from shadowc.runtime.prompts import Batch, Ids
from shadowc.spec.density import UNIT_KINDS
from shadowc.spec.errors import InternalError
from shadowc.spec.program import GRID
from shadowc.spec.tensors import BANNED, END, LOGITS_FROM, MASK, NEXT, PAST, RUNS, START, TAIL, TOKEN

if TYPE_CHECKING:
    from shadowc.runtime.session import Binding, Session

Floats = npt.NDArray[np.float32]
Outputs = dict[str, npt.NDArray[Any]]
Times = dict[str, Ids]
Tables = Mapping[str, tuple[str, Floats]]
"""Input of a graph -> the density and the table [GRID + 1,L] of which it is the rows [B,L]."""
ScoreSource = Callable[[int], tuple[Floats, Floats]]
"""Number of masked tokens Z -> scores of heads [1 or B,Z,L,H] and of neuron units [1 or B,Z,L,N]."""

CHUNK_TOKENS = 128
"""Tokens per run, all rows together at most twice that: bounds the memory of logits and scores."""
PROMPT_CHUNKS = 4
"""Of a prompt, which needs the logits of its last token only, so many chunks are one run: weights pass once for all."""
AT_ONCE = 8
"""Tokens that one run of a graph may compute: of the 0.4 ms between two runs each has an eighth."""
NO_ID = -1
AUTOMATIC = -1
"""sparse_tail: one masked token when one token comes in, none otherwise."""


def chunks(start: int, stop: int, rows: int, times: int = 1) -> Iterator[tuple[int, int]]:
    """Pieces of `start..stop` of bounded size, `times` that of CHUNK_TOKENS; many rows make them shorter."""
    size = max(min(CHUNK_TOKENS, 2 * CHUNK_TOKENS // rows), 1) * times
    return ((at, min(at + size, stop)) for at in range(start, stop, size))


class ModelSizes(Protocol):
    """What a decoder needs to know; OptFacts and the manifest's ModelPart both say it."""

    @property
    def layers(self) -> int: ...  # noqa: D102
    @property
    def heads(self) -> int: ...  # noqa: D102
    @property
    def head_size(self) -> int: ...  # noqa: D102
    @property
    def vocab(self) -> int: ...  # noqa: D102
    @property
    def positions(self) -> int: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class TokensRun:
    """What one run of several tokens gave."""

    ids: list[int]
    """The token that each of them chose, in order."""
    outputs: Outputs
    """Counts, one row of one token for each; overwritten by the next run."""
    predictions: int
    """So many of them asked the predictor."""


class Decoder:
    """Feeds tokens of one batch, in order.

    Args:
        session: the graph.
        model: its sizes.
        batch: where each row starts; only `starts` and the number of rows are used.
        likely, in_place: see KvCache.
        scores: for a graph whose scores are inputs.
        shown: units of a layer, "heads" and "neurons", if `masks` will be asked for; None: it will not.
        tables: what the graph asks for in place of densities.
    """

    def __init__(
        self,
        session: Session,
        model: ModelSizes,
        batch: Batch,
        *,
        likely: int = 0,
        in_place: bool = True,
        scores: ScoreSource | None = None,
        shown: Mapping[str, int] | None = None,
        tables: Tables | None = None,
    ) -> None:
        self._session = session
        self._batch = batch
        self._model = model
        self._scores = scores
        self._shown = shown or {}
        self._inputs: Mapping[str, npt.NDArray[Any]] = {}
        """Further inputs of the graph; a step reads what the arrays hold when it runs."""
        self._cache = KvCache(
            model.layers,
            (batch.rows, model.heads, model.head_size),
            model.positions,
            likely=likely,
            dtype=session.cache_type,
            in_place=in_place,
        )
        self._density = {name: np.ones(batch.rows, np.float32) for name in ("density_heads", "density_neurons")}
        self._tables = tables or {}
        self._rows = {
            name: np.zeros((batch.rows, table.shape[1]), np.float32) for name, (_, table) in self._tables.items()
        }
        self._look_up()
        self._whole_mask: Ids = np.zeros((batch.rows, 0), np.int64)
        self._step: Binding | None = None
        self._many = RUNS in session.inputs and batch.rows == 1 and in_place and scores is None and not self._shown
        self._runs: Ids = np.array([AT_ONCE if self._many else 1, 1], np.int64)
        self._ends: Times = {name: np.array([NO_ID], np.int64) for name in (BANNED, END)}
        self._step_ids: Ids = np.zeros((batch.rows, 1), np.int64)
        self._step_times: Times = {}
        self._last_start = int(batch.starts.max())
        self._step_outputs: Outputs = {}
        self._run_outputs: Outputs = {}
        """Of all tokens of a run; the former are the first token's."""

    predicts = True
    """Whether the last run asked the predictor."""

    @property
    def at_once(self) -> int:
        """Most tokens of `run_on`; 1: there is `step` alone."""
        return int(self._runs[0])

    @property
    def filled(self) -> int:
        """Slots in the cache."""
        return self._cache.filled

    def cached(self, start: int) -> Outputs:
        """A copy of keys and values from slot `start` on, `{layer}.key` and `{layer}.value` [B,slots,H,D]."""
        return self._cache.slots(start)

    def masks(self) -> TokenMasks:
        """What the last step computed; the decoder was made to show it."""
        outputs = self._step_outputs
        found = {part: {kind: outputs[f"{part}.{kind}"] for kind in UNIT_KINDS} for part in ("scores", "threshold")}
        return TokenMasks.of(found["scores"], found["threshold"])

    def set_density(self, heads: float | Floats, neurons: float | Floats) -> None:
        """Set the density of all rows (a number) or of each row ([B]); it holds from the next run on."""
        self._density["density_heads"][:] = heads
        self._density["density_neurons"][:] = neurons
        self._look_up()

    def mute(self, row: int) -> None:
        """Compute as little as possible for a finished row from now on."""
        for values in self._density.values():
            values[row] = 0.0
        self._look_up()

    def reorder(self, rows_B: npt.NDArray[np.integer[Any]]) -> None:
        """Let row b go on from where row rows_B[b] is; both must have the same padding, as beams of a prompt have."""
        starts_B = self._batch.starts
        if (starts_B[rows_B] != starts_B).any():
            raise InternalError("rows of different padding were exchanged; beams stay within their prompt")
        self._cache.reorder(rows_B)
        for values in self._density.values():
            values[:] = values[rows_B]
        self._look_up()

    def prefill(self, ids_BS: Ids) -> Floats:
        """Run a prompt without masks; returns the logits [B,V] after its last token."""
        outputs: Outputs = {}
        B, S = ids_BS.shape
        self._begin_prompt(S)
        for start, stop in chunks(0, S, B, PROMPT_CHUNKS):
            wanted = ("logits",) if stop == S else ()
            outputs = self.feed(ids_BS[:, start:stop], sparse_tail=0, outputs=wanted, logits_from=-1)
        return np.ascontiguousarray(outputs["logits"][:, -1], np.float32)

    def prompt_logits(self, ids_BS: Ids) -> Floats:
        """Run a prompt without masks; returns the logits [B,S,V] after each of its tokens."""
        self._begin_prompt(ids_BS.shape[1])
        return np.asarray(self.feed(ids_BS, sparse_tail=0, outputs=("logits",))["logits"], np.float32)

    def feed(self, ids_BS: Ids, *, sparse_tail: int, outputs: Sequence[str], logits_from: int = 0) -> Outputs:
        """Run any number of tokens and return the named outputs; logits from one of them on (below 0: from the end)."""
        S = ids_BS.shape[1]
        self._reserve(S)
        binding = self._bind(ids_BS, sparse_tail, logits_from)
        for name in outputs:
            binding.take(name)
        self._cache.bind(binding)
        values = binding.run()[: len(outputs)]
        self._cache.advance(S)
        self._step = None  # its buffers may have been replaced
        return {name: value.numpy() for name, value in zip(outputs, values, strict=True)}

    def step(self, ids_B: Ids) -> Outputs:
        """Run one masked token per row; the arrays returned are overwritten by the next step."""
        self._reserve(1)
        self._run_step(ids_B, 1)
        if self._cache.advance(1):
            assert self._step is not None
            self._cache.bind(self._step)
        return self._step_outputs

    def run_on(self, token: int, most: int, *, end: int, banned: int = NO_ID) -> TokensRun:
        """Run a masked token of the only row and go on from the largest logit, `most` tokens in one run.

        Args:
            token: id of the first.
            most: 1 to `at_once`.
            end: id behind which there are none; NO_ID: there is none.
            banned: id that is not chosen; NO_ID: all may be.
        """
        self._reserve(most)
        self._ends[END][0], self._ends[BANNED][0] = end, banned
        self._run_step(np.array([token]), most)
        ids = self._run_outputs[NEXT][:most, 0].tolist()
        count = ids.index(end) + 1 if end in ids else most
        self._cache.advance(count)
        rows = {name: self._run_outputs[name][: count * len(one)] for name, one in self._step_outputs.items()}
        rows.pop("logits")
        return TokensRun(ids[:count], rows, count * self.predicts)

    def _run_step(self, ids_B: Ids, runs: int) -> None:
        """Run the graph of a step so many times."""
        self._step_ids[:, 0] = ids_B
        self._runs[1] = runs
        if self._step is None:
            self._step = self._bind_step()
        else:
            self._move_on()
            self._bind_scores(self._step, 1)
        self._step.run_in_place()

    def _begin_prompt(self, tokens: int) -> None:
        """So many tokens of a prompt come next; nothing is kept of where it ends."""

    def _reserve(self, tokens: int) -> None:
        """Make room in the cache for so many more tokens."""
        if self._cache.reserve(self.filled + tokens):
            self._step = None

    def _look_up(self) -> None:
        """The rows of tables that the densities, 0 to 1, ask for: the nearest ones, as insert_predictor has it."""
        for name, (density, table) in self._tables.items():
            self._rows[name][:] = table[np.rint(self._density[density] * np.float32(GRID)).astype(np.int64)]

    def _times(self, tokens: int) -> Times:
        """Where the next tokens are, for a graph that is told so, see `variants.told`; otherwise nothing."""
        if PAST not in self._session.inputs:
            return {}
        past, starts_B = self.filled, self._batch.starts
        token_BS = np.arange(past, past + tokens) - starts_B[:, None]
        start_B = np.minimum(starts_B, past + tokens)
        return {PAST: np.full(len(starts_B), past), START: start_B, TOKEN: np.maximum(token_BS, -1)}

    def _move_on(self) -> None:
        """Tell the bound graph where the next token is."""
        assert self._step is not None
        if not self._step_times:
            self._step.give(MASK, self._mask(self.filled + 1))
        elif self.filled >= self._last_start:  # few calls of numpy, see `greedy`
            self._step_times[PAST].fill(self.filled)
            np.subtract(self.filled, self._batch.starts[:, None], out=self._step_times[TOKEN])
        else:
            for name, array in self._times(1).items():
                self._step_times[name][:] = array

    def _mask(self, slots: int) -> Ids:
        """The attention mask of so many slots, cut from one that covers the whole cache."""
        if self._whole_mask.shape[1] != self._cache.capacity:
            self._whole_mask = self._batch.mask(self._cache.capacity)
        return np.ascontiguousarray(self._whole_mask[:, :slots])

    def _bind(self, ids_BS: Ids, sparse_tail: int, logits_from: int = 0) -> Binding:
        S = ids_BS.shape[1]
        binding = self._session.bind()
        masked = min(sparse_tail, S) if sparse_tail >= 0 else int(S == 1)
        self._step_times = self._times(S)
        binding.give("input_ids", ids_BS)
        dials: dict[str, npt.NDArray[Any]] = {
            **self._density,
            **self._rows,
            **self._step_times,
            TAIL: np.array([masked], np.int64),
            "sparse_tail": np.array([sparse_tail], np.int64),
            LOGITS_FROM: np.array([logits_from], np.int64),
        }
        for name, value in dials.items():
            if name in self._session.inputs:
                binding.give(name, value)
        if not self._step_times:
            binding.give(MASK, self._mask(self.filled + S))
        for name, array in self._inputs.items():
            binding.give(name, array)
        self._bind_scores(binding, masked)
        return binding

    def _bind_scores(self, binding: Binding, tokens: int) -> None:
        if self._scores is None:
            return
        for kind, scores in zip(UNIT_KINDS, self._scores(tokens), strict=True):
            shape = (self._batch.rows, *scores.shape[1:])
            binding.give(f"scores.{kind}", np.ascontiguousarray(np.broadcast_to(scores, shape), np.float32))

    def _room(self, output: str) -> int:
        """Tokens of one run that an output has room for."""
        return 1 if output == "logits" else self.at_once

    def _bind_step(self) -> Binding:
        """A binding whose outputs lie in buffers that all steps share."""
        model, rows = self._model, self._batch.rows
        known = set(self._session.outputs)
        shapes: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {
            "logits": ((rows, 1, model.vocab), np.float32),
            "active.heads": ((rows, 1, model.layers - 1), np.int32),
            "active.neurons": ((rows, 1, model.layers - 1), np.int32),
            "read": ((model.layers, 2, 2), np.int64),
        }
        for kind, units in self._shown.items():
            shapes[f"scores.{kind}"] = ((rows, 1, model.layers - 1, units), np.float32)
            shapes[f"threshold.{kind}"] = ((rows, 1, model.layers - 1), np.float32)
        whole = {name: shapes[name] for name in shapes if name in known}
        self._run_outputs = {
            name: np.zeros((size[0] * self._room(name), *size[1:]), kind) for name, (size, kind) in whole.items()
        }
        self._step_outputs = {name: self._run_outputs[name][: size[0]] for name, (size, _) in whole.items()}
        binding = self._bind(self._step_ids, AUTOMATIC)
        if RUNS in self._session.inputs:
            self._run_outputs[NEXT] = np.zeros((rows * self.at_once, 1), np.int64)
            for name, array in {RUNS: self._runs, **self._ends}.items():
                binding.give(name, array)
        for name, array in self._run_outputs.items():
            binding.take(name, array)
        self._cache.bind(binding)
        return binding
