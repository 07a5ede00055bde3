# SPDX-License-Identifier: Apache-2.0
"""A screen: what is asked of whom, that a killed one goes on to the same tables, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from benchmarks.screen import __main__ as command
from benchmarks.screen import context, plan, table
from benchmarks.screen.context import DEALT
from benchmarks.screen.measured import Line
from shadowc.checkpoint.opt import OptFacts
from shadowc.eval.metric import Metric
from shadowc.eval.request import Setting
from shadowc.eval.run import Row
from shadowc.eval.torch_model import TorchModel
from shadowc.sparsity import train as training
from shadowc.sparsity.criteria import aggregates
from shadowc.sparsity.importance import ImportanceTrace
from shadowc.spec.options import TrainOptions
from tests.sparsity.conftest import _one_thread, make_trace, plant, small_facts

__all__ = ["_one_thread", "make_trace", "plant", "small_facts"]

SENTENCES = (
    "One neuron is one record, and a record that is not read costs nothing.",
    "A lazy head sleeps through the night.",
    "Whoever reads less has more time to think.",
)
FEW = ("--criteria", "plainact,snip,magnitude,jacov", "--densities", "0.5", "--window", "16", "--tokens", "60")
FLAGS = (*FEW, "--positions", "64", "--length", "32", "--epochs", "1", "--neuron-block", "16")
Screen = Callable[..., int]


def write(path: Path, first: int, count: int) -> Path:
    lines = [f"{n} {SENTENCES[n % 3]} {SENTENCES[(n + 1) % 3]}" for n in range(first, first + count)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("texts")
    return write(base / "calibration.jsonl", 0, 40), write(base / "test.jsonl", 100, 12)


@pytest.fixture(scope="module")
def run(tiny_checkpoint: Path, texts: tuple[Path, Path]) -> Screen:
    def started(out: Path, *flags: str, data: Path = texts[0], text: Path = texts[1]) -> int:
        places = ("--model", str(tiny_checkpoint), "--data", str(data), "--text", str(text), "--out", str(out))
        return command.main([*places, *FLAGS, *flags])

    return started


@pytest.fixture(scope="module")
def whole(run: Screen, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A screen with its grid, its parts and predictors of other tokens' inputs. Read only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "GRID", (0.25, 0.5))
        out = tmp_path_factory.mktemp("screen") / "whole"
        assert run(out, "--grid", "1", "--seeds", "2", "--parts", "1", "--dealt-out", "1") == 0
    return out


@pytest.fixture
def part(whole: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "part"))


def figures(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "figures.csv").read_text().splitlines()))


def refused(capsys: pytest.CaptureFixture[str], run: Screen, *arguments: Any, **named: Any) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(*arguments, **named)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_every_criterion_meets_every_style_and_scope_that_it_has(whole: Path) -> None:
    half = [
        x for x in figures(whole)
        if x["head_density"] == x["neuron_density"] == "0.5" and x["predictor_seed"] != "1" and DEALT not in x["style"]
    ]  # fmt: skip
    found = {(x["criterion"], x["style"], x["scope"]) for x in half}
    assert len(found) == len(half)
    both = ("local", "global")
    rankings = {
        (c, s, scope) for c in ("plainact", "snip", "magnitude", "jacov") for s in plan.RANKINGS for scope in both
    }
    alone = {(c, s, "local") for c in ("plainact", "snip") for s in ("dejavu", "shadow+")}
    shadow = {(c, "shadow", scope) for c in ("plainact", "snip") for scope in both}
    oracle = {("plainact", "oracle", scope) for scope in both}  # of snip a token has no score
    without = {("", style, scope) for style in ("random", "prompt") for scope in both}
    assert found == rankings | alone | shadow | oracle | without


def test_the_grid_has_its_seeds_and_the_parts_mask_one_kind(whole: Path) -> None:
    (best,) = json.loads((whole / "report.json").read_text())["best"]
    lines = figures(whole)
    quarter = [x for x in lines if x["head_density"] == x["neuron_density"] == "0.25"]
    assert {x["criterion"] for x in quarter} == {best}
    assert {x["predictor_seed"] for x in quarter if x["style"] == "dejavu"} == {"0", "1"}
    heads = [x for x in lines if x["neuron_density"] == "1.0" and x["style"] != "dense"]
    neurons = [x for x in lines if x["head_density"] == "1.0" and x["style"] != "dense"]
    assert {x["style"] for x in heads} == {x["style"] for x in neurons} >= {"random", "prompt", "shadow", "static"}
    assert {x["active_neurons"] for x in heads} == {x["active_heads"] for x in neurons} == {"1.0"}
    assert all(float(x["active_heads"]) < 1 for x in heads if x["style"] == "random")


def test_the_best_criterion_is_that_of_the_lowest_mean_over_its_predictors(whole: Path) -> None:
    (best,) = json.loads((whole / "report.json").read_text())["best"]
    learned = [
        x for x in figures(whole)
        if x["predictor_seed"] == "0" and x["head_density"] == x["neuron_density"] == "0.5" and DEALT not in x["style"]
    ]  # fmt: skip
    means = {}
    for name in ("plainact", "snip"):
        some = [float(x["bits_per_byte"]) for x in learned if x["criterion"] == name]
        assert len(some) == 4
        means[name] = sum(some) / len(some)
    assert best == min(means, key=lambda name: means[name])
    row = next(line for line in (whole / "report.md").read_text().splitlines() if line.startswith(f"| `{best}` |"))
    dense = float(next(x for x in figures(whole) if x["style"] == "dense")["bits_per_byte"])
    assert float(row.split("|")[2]) == pytest.approx(means[best] - dense, abs=1e-4)


def test_a_kind_without_a_formula_is_borrowed_and_said(whole: Path) -> None:
    report = json.loads((whole / "report.json").read_text())
    assert (report["borrowed"], report["host"]) == ({"jacov": ["neurons"]}, "plainact")
    assert "- `jacov` has no formula for neurons: ranked as by `plainact`." in (whole / "report.md").read_text()


def test_everything_is_there_with_its_hashes(whole: Path) -> None:
    report = json.loads((whole / "report.json").read_text())
    assert set(report["traces"]) == {"plainact", "snip", "magnitude", "jacov"}
    hashes = report["predictors"]
    assert len(hashes) == 6 + 3 + 3
    first = [found for name, found in hashes.items() if not name.endswith("-1")]
    assert len(set(first)) == len(first) == 6 + 3
    assert report["text"]["tokens"] >= 60
    assert len(report["rows"]) == len(figures(whole))


def test_every_style_has_a_predictor_of_other_tokens_inputs_beside_it(whole: Path) -> None:
    report = json.loads((whole / "report.json").read_text())
    (best,) = report["best"]
    lines = [x for x in figures(whole) if x["style"].endswith(DEALT)]
    assert {x["criterion"] for x in lines} == {best}
    one_kind = {(x["head_density"], x["neuron_density"]) for x in lines}
    assert one_kind == {("0.5", "0.5"), ("0.5", "1.0"), ("1.0", "0.5")}
    assert {(x["style"].removesuffix(f" {DEALT}"), x["scope"]) for x in lines} == {
        ("shadow", "local"), ("shadow", "global"), ("dejavu", "local"), ("shadow+", "local"),
    }  # fmt: skip
    assert set(report["context"]) == {best}
    assert all(set(both) == {"own", DEALT} for both in report["context"][best].values())
    told = (whole / "report.md").read_text().partition(f"know the context? `{best}`")[2]
    above = next(x["above_dense"] for x in lines if x["style"] == f"shadow+ {DEALT}" and x["neuron_density"] == "1.0")
    row = next(line for line in told.splitlines() if line.startswith("| shadow+ local | 0.5 / 1 |"))
    assert row.split(" | ")[3] == f"{float(above):+.4f}"


def test_inputs_are_dealt_out_alike_in_all_layers_and_scores_stay(whole: Path) -> None:
    trace = ImportanceTrace.load(whole / "traces" / "plainact")
    other = context.dealt_out(trace, 3)
    assert sorted(other.order_M) == list(range(len(trace.sequence_M)))
    for layer in range(1, trace.layers):
        np.testing.assert_array_equal(other.input_ME(layer), trace.input_ME(layer)[other.order_M])
        np.testing.assert_array_equal(other.ffn_input_ME(layer), trace.ffn_input_ME(layer)[other.order_M])
        np.testing.assert_array_equal(other.neurons_MF(layer), trace.neurons_MF(layer))
    np.testing.assert_array_equal(other.context_ME, trace.context_ME[other.order_M])
    assert not np.array_equal(other.context_ME, trace.context_ME)
    assert other.meta["key"] != trace.meta["key"] == ImportanceTrace.load(trace.folder).meta["key"]


def test_what_a_context_tells_is_lost_where_inputs_were_dealt_out(
    plant: Callable[..., ImportanceTrace], small_facts: OptFacts
) -> None:
    trace = plant(dependent=True)
    options = TrainOptions(neuron_block=8, width=32, epochs=8)
    own, other = (training.train(one, small_facts, options) for one in (trace, context.dealt_out(trace, 0)))
    recall = [context.known(one)["recall"]["neurons"]["0.2"] for one in (own, other)]
    assert recall[0]["predictor"] > recall[0]["normalised"] + 0.2
    assert abs(recall[1]["predictor"] - recall[1]["normalised"]) < 0.1


def test_masks_of_a_prompt_are_those_of_style_shadow_whatever_comes_first(
    whole: Path, run: Screen, tmp_path: Path
) -> None:
    assert run(tmp_path, "--criteria", "plainact", "--styles", "dejavu,shadow") == 0
    mine, other = (
        {
            x["scope"]: x["bits_per_byte"]
            for x in figures(out)
            if x["style"] == "prompt" and x["head_density"] == "0.5" and x["neuron_density"] == "0.5"
        }
        for out in (tmp_path, whole)
    )
    assert mine == other
    assert len(mine) == 2


def test_a_llama_type_model_is_screened_with_all_styles(
    llama_folder: Path, texts: tuple[Path, Path], tmp_path: Path
) -> None:
    """The units are its own: query heads, gated neurons; a token's true scores run backward through them."""
    places = ("--model", str(llama_folder), "--data", str(texts[0]), "--text", str(texts[1]), "--out", str(tmp_path))
    assert command.main([*places, *FLAGS, "--criteria", "fisher,activation,random"]) == 0
    lines = {(x["criterion"], x["style"], x["scope"]): x for x in figures(tmp_path)}
    both = ("local", "global")
    learned = [("shadow", "local"), ("shadow", "global"), ("dejavu", "local"), ("shadow+", "local")]
    wanted = {(c, s, scope) for c in ("fisher", "activation") for s, scope in learned}
    wanted |= {(c, "oracle", scope) for c in ("fisher", "activation") for scope in both}
    assert wanted <= set(lines)
    assert all(float(lines[key]["above_dense"]) for key in wanted)
    assert all(0 < float(lines[key]["active_heads"]) < 1 > float(lines[key]["active_neurons"]) > 0 for key in wanted)


