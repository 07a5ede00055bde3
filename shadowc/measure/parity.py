# SPDX-License-Identifier: Apache-2.0
"""Parity A: torch with the engine's rounding and the engine's own masks must give the engine's numbers.

The masks themselves are checked first: the scores must be the predictor's, and thresholds and counts
those that the scores and the density asked for give.

The check goes layer by layer: each layer of the real transformers model gets the engine's own input
of that layer, so memory stays bounded by one layer and an error cannot hide behind an earlier one.
What it attends to is the engine's own cache, which is
checked too. The embedding, the final norm and the LM head are
checked the same way. It is the gate of every compile.

Letters: B batch, S tokens, E hidden, F neurons, P positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import reduce
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from shadowc.checkpoint.opt import FINAL_NORM, Affine, layer_names
from shadowc.measure.dequantised import DequantisedSource, RoundedPredictor, filled_source
from shadowc.measure.layer_reference import LayerReference
from shadowc.measure.masks import forced_heads, forced_masks, relative, score_difference, worse, wrong_selections
from shadowc.spec.density import Density
from shadowc.spec.errors import VerificationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy.typing as npt

    from shadowc.checkpoint.opt import OptFacts
    from shadowc.measure.masks import Scorer
    from shadowc.sparsity.predictor import Predictor
    from shadowc.spec.options import Style
    from shadowc.spec.program import SparsityPlan, TensorSource

    Float = npt.NDArray[np.float32]

LAYER_TOLERANCE = 1e-4
"""Largest |difference| of a layer's output over the largest |update| of that layer; both sides use the same rounded
weights, attend to the engine's own cache and accumulate in fp32. How far that cache is from keys and values, beyond
the rounding of its type, counts as the layer's too."""
LOGITS_TOLERANCE = 1e-4
"""Largest |difference| of the logits over the largest |logit|, of an LM head with the engine's rounding."""
SCORES_TOLERANCE = 1e-4
"""Largest |difference| of a layer's scores over their spread, of a predictor with the engine's rounding."""
PREFILL_TOKENS = 12
MASKED_TOKENS = 6
DECODE_TOKENS = 4
DENSITIES = (Density(0.5, 0.5), Density(0.25, 0.2))


class Probe(Protocol):
    """A fresh run of the engine with every inner tensor of interest as an output."""

    def step(self, ids_BS: npt.NDArray[np.int64], *, density: Density, sparse_tail: int) -> Mapping[str, Float]:
        """Runs the next tokens (the cache goes on) and returns outputs by graph name, `residual.{l}` included.

        `cached.{l}.key` and `.value` [B,S,H,D], if there, are what the cache then holds of these tokens.
        """


BISECT = "shadowc bisect ENGINE --against MODEL names the first layer and tensor that differ"


@dataclass(frozen=True, slots=True)
class ParityReport:
    """Worst relative difference per part of the model, with the tolerance that it was held to."""

    weights: str
    embedding: float
    layers: tuple[float, ...]
    logits: float
    layer_tolerance: float
    logits_tolerance: float
    positions: int
    """Token positions compared, all densities together."""
    held_positions: int = 0
    """Those of them under a mask that holds for a sequence."""
    selection: int | None = None
    """Thresholds and counts that scores and density do not give; None: not checked."""
    scores: float | None = None
    """None: not compared with a predictor."""
    scores_tolerance: float = 0.0

    def passed(self) -> bool:
        """Whether every part is within its tolerance; a NaN never is."""
        return not self.problems()

    def problems(self) -> list[str]:
        """Every part that is out of tolerance, with its difference."""
        parts = [("embedding", self.embedding, self.layer_tolerance)]
        parts += [(f"layer {index}", value, self.layer_tolerance) for index, value in enumerate(self.layers)]
        parts.append(("logits", self.logits, self.logits_tolerance))
        if self.scores is not None:
            parts.append(("scores", self.scores, self.scores_tolerance))
        found = [f"{name}: {value:.2e}" for name, value, tolerance in parts if not value <= tolerance]
        if self.selection:
            found.append(f"selection: {self.selection} thresholds do not follow from scores and density")
        return found

    def as_dict(self) -> dict[str, object]:
        """For engine.json."""
        return {**asdict(self), "layers": list(self.layers)}

    def require(self, ending: str = "", hint: str = BISECT) -> None:
        """Refuse an engine that is out of tolerance.

        Args:
            ending: of the sentence, what became of the engine.
            hint: what to type next.

        Raises:
            VerificationError: naming every part that is out of tolerance.
        """
        problems = self.problems()
        if problems:
            raise VerificationError(
                f"the engine does not compute what torch computes ({self.weights}; tolerance "
                f"{self.layer_tolerance:.0e} per layer, {self.logits_tolerance:.0e} for logits){ending}",
                hint=hint,
                problems=problems,
            )


