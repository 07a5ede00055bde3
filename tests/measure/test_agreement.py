# SPDX-License-Identifier: Apache-2.0
"""Rank correlations of criteria with the loss change, and what they say about planted criteria."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from shadowc.measure.agreement import AgreementReport, measure_agreement
from shadowc.measure.rank_correlation import Interval, spearman, within_groups
from shadowc.sparsity.criteria import Scores, criterion, criterion_names, registry
from shadowc.sparsity.signals import LayerSignals
from shadowc.spec.errors import InputError
from tests.sparsity.two_layers import differentiable_twice, model_of, texts

NAN = float("nan")


def rank_by_counting(values: list[float]) -> list[float]:
    return [sum(other < value for other in values) + (values.count(value) - 1) / 2 for value in values]


def test_spearman_is_pearson_of_ranks_counted_one_by_one() -> None:
    rng = np.random.default_rng(0)
    scores, truth = rng.integers(0, 6, 30).astype(float), rng.standard_normal(30).round(1)
    a, b = (np.array(rank_by_counting(values.tolist())) for values in (scores, truth))
    wanted = ((a - a.mean()) * (b - b.mean())).mean() / (a.std() * b.std())
    assert spearman(scores, truth) == pytest.approx(wanted)
    assert spearman(truth, truth**3) == pytest.approx(1.0)
    assert spearman(-truth, truth) == pytest.approx(-1.0)


def test_scores_that_do_not_vary_are_told_from_a_truth_that_does_not() -> None:
    ramp, flat = np.arange(5.0), np.ones(5)
    assert math.isnan(spearman(flat, ramp) or 0.0)
    assert spearman(ramp, flat) is None
    found = Interval.of([[0.5, NAN], [None, None], [0.5, 0.5]], seed=0)
    assert found.mean == pytest.approx(0.375)  # the constant one counts as 0, the one without truth not at all
    assert (found.rankings, found.constant) == (4, 0.25)
    assert found.low < found.mean < found.high


def test_a_ranking_that_only_knows_the_layer_is_worth_nothing_within_layers() -> None:
    group = np.repeat([1, 2, 3], 20)
    truth = group * 10 + np.random.default_rng(1).random(60)
    assert (spearman(group.astype(float), truth) or 0) > 0.9
    assert math.isnan(within_groups(group.astype(float), truth, group) or 0.0)


def test_interval_draws_whole_texts() -> None:
    """Ten rankings of each of two texts that disagree say as little as one of each."""
    many = Interval.of([[1.0] * 10, [0.0] * 10], seed=0)
    assert (many.low, many.mean, many.high) == (0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def report() -> AgreementReport:
    before = dict(registry._REGISTRY)

    @criterion("planted-constant", gradients=False)
    def constant(signals: LayerSignals) -> Scores:
        """All the same. Source: planted."""
        return torch.ones_like(signals.context_BTHD[..., 0]), torch.ones_like(signals.hidden_BTF)

    with differentiable_twice():
        found = measure_agreement(small_steps(), texts(8, 12).numpy(), criterion_names(), units=24, tokens=3)
    registry._REGISTRY.clear()
    registry._REGISTRY.update(before)
    return found


def small_steps() -> Any:
    """A model in which a unit changes little, so that first order is nearly everything."""
    model = model_of("opt")
    for layer in model.model.decoder.layers:
        for part in (layer.self_attn.out_proj, layer.fc2):
            part.weight.mul_(0.02)
    return model


def ranked(report: AgreementReport, name: str, kind: str = "neurons") -> dict[str, Interval]:
    return next(row.ranks for row in report.rows if (row.criterion, row.kind) == (name, kind))


@pytest.mark.parametrize(("kind", "least"), [("heads", 0.7), ("neurons", 0.95)])  # of two heads one is a coin
def test_first_order_agrees_where_units_change_little(report: AgreementReport, kind: str, least: float) -> None:
    for name, found in (
        ("taylor", "token change all"),
        ("taylor", "text change all"),
        ("plainact", "token size all"),
        ("snip", "text size all"),
    ):
        assert ranked(report, name, kind)[found].mean > least, (name, found)


def test_a_constant_criterion_is_marked_and_counts_as_nothing(report: AgreementReport) -> None:
    for kind in ("heads", "neurons"):
        for name, found in ranked(report, "planted-constant", kind).items():
            assert (found.mean, found.constant) == (0.0, 1.0), name
    assert all(value.constant == 0 for value in ranked(report, "random").values())


def test_chance_is_chance_and_what_has_no_formula_has_no_figure(report: AgreementReport) -> None:
    for name in ("token size all", "text size all"):
        assert abs(ranked(report, "random")[name].mean) < 0.5
        assert ranked(report, "jacov")[name].rankings == 0
        assert ranked(report, "jacov", "heads")[name].rankings > 0
    assert [text.split()[0] for text in report.dropped] == ["epenas"]  # eighty positions have too few equal successors


def test_share_of_exact_zeros_is_that_of_neurons_that_do_not_fire(report: AgreementReport) -> None:
    zeros = {row.criterion: row.zeros for row in report.rows if row.kind == "neurons"}
    assert 0.2 < zeros["activation"] < 0.8
    assert zeros["plainact"] >= zeros["activation"]
    assert zeros["l2norm"] == 0
    assert math.isnan(zeros["jacov"])


def test_a_sequence_with_numbers_that_are_not_finite_is_dropped_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    calls = []

    @criterion("planted-broken", gradients=False)
    def broken(signals: LayerSignals) -> Scores:
        """NaN in layer 1 of the second sequence. Source: planted."""
        heads, neurons = signals.context_BTHD.norm(dim=-1), signals.hidden_BTF.clone()
        calls.append(0)
        if len(calls) == 4:
            neurons[0, 3, 7] = NAN
        return heads, neurons

    found = measure_agreement(model_of("opt"), texts(4).numpy(), ["planted-broken", "random"], units=8, tokens=1)
    assert found.dropped == ("sequence 1: planted-broken of neuron 7 in layer 1 is not finite",)
    assert found.sequences == 3
    calls.clear()
    with pytest.raises(InputError, match="1 of 2 sequences have finite scores") as caught:
        measure_agreement(model_of("opt"), texts(2).numpy(), ["planted-broken"], units=8, tokens=1)
    assert "neuron 7" in caught.value.problems[0]


def test_one_sequence_and_unknown_names_are_refused() -> None:
    with pytest.raises(InputError, match="several sequences"):
        measure_agreement(model_of("opt"), texts(1).numpy(), ["random"])
    with pytest.raises(InputError, match="unknown criterion 'magic'; known are activation, epenas"):
        measure_agreement(model_of("opt"), texts(2).numpy(), ["magic"])