def test_styles_without_a_scope_are_refused(run: Screen, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, run, tmp_path, "--styles", "dejavu,shadow+", "--scopes", "global")
    assert "styles dejavu, shadow+ rank each layer by itself" in said
    assert not (tmp_path / "screen.json").exists()


class Killed(BaseException):
    """As if the process had ended here."""


def test_a_screen_that_is_killed_again_and_again_ends_with_the_same_tables(
    run: Screen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole")
    made: list[str] = []
    lives = 0
    score, train = TorchModel.score, training.train

    def dies(step: Callable[..., Any], what: str) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            if len(made) >= lives:
                raise Killed
            result = step(*arguments, **named)
            made.append(what)
            return result

        return counted

    monkeypatch.setattr(TorchModel, "score", dies(score, "score"))
    monkeypatch.setattr("benchmarks.screen.learned.train", dies(train, "train"))
    for lives in range(5, 100, 9):  # noqa: B007 - `counted` reads it
        try:
            run(tmp_path / "cut")
            break
        except Killed:
            continue
    every = list(made)
    assert every.count("train") == 6
    assert every.count("score") == len(figures(tmp_path / "cut"))
    for name in ("figures.csv", "report.json", "report.md"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    lives = 1 << 30
    run(tmp_path / "cut", "--densities", "0.5,0.25")
    assert made.count("train") == 6
    assert made.count("score") < 2 * len(every)


def test_a_predictor_whose_labels_its_criterion_chose_is_found_again(run: Screen, tmp_path: Path) -> None:
    flags = ("--criteria", "activation,plainact", "--styles", "shadow+", "--densities", "0.5")
    run(tmp_path / "screen", *flags)
    before = (tmp_path / "screen" / "report.json").read_bytes()
    meta = json.loads((tmp_path / "screen" / "predictors" / "activation-shadow+-0" / "predictor.json").read_text())
    assert meta["training"]["labels"] == "expected"
    run(tmp_path / "screen", *flags)
    assert (tmp_path / "screen" / "report.json").read_bytes() == before


def test_outcomes_of_another_predictor_or_trace_are_refused(
    part: Path, run: Screen, capsys: pytest.CaptureFixture[str]
) -> None:
    outcomes = part / "outcomes"
    shutil.rmtree(outcomes / "snip-dejavu-0")
    (outcomes / "plainact-dejavu-0").rename(outcomes / "snip-dejavu-0")
    said = refused(capsys, run, part)
    assert "snip-dejavu-0 holds a sweep of something else: identity is" in said
    assert "trace is" in said


def test_dense_outcomes_of_another_text_are_refused(
    part: Path, run: Screen, capsys: pytest.CaptureFixture[str]
) -> None:
    path = part / "outcomes" / "snip-shadow-0" / "outcomes.jsonl"
    lines = path.read_text().splitlines()
    first = json.loads(lines[0])
    assert first["setting"] == "dense"
    first["items"]["2"] = [[answer[0] - 1.0, *answer[1:]] for answer in first["items"]["2"]]
    path.write_text("\n".join([json.dumps(first), *lines[1:]]) + "\n")
    assert "the dense model answers item 2 otherwise than in outcomes/model" in refused(capsys, run, part)


def test_a_trace_or_a_predictor_of_something_else_is_refused(
    part: Path, run: Screen, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = part / "predictors"
    shutil.rmtree(folder / "snip-shadow-0")
    shutil.copytree(folder / "plainact-shadow-0", folder / "snip-shadow-0")
    said = refused(capsys, run, part)
    assert "is not the predictor that this screen takes; it has another criterion, trace_key" in said
    shutil.rmtree(part / "traces" / "snip")
    shutil.copytree(part / "traces" / "plainact", part / "traces" / "snip")
    assert "is not the trace of snip that this screen takes" in refused(capsys, run, part)


def test_a_folder_of_another_screen_names_what_differs(
    part: Path, run: Screen, texts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write(tmp_path / "other.jsonl", 300, 60)
    assert "holds a screen of something else: calibration is" in refused(capsys, run, part, data=other)
    assert "holds a screen of something else: text is" in refused(capsys, run, part, text=other)
    assert "holds a screen of something else: training is" in refused(capsys, run, part, "--epochs", "2")
    assert "holds something else than a screen" in refused(capsys, run, tmp_path)


def test_a_text_that_was_calibrated_on_is_refused_before_anything_is_recorded(
    run: Screen, texts: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "calibrated on this very text" in refused(capsys, run, tmp_path / "out", text=texts[0])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--criteria", "plainact,nothing"), "unknown criterion 'nothing'; known are activation, "),
        (("--criteria", "magnitude"), "no predictor can learn magnitude, and references need one's units"),
        (("--styles", "shadow,deja"), "unknown style 'deja'"),
        (("--scopes", "layer"), "unknown scope 'layer'"),
        (("--densities", "0.5,half"), "densities are numbers"),
        (("--densities", "1.5"), "a density is the share kept, from 0 to 1"),
        (("--epochs", "shadow=3"), "epochs are a number, or one for each style"),
    ],
)
def test_what_is_not_known_is_refused_with_what_is(
    run: Screen, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str
) -> None:
    assert said in refused(capsys, run, tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_a_criterion_that_cannot_score_the_text_is_left_out_with_its_reason(
    run: Screen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aggregates, "LEAST_CLASS", 10_000)
    run(tmp_path / "out", "--criteria", "plainact,epenas", "--styles", "shadow", "--scopes", "local")
    assert {x["criterion"] for x in figures(tmp_path / "out")} == {"plainact", ""}
    assert "- `epenas` is left out: epenas compares positions" in (tmp_path / "out" / "report.md").read_text()


def test_without_matplotlib_the_figures_are_written_and_the_lack_is_told(
    part: Path, run: Screen, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (part / "quality.png").unlink(missing_ok=True)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(part) == 0
    assert "no picture: matplotlib is not installed" in capsys.readouterr().err
    assert (part / "figures.csv").is_file()
    assert not (part / "quality.png").exists()


def test_the_best_of_three_by_their_means_even_where_styles_disagree() -> None:
    """Made-up figures: `b` wins one style, `a` the mean."""

    def line(criterion: str, style: str, bits: float) -> Line:
        metric = Metric("bits_per_byte", "bits", (bits, bits), (1.0, 1.0))
        row = Row(cast("Any", None), Setting(), (metric,), (), (), 1.0, 1.0, 1.0, 0.0, 0.0)
        return Line(criterion, style, 0, row)

    lines = [line("a", "shadow", 2.0), line("a", "dejavu", 1.0), line("b", "shadow", 1.8), line("b", "dejavu", 1.3)]
    static = Line("c", "static", None, line("c", "static", 0.1).row)
    assert table.best_criteria([*lines, static], 3) == ["a", "b"]