def check_parity(
    new_probe: Callable[[], Probe],
    facts: OptFacts,
    source: TensorSource,
    *,
    weights: str,
    block: int,
    orders: Mapping[int, npt.NDArray[np.int32]],
    sparse: bool,
    plan: SparsityPlan | None = None,
    predictor: Predictor | None = None,
    seed: int = 0,
    advance: Callable[[int, int], None] | None = None,
    truth: TensorSource | None = None,
    new_held_probe: Callable[[], Probe] | None = None,
    means: Mapping[int, Float] | None = None,
) -> ParityReport:
    """Compares the engine with torch on random tokens: a prefill whose tail is masked, then single steps.

    Args:
        new_probe: makes a probe with an empty cache.
        facts: the model's sizes.
        source: the checkpoint's tensors (not yet rounded).
        weights: the engine's; the checkpoint's tensors are rounded as the engine should have.
        block: neurons per unit.
        orders: model layer -> neuron order [F] of the packed records (absent: as in the checkpoint).
        sparse: False for a dense engine.
        plan: how units are ranked; with it, thresholds and counts are checked too.
        predictor: as it was trained; with it, the scores are checked too.
        seed: of the random tokens.
        advance: called with layers done and their number.
        truth: the tensors with the engine's own rounding, where nothing else is rounded: products are float32 then,
            and a predictor is as it was trained. None: they are made from `source` and `weights`.
        means: model layer -> mean contexts [H,D] that skipped heads leave; None: the predictor's.
        new_held_probe: the same for masks that hold for a sequence: the token before the masked ones makes all masks.
    """
    accuracy = weights if truth is None else "fp32"
    if truth is None:
        if means is None:
            means = {} if predictor is None else predictor.means
        source = filled_source(source, means)
        truth = source if weights == "fp32" else DequantisedSource(source, weights)
    ids_BS, prefill, masked = tokens_of(facts, seed)
    densities = DENSITIES if sparse else DENSITIES[:1]
    runs = [run_of(new_probe(), ids_BS, density, prefill, masked) for density in densities]
    held: list[dict[str, Float]] = []
    if new_held_probe is not None:
        masked_held = min(masked, prefill - 1)  # one token must be left to make the mask
        held = [run_of(new_held_probe(), ids_BS, density, prefill, masked_held) for density in densities]
    selection, scores = None, None
    if sparse and plan is not None:
        lengths = [masked] * len(runs) + [masked_held for _ in held]
        settings = zip([*runs, *held], [*densities, *densities], lengths, strict=False)
        selection = sum(wrong_selections(run, plan, density, Z + DECODE_TOKENS) for run, density, Z in settings)
    if sparse and predictor is not None:
        scorer = predictor if accuracy == "fp32" else RoundedPredictor(predictor)
        scores = _scores_difference(runs, held, facts, truth, scorer, predictor.style)
    runs += held
    return ParityReport(
        weights=weights,
        embedding=embedding_difference(runs[0], ids_BS, facts, truth),
        layers=_layer_differences(runs, facts, truth, block, orders, advance),
        logits=reduce(worse, (logits_difference(run, facts, truth) for run in runs)),
        layer_tolerance=LAYER_TOLERANCE,
        logits_tolerance=LOGITS_TOLERANCE,
        positions=ids_BS.shape[1] * len(runs),
        held_positions=ids_BS.shape[1] * len(held),
        selection=selection,
        scores=scores,
        scores_tolerance=SCORES_TOLERANCE,
    )


def tokens_of(facts: OptFacts, seed: int = 0) -> tuple[npt.NDArray[np.int64], int, int]:
    """Random tokens [1,S], how many of them are one run at first, and how many of those are masked."""
    prefill = min(PREFILL_TOKENS, facts.positions - DECODE_TOKENS)
    ids_BS = np.random.default_rng(seed).integers(4, facts.vocab, (1, prefill + DECODE_TOKENS), dtype=np.int64)
    return ids_BS, prefill, min(MASKED_TOKENS, prefill)


def run_of(
    probe: Probe,
    ids_BS: npt.NDArray[np.int64],
    density: Density,
    prefill: int,
    masked: int,
    further: Sequence[str] = (),
) -> dict[str, Float]:
    """All tokens through the engine; every output joined along the token axis, `further` inner tensors too."""
    parts = [probe.step(ids_BS[:, :prefill], density=density, sparse_tail=masked)]
    parts += [
        probe.step(ids_BS[:, at : at + 1], density=density, sparse_tail=-1) for at in range(prefill, ids_BS.shape[1])
    ]
    per_token = ("residual.", "cached.", "scores.", "threshold.", "active.", "logits")
    wanted = [name for name in parts[0] if name.startswith(per_token) or name in further]
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in wanted}


