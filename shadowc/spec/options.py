# SPDX-License-Identifier: Apache-2.0
"""Options of the stages: frozen, checked on construction, and hashable into cache keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from shadowc.spec.density import Density

Criterion = str
Scope = Literal["local", "global"]
Mask = Literal["token", "sequence"]
Select = Literal["exact", "calibrated", "sensitivity"]
"""exact: units are ranked for every token; calibrated: a unit is kept whose score reaches a threshold, which kept that
share of the calibration text; sensitivity: the same, each layer with a share by the importance measured in it."""
SELECTS: tuple[Select, ...] = get_args(Select)
Budget = Literal["local", "global", "sensitivity"]
"""Who meets a density: every layer, all layers together, or every layer its own share."""
Style = Literal["shadow", "dejavu", "shadow+"]
"""shadow: one look at layer 0's attention scores all later layers; dejavu: every layer has a predictor of its own;
shadow+: the same, each kind from the latest input, and every layer has its share of one budget."""
STYLES: tuple[Style, ...] = get_args(Style)
Fill = Literal["mean", "zero"]
"""What a skipped head leaves in its place: its mean context over the calibration positions, or nothing."""
Labels = Literal["scores", "top", "graded", "expected"]
"""scores: the criterion's scores of a layer, scaled to 0..1 (squared error); top: whether a unit is among the first
of its layer (cross entropy); graded: in how many of three nested tops of all layers together it is (style shadow+);
expected: how much it matters, as a share of its layer's mean, for criteria whose scores cannot be compared between
layers (style shadow+)."""
_LABELS: Mapping[Style, Labels] = MappingProxyType({"shadow": "scores", "dejavu": "top", "shadow+": "graded"})
BLOCK = 16
"""Neurons of a unit, unless an option says otherwise; single neurons for style shadow+."""
WEIGHTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "cpu": ("fp32", "bf16", "int8", "int4"),
        "tensorrt-rtx": ("fp16", "bf16", "fp32", "int8"),
        "tensorrt": ("fp16", "bf16", "fp32", "int8"),
    }
)
"""Target -> types of weights that it has, its default first."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class CollectOptions(_Frozen):
    """What the calibration run records."""

    criterion: Criterion = "plainact"
    data: str = "self"
    """"self": text sampled from the model; otherwise the path of a .txt or .jsonl file."""
    positions: int = Field(default=4096, ge=16)
    """Token positions recorded."""
    length: int = Field(default=256, ge=8)
    """Tokens per calibration sequence (at most the model's context)."""
    fill: Fill = "zero"
    """What a skipped head will leave in its place; importance is measured from there."""
    seed: int = 0


class TrainOptions(_Frozen):
    """How the predictor is trained."""

    style: Style = "shadow"
    labels: Labels | None = None
    """What the networks learn; None: scores for style shadow, top for style dejavu, for style shadow+ graded, or
    expected where the criterion does not compare layers."""
    top: float = Field(default=0.3, gt=0, lt=1)
    """With labels "top": the share of a layer's units that are called important."""
    neuron_block: int = Field(default=BLOCK, ge=1)
    """Neurons that are kept or skipped together; where nobody chose, 1 for style shadow+."""
    width: int = Field(default=0, ge=0)
    """Hidden width P of every network; 0: the largest, at most 1024, that costs at most 3 % of a dense token, in steps
    of 32, of style shadow+ below 128 of 8."""
    epochs: int = Field(default=60, ge=1)
    batch: int = Field(default=64, ge=1)
    rate: float = Field(default=1e-3, gt=0)
    validation: float = Field(default=0.1, gt=0, lt=1)
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _block_of_style(cls, values: Any) -> Any:
        """A block that nobody chose is the style's."""
        if isinstance(values, Mapping) and values.get("neuron_block") is None:
            return {**values, "neuron_block": 1 if values.get("style") == "shadow+" else BLOCK}
        return values

    @model_validator(mode="after")
    def _labels_of_style(self) -> TrainOptions:
        """Grades are what the linear networks of style shadow+ learn, and no other style's do."""
        if (self.style == "shadow+") != (self.learned in ("graded", "expected")):
            raise ValueError(
                f"style {self.style} cannot learn labels {self.learned}: graded and expected are for style shadow+ "
                "and it learns no others"
            )
        return self

    @property
    def learned(self) -> Labels:
        """What the networks learn, by the style where nobody chose it."""
        return self.labels or _LABELS[self.style]


class CompileOptions(_Frozen):
    """Everything that decides the bytes of an engine folder, and where it goes."""

    model: str
    out: Path | None = None
    """None: ./<name of the model>.engine"""
    target: str = "cpu"
    weights: Literal["fp32", "fp16", "bf16", "int8", "int4"] = "fp32"
    """Which a target has, and its default: WEIGHTS."""
    predictor: str = "train"
    """"train", "none" (a dense engine), or the folder of a trained predictor."""
    head_density: float = 0.5
    neuron_density: float = 0.5
    scope: Scope | None = None
    """None: global, where every layer has its own predictor local."""
    select: Select = "exact"
    """How masks come from scores."""
    exempt: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Layers of the model, beside layer 0, that stay dense; where all layers are ranked together they do not count."""
    min_active_heads: int = Field(default=0, ge=0)
    """Heads that every masked layer keeps at least."""
    min_active_neurons: int = Field(default=0, ge=0)
    """The same of neurons, in whole blocks."""
    mask: Mask = "token"
    """"token": every token has its own mask; "sequence": the last token of the prompt decides for all that follow."""
    refresh: int = Field(default=0, ge=0)
    """With mask "sequence": every so many tokens the mask is made anew; 0: never."""
    skip_zeros: bool = True
    exact_prompts: bool = False
    """Prompts, and tokens with int4 weights, are computed with all digits, wherever the engine runs; see
    `shadowc.load`. For target cpu."""
    load_format: Literal["auto", "dummy"] = "auto"
    offline: bool = False
    seed: int = 0
    collect: CollectOptions = CollectOptions()
    train: TrainOptions = TrainOptions()
    dump_passes: Path | None = None
    max_batch: int = Field(default=4, ge=1)
    """Rows that an engine for TensorRT takes at most."""
    max_context: int = Field(default=0, ge=0)
    """Tokens that an engine for TensorRT takes at most; 0: as many as the model has positions."""
    compute_capability: tuple[Annotated[str, Field(pattern=r"^\d+\.\d$")], ...] = ()
    """GPUs to build for, such as "8.6"; empty: the builder's own choice."""

    @model_validator(mode="before")
    @classmethod
    def _weights_of_target(cls, values: Any) -> Any:
        """Weights that nobody chose are the target's default."""
        if isinstance(values, Mapping) and values.get("weights") is None:
            return {**values, "weights": WEIGHTS.get(values.get("target", "cpu"), ("fp32",))[0]}
        return values

    @property
    def density(self) -> Density:
        """The engine's default density."""
        return Density(self.head_density, self.neuron_density)
