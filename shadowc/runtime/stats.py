# SPDX-License-Identifier: Apache-2.0
"""What a run really did, counted by the kernels: active units, bytes read, time.

Letters: B rows, Z masked tokens, L predicted layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from shadowc.spec.density import UNIT_KINDS
from shadowc.spec.manifest import EngineManifest
from shadowc.spec.tensors import COUNTED

Floats = npt.NDArray[np.float64]

_MOST_KEPT = 64


@dataclass(frozen=True, slots=True)
class RunStats:
    """Means over the masked tokens of the last call; the dense prompt is left out.

    Active units leave out padding and finished rows. Bytes cannot be told apart by row, since one read of a record
    serves all rows that need it: they are all that was read while masked tokens were computed, over the tokens that
    count. Padding and finished rows are in there, with density 0 if they ended: layer 0 and the K/V of later layers.
    """

    heads: float
    """Mean active heads per model layer, the dense first layer included."""
    neurons: float
    """Mean active units of neurons per model layer, the dense first layer included."""
    heads_by_layer: Floats
    neurons_by_layer: Floats
    head_units: int
    """Heads of one layer."""
    neuron_units: int
    """Units of neurons of one layer."""
    neuron_block: int
    """Neurons of one unit."""
    tokens: int
    """Tokens that were computed under a mask in `seconds`: generated ones after the first, or teacher-forced ones."""
    new_tokens: int
    """Tokens generated, the first (which the prompt's pass gives) included; 0 for logits."""
    seconds: float
    prefill_seconds: float
    bytes_read: float
    """Per token: what the kernels read, plus LM head, predictor, norms and biases, once per run and not per row. NaN
    if nothing was counted."""
    bytes_read_kernels: float
    """Per token: weights and scales that attention and FFN kernels read. NaN in the reference graph."""
    dense_bytes: int
    """What one token of one row reads when nothing is skipped."""
    active_neurons: float
    """Mean active neurons per model layer: `neurons` in single neurons."""
    cache_bytes: int = 0
    """What one token of one row adds to the cache: keys and values of all layers as they are stored. Attention reads so
    much of every token before, of its active heads; 0: not recorded."""
    finish: tuple[str, ...] = ()
    """Why each row ended: "eos", "length" or "context"; empty for logits."""

    @property
    def tokens_per_second(self) -> float:
        """Masked tokens per second, the prompt's pass left out."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def active_head_share(self) -> float:
        """Share of the heads of the predicted layers that were computed."""
        return float(self.heads_by_layer[1:].mean()) / self.head_units

    @property
    def active_neuron_share(self) -> float:
        """Share of the neuron units of the predicted layers that were computed."""
        return float(self.neurons_by_layer[1:].mean()) / self.neuron_units


@dataclass(slots=True)
class Meter:
    """Adds up what single runs report; `stats` has it, single fields lag behind."""

    manifest: EngineManifest
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    tokens: int = 0
    calls: int = 0
    predictions: int = 0
    kernel_bytes: int = 0
    counted: bool = False
    _sums: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)
    _kept: list[tuple[dict[str, npt.NDArray[Any]], npt.NDArray[np.bool_]]] = field(default_factory=list)
    """Runs that are not yet in the sums."""

    def add(
        self,
        outputs: Mapping[str, npt.NDArray[Any]],
        live_BZ: npt.NDArray[np.bool_],
        *,
        calls: int = 1,
        predictions: int = 1,
    ) -> None:
        """Count one run, or several.

        Args:
            outputs: graph outputs by name; `active.*` [B,Z,L] and `read` [n,2,2] count, others do not matter.
            live_BZ: which rows and masked tokens are real.
            calls: so many runs of one token; of the outputs, one row of one token for each.
            predictions: so many of them asked the predictor.
        """
        self.calls += calls
        self.predictions += predictions
        # Kept, and added up many at a time: behind a token that read hundreds of MB each call of numpy is ten times as
        # slow as behind another one.
        self._kept.append(({name: outputs[name].copy() for name in COUNTED if name in outputs}, live_BZ.copy()))
        if len(self._kept) >= _MOST_KEPT:
            self._add_up()

    def _add_up(self) -> None:
        for outputs, live_BZ in self._kept:
            self.tokens += int(live_BZ.sum())
            for kind in UNIT_KINDS:
                active_BZL = outputs.get(f"active.{kind}")
                if active_BZL is not None:
                    total_L = active_BZL[live_BZ].sum(axis=0, dtype=np.int64)
                    self._sums[kind] = self._sums[kind] + total_L if kind in self._sums else total_L
            read = outputs.get("read")
            if read is not None:
                self.counted = True
                self.kernel_bytes += int(read[:, :, 1].sum())
        self._kept.clear()

    def stats(self, *, new_tokens: int = 0, finish: tuple[str, ...] = ()) -> RunStats:
        """The means so far."""
        self._add_up()
        model, sparsity, fixed = self.manifest.model, self.manifest.sparsity, self.manifest.bytes_per_token
        block = sparsity.neuron_block if sparsity else 1
        units = {"heads": model.heads, "neurons": -(-model.ffn // block)}
        layers = {kind: self._by_layer(kind, count) for kind, count in units.items()}
        kernels, every = float("nan"), float("nan")
        if self.counted and self.tokens:
            kernels = self.kernel_bytes / self.tokens
            besides = (fixed.lm_head + fixed.other) * self.calls + fixed.predictor * self.predictions
            every = kernels + besides / self.tokens
        return RunStats(
            heads=float(layers["heads"].mean()),
            neurons=float(layers["neurons"].mean()),
            heads_by_layer=layers["heads"],
            neurons_by_layer=layers["neurons"],
            head_units=units["heads"],
            neuron_units=units["neurons"],
            neuron_block=block,
            tokens=self.tokens,
            new_tokens=new_tokens,
            seconds=self.seconds,
            prefill_seconds=self.prefill_seconds,
            bytes_read=every,
            bytes_read_kernels=kernels,
            dense_bytes=fixed.records + fixed.lm_head + fixed.other,
            active_neurons=min(float(layers["neurons"].mean()) * block, float(model.ffn)),
            cache_bytes=fixed.cache,
            finish=finish,
        )

    def _by_layer(self, kind: str, units: int) -> Floats:
        """Mean active units of every model layer; all of them where no mask was counted."""
        full = np.full(self.manifest.model.layers, float(units))
        if kind in self._sums and self.tokens:
            full[1:] = self._sums[kind] / self.tokens
        return full