def _layer_differences(
    runs: Sequence[Mapping[str, Float]],
    facts: OptFacts,
    truth: TensorSource,
    block: int,
    orders: Mapping[int, npt.NDArray[np.int32]],
    advance: Callable[[int, int], None] | None,
) -> tuple[float, ...]:
    """Worst difference per layer, each layer fed with the engine's own input."""
    layers = []
    for layer in range(facts.layers):
        reference = LayerReference(facts, truth, layer)
        worst = 0.0
        for run in runs:
            x_BSE, found_BSE = (torch.from_numpy(run[f"residual.{index}"]) for index in (layer, layer + 1))
            masks = forced_masks(run, layer, facts, block, orders.get(layer))
            wanted_BSE = reference.run(x_BSE, *masks, _stored(run, layer))
            update = (wanted_BSE - x_BSE).abs().max().item()
            worst = worse(worst, relative((wanted_BSE - found_BSE).abs().max().item(), update))
        layers.append(worse(worst, reference.stored_difference))
        if advance:
            advance(layer + 1, facts.layers)
    return tuple(layers)


def _stored(run: Mapping[str, Float], layer: int) -> dict[str, torch.Tensor]:
    """Keys and values [B,S,H,D] that the engine stored, if the probe shows them."""
    names = {kind: f"cached.{layer}.{kind}" for kind in ("key", "value")}
    return {kind: torch.from_numpy(run[name]) for kind, name in names.items() if name in run}


def _scores_difference(
    runs: Sequence[Mapping[str, Float]],
    held: Sequence[Mapping[str, Float]],
    facts: OptFacts,
    truth: TensorSource,
    scorer: Scorer,
    style: Style,
) -> float:
    first = LayerReference(facts, truth, 0)

    def inputs_of(run: Mapping[str, Float]) -> torch.Tensor:
        """What the predictor reads, made by torch from the engine's residual stream."""
        if style == "shadow":
            return first.context(torch.from_numpy(run["residual.0"]), _stored(run, 0))
        layers = range(1, facts.layers)
        read = torch.stack([_read_by_attention(run[f"residual.{at}"], at, facts, truth) for at in layers], dim=2)
        if style == "dejavu":
            return read
        behind = [_read_by_ffn(run, layer, facts, truth) for layer in layers]
        return torch.stack([read, torch.stack(behind, dim=2)], dim=2)

    return reduce(
        worse,
        (score_difference(run, scorer, inputs_of(run), held=part is held) for part in (runs, held) for run in part),
    )


def _read_by_ffn(run: Mapping[str, Float], layer: int, facts: OptFacts, truth: TensorSource) -> torch.Tensor:
    heads_BSH = forced_heads(run, layer, facts)
    x_BSE = torch.from_numpy(run[f"residual.{layer}"])
    return LayerReference(facts, truth, layer).ffn_input(x_BSE, heads_BSH, _stored(run, layer))


def _read_by_attention(x_BSE: Float, layer: int, facts: OptFacts, truth: TensorSource) -> torch.Tensor:
    if not facts.norm_first:
        return torch.from_numpy(x_BSE)
    return _normed(x_BSE, layer_names(layer).attention_norm, facts, truth)


def _normed(x_BSE: Float, norm: Affine, facts: OptFacts, truth: TensorSource) -> torch.Tensor:
    weight_E, bias_E = (torch.from_numpy(truth.tensor(name)) for name in (norm.weight, norm.bias))
    return torch.nn.functional.layer_norm(
        torch.from_numpy(x_BSE), (facts.hidden,), weight_E, bias_E, eps=facts.norm_eps
    )


def embedding_difference(
    run: Mapping[str, Float], ids_BS: npt.NDArray[np.int64], facts: OptFacts, truth: TensorSource
) -> float:
    """Of `residual.0`, the largest difference from the sum of both embeddings, of its largest value."""
    words_BSE = truth.tensor("model.decoder.embed_tokens.weight")[ids_BS]
    if facts.projected:
        words_BSE = words_BSE @ truth.tensor("model.decoder.project_in.weight").T
    places_PE = truth.tensor("model.decoder.embed_positions.weight")
    wanted_BSE = words_BSE + places_PE[np.arange(ids_BS.shape[1]) + facts.position_offset]
    return relative(float(np.abs(run["residual.0"] - wanted_BSE).max()), float(np.abs(wanted_BSE).max()))


def logits_difference(run: Mapping[str, Float], facts: OptFacts, truth: TensorSource) -> float:
    """Of the logits, the largest difference from what the last residual gives, of the largest."""
    last_BSE = run[f"residual.{facts.layers}"]
    hidden = _normed(last_BSE, Affine.of(FINAL_NORM), facts, truth) if facts.final_norm else torch.from_numpy(last_BSE)
    if facts.projected:
        hidden = hidden @ torch.from_numpy(truth.tensor("model.decoder.project_out.weight")).T
    wanted_BSV = hidden @ torch.from_numpy(truth.tensor("lm_head.weight")).T
    difference = (wanted_BSV - torch.from_numpy(run["logits"])).abs().max().item()
    return relative(difference, wanted_BSV.abs().max().item())
