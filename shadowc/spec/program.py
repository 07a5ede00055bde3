# SPDX-License-Identifier: Apache-2.0
"""What travels from trace through the passes to emit: a graph without weights, and recipes for its weights.

Letters: E hidden, H heads, D head size, F neurons, P predictor width, L predicted layers, N units per layer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx_graphsurgeon as gs

    from shadowc.checkpoint.opt import OptFacts

    Shares = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]

SMALLEST_SPAN = 1e-12
"""What a predictor's input is divided by at least: the context of a token that sees nothing is constant."""

GRID = 200
"""Densities at which a predictor knows thresholds, and of style shadow+ shares of the layers: half a per cent each."""

RecipeKind = Literal[
    "copy",  # sources[0] as it is
    "transpose",  # sources[0] [a, b] -> [b, a]
    "ffn_records",  # (fc1.weight [F,E], fc2.weight [E,F]) -> [F,2,E], int4: [F,2,E/2]
    "ffn_scales",  # the same sources -> [F,2], int4: [F,2,E/block]
    "ffn_bias",  # fc1.bias [F], in neuron order
    "attention_records",  # (q,k,v,out_proj weights [E,E]) -> [H,4,D,E], int4: [H,4,D,E/2]
    "attention_scales",  # the same sources -> [H,4,D], int4: [H,4,D,E/block]
    "ffn_rows",  # the same sources as the records; part 0: fc1 [F,E], part 1: fc2 transposed [F,E]
    "attention_rows",  # the same; parts 0 to 2: q, k, v [H*D,E], part 3: out_proj transposed [H*D,E]
    "qkv_bias",  # (q,k,v biases [E]) -> [H,3,D]
    "centred_qkv_bias",  # the same, and means of the heads' contexts [H,D], which come off v -> [H,3,D]
    "filled_bias",  # (out_proj bias [E], its weight [E,H*D], means [H,D]) -> what it makes of the means [E]
    "network_rows",  # sources[0] [n,k] as it is, int8 with a scale per row; LM head and predictors
    "network_quads",  # the same, in int8, as the second operand of PredictUnits: [n/16,k/4,16,4]
    "network_scales",  # the same source -> [n]
]


@dataclass(frozen=True, slots=True)
class WeightRecipe:
    """How one initialiser of the graph is made from named tensors.

    Recipes that share `kind`'s family and `sources` (records and their scales) are made together, once.
    """

    kind: RecipeKind
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: Literal["float32", "float16", "bfloat16", "int8", "uint8"] = "float32"
    quantised: bool = False
    """True: scales are max|w| / 127 of each record row, or max|w| / 7 of each group of `block` values; False: ones."""
    order: str = ""
    """Name of the int32 [F] tensor that permutes the neurons; empty: as in the checkpoint."""
    block: int = 0
    """Quantisation block along E of records and scales of int4; 0: not int4."""
    part: int = 0
    """Which of the matrices of a record (rows recipes)."""


class TensorSource(Protocol):
    """Named float32 tensors, read one at a time (a checkpoint, a predictor, or both)."""

    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted."""

    def tensor(self, name: str) -> npt.NDArray[np.float32]:
        """One tensor, converted to float32 (int32 for neuron orders)."""


@dataclass(frozen=True, slots=True)
class SparsityPlan:
    """What the passes need to know about the predictor and the masks; None of it is weights."""

    width_heads: int
    width_neurons: int
    block: int
    """Neurons per unit."""
    scope: Literal["local", "global"]
    exempt: tuple[int, ...] = ()
    """Predicted layers (0 = model layer 1) that stay dense."""
    min_active_heads: int = 0
    min_active_neurons: int = 0
    style: Literal["shadow", "dejavu", "shadow+"] = "shadow"
    """shadow: scores of all layers come from layer 0; dejavu: those of a layer from its own input (scope local);
    shadow+: as dejavu, those of neurons from what the FFN reads, and each layer has its own share."""
    shares: Shares | None = field(default=None, compare=False, repr=False)
    """Of style shadow+: for heads and for neurons, density -> share of each layer."""
    select: Literal["exact", "calibrated", "sensitivity"] = "exact"
    """exact: units are ranked for every token; otherwise scores are compared with thresholds."""
    thresholds: Shares | None = field(default=None, compare=False, repr=False)
    """Unless `select` is exact: for heads and for neurons, density -> threshold of each layer."""
    fill: Literal["zero", "mean"] = "zero"
    """What a skipped head leaves in its place; the means are tensors of the predictor."""

    @property
    def budget(self) -> Literal["local", "global", "sensitivity"]:
        """Which of a predictor's tables the thresholds are."""
        return "sensitivity" if self.select == "sensitivity" else self.scope


@dataclass(slots=True)
class Program:
    """The traced or transformed graph with its weight recipes. Passes change it in place, and nothing else."""

    graph: gs.Graph
    facts: OptFacts
    weights: dict[str, WeightRecipe] = field(default_factory=dict)
    """Graph tensor name -> recipe. After the trace: one `copy` per parameter, under the parameter's name."""
    plan: SparsityPlan | None = None
    """None: a dense engine without predictor."""


@dataclass(frozen=True, slots=True)
class PassReport:
    """What one pass did: counts by name, and why it left things alone."""

    name: str
    counts: dict[str, int]
    refusals: tuple[str, ...] = ()
