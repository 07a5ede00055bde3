# SPDX-License-Identifier: Apache-2.0
"""What a token is expected to read at a density, part by part, from the manifest alone.

Ranks over all layers share a density out among them, and blocks round it: what the kernels count is near, not equal.
Zeros of ReLU that are skipped come on top; how many there are depends on the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shadowc.spec.density import Density
from shadowc.spec.errors import VerificationError

if TYPE_CHECKING:
    from shadowc.spec.manifest import EngineManifest

KV_SHARE = 0.5
"""Of a head's record, the k and v rows: read for every head while masks may change."""


@dataclass(frozen=True, slots=True)
class ExpectedBytes:
    """Bytes per token of one row."""

    attention: float
    """Records of heads."""
    neurons: float
    """Records of neurons."""
    lm_head: float
    predictor: float
    other: float
    """Norms, biases, one row of each embedding."""
    cache: float
    """Keys and values of each token before; not in `total`, since it grows with the text."""

    @property
    def total(self) -> float:
        """All but the cache."""
        return self.attention + self.neurons + self.lm_head + self.predictor + self.other


def expected_bytes(manifest: EngineManifest, density: Density | None = None) -> ExpectedBytes:
    """What a token reads under masks of a density; None: dense, without predictor and masks."""
    part, plan = manifest.bytes_per_token, manifest.sparsity
    attention, ffn = record_bytes(manifest)
    if density is None or plan is None:
        return ExpectedBytes(attention, ffn, part.lm_head, 0.0, part.other, part.cache)
    density = _with_floor(manifest, density)
    layers = manifest.model.layers
    first = (1 + len(plan.exempt)) / layers  # layer 0 stays dense, and exempt ones
    held = plan.mask == "sequence"
    again = 1 / plan.refresh if plan.refresh else 0.0  # how often a mask is made
    heads = head_share(manifest, density)
    context = again / layers if held else 0.0  # layer 0's attention is computed once more for a mask
    return ExpectedBytes(
        attention=attention * (first + context + (1 - first) * heads),
        neurons=ffn * (first + (1 - first) * density.neurons),
        lm_head=part.lm_head,
        predictor=part.predictor * again if held else part.predictor,
        other=part.other,
        cache=part.cache * (first + (1 - first) * density.heads),  # active heads attend
    )


def _with_floor(manifest: EngineManifest, density: Density) -> Density:
    """The density, or the least share that every layer keeps."""
    plan, model = manifest.sparsity, manifest.model
    if plan is None:
        return density
    blocks = -(-model.ffn // plan.neuron_block)
    heads, neurons = plan.min_active_heads / model.heads, plan.min_active_neurons / blocks
    return Density(max(density.heads, heads), max(density.neurons, neurons))


def head_share(manifest: EngineManifest, density: Density) -> float:
    """Share of a masked layer's attention records that is read; more than the heads where masks may change."""
    plan = manifest.sparsity
    if plan is not None and plan.mask == "sequence" and not plan.refresh:
        return density.heads
    return KV_SHARE + (1 - KV_SHARE) * density.heads  # a later token may need the K/V of a head that this one skips


def record_bytes(manifest: EngineManifest) -> tuple[float, float]:
    """Bytes of all attention records and of all neuron records, split by their number of rows."""
    model = manifest.model
    attention, ffn = 4 * model.heads * model.head_size, 2 * model.ffn
    records = manifest.bytes_per_token.records
    return records * attention / (attention + ffn), records * ffn / (attention + ffn)


PARTS = ("embeddings", "attention", "neurons", "LM head", "predictor", "norms", "other")


def part_sizes(folder: Path, manifest: EngineManifest) -> dict[str, int]:
    """Stored bytes of every part of the model in weights.bin, those it has; empty if the graph's file is missing.

    Raises:
        VerificationError: the graph's file is damaged.
    """
    sizes = dict.fromkeys(PARTS, 0)
    for name, size in _stored(folder, manifest):
        sizes[_part_of(name)] += size
    return {part: size for part, size in sizes.items() if size}


def _stored(folder: Path, manifest: EngineManifest) -> list[tuple[str, int]]:
    if manifest.tensorrt is not None:
        return [(weight.name, weight.bytes) for weight in manifest.tensorrt.weights]
    from shadowc.spec.manifest import MODEL_FILE

    if not (folder / MODEL_FILE).is_file():
        return []
    from shadowc.runtime.graph_file import read_graph
    from shadowc.runtime.verification import RECOMPILE

    graph = read_graph(folder / MODEL_FILE).graph
    places = [(tensor.name, {entry.key: entry.value for entry in tensor.external_data}) for tensor in graph.initializer]
    try:
        return [(name, int(where["length"])) for name, where in places if "length" in where]
    except ValueError as error:
        raise VerificationError(f"{folder / MODEL_FILE} is damaged: {error}", hint=RECOMPILE) from error


def _part_of(name: str) -> str:
    if "embed_" in name:
        return "embeddings"
    if "layer_norm" in name:
        return "norms"
    if name.startswith("predictor"):
        return "predictor"
    if name.startswith("lm_head"):
        return "LM head"
    if name.startswith("layers."):
        return "attention" if ".attention." in name else "neurons"
    return "other"
