# SPDX-License-Identifier: Apache-2.0
"""What further commands measure in a sweep's folder stands beside what was there, and nothing stale stays."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from shadowc.eval import sweep
from shadowc.eval.corpus import Corpus
from shadowc.eval.load import engine_model
from shadowc.eval.request import Protocol, Setting
from shadowc.eval.run import Evaluation, evaluate, settings_of
from shadowc.eval.task import TASKS
from shadowc.eval.task_corpus import task_corpus
from shadowc.eval.texts import corpus_of
from shadowc.eval.torch_model import TorchModel
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError
from shadowc.spec.progress import NullProgress
from tests.eval.conftest import PROSE
from tests.eval.task_files import write_tasks

HALF, QUARTER = Density(0.5, 0.5), Density(0.25, 0.25)
DECODE: tuple[Protocol, ...] = ("decode",)


@pytest.fixture
def one(in_torch: TorchModel) -> Corpus:
    return corpus_of(in_torch, "one.txt", [PROSE], "1", 24)


@pytest.fixture
def other(in_torch: TorchModel) -> Corpus:
    return corpus_of(in_torch, "other.txt", [f"Elsewhere {PROSE}"], "2", 24)


def run(folder: Path, model: TorchModel, corpora: Sequence[Corpus], settings: Sequence[Setting]) -> Evaluation:
    return sweep.run(folder, model, corpora, settings, 0, NullProgress())


def lines(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / sweep.FIGURES_FILE).read_text().splitlines()))


def measured(folder: Path) -> list[tuple[str, ...]]:
    """Text, method, density and protocol of every row."""
    names = ("corpus", "method", "head_density", "protocol")
    return [tuple(line[name] for name in names) for line in lines(folder) if line["metric"] == "bits_per_byte"]


def test_other_methods_densities_and_protocols_stand_beside_the_earlier_ones(
    in_torch: TorchModel, one: Corpus, tmp_path: Path
) -> None:
    run(tmp_path, in_torch, [one], settings_of(["predictor", "oracle"], [HALF], DECODE))
    run(tmp_path, in_torch, [one], settings_of(["predictor"], [HALF, QUARTER], DECODE))
    shown = run(tmp_path, in_torch, [one], settings_of(["prompt"], [HALF], ["prompt"]))
    assert [row.setting.method for row in shown.rows] == ["dense", "prompt"]  # the command's own
    assert measured(tmp_path) == [
        ("one.txt", "dense", "1.0", ""),
        ("one.txt", "predictor", "0.5", "decode"),
        ("one.txt", "oracle", "0.5", "decode"),
        ("one.txt", "predictor", "0.25", "decode"),
        ("one.txt", "prompt", "0.5", "prompt"),
    ]


def test_several_commands_give_the_figures_and_comparisons_of_a_single_one(
    in_torch: TorchModel, one: Corpus, other: Corpus, tmp_path: Path
) -> None:
    settings = settings_of(["predictor", "static"], [HALF], DECODE)
    run(tmp_path / "single", in_torch, [one, other], settings)
    for corpus in (one, other):
        for setting in settings:
            run(tmp_path / "several", in_torch, [corpus], [setting])
    for name in (sweep.FIGURES_FILE, sweep.REPORT_FILE, sweep.TABLE_FILE):
        assert (tmp_path / "several" / name).read_text() == (tmp_path / "single" / name).read_text(), name
    report = json.loads((tmp_path / "several" / "report.json").read_text())
    assert [corpus["comparisons"][0]["methods"] for corpus in report["corpora"]] == [["predictor", "static"]] * 2


def test_a_row_that_is_measured_again_is_there_once(in_torch: TorchModel, one: Corpus, tmp_path: Path) -> None:
    settings = settings_of(["predictor", "random"], [HALF], DECODE)
    run(tmp_path, in_torch, [one], settings)
    before = (tmp_path / sweep.FIGURES_FILE).read_text(), (tmp_path / sweep.ROWS_FILE).read_text()
    run(tmp_path, in_torch, [one], settings)
    assert ((tmp_path / sweep.FIGURES_FILE).read_text(), (tmp_path / sweep.ROWS_FILE).read_text()) == before


def test_dense_starts_of_their_own_are_told_apart(in_torch: TorchModel, one: Corpus, tmp_path: Path) -> None:
    for tokens in (None, 4):
        run(tmp_path, in_torch, [one], [Setting("predictor", HALF, prompt_tokens=tokens)])
    table = (tmp_path / sweep.TABLE_FILE).read_text()
    assert "| predictor | 0.5 | 0.5 | decode |" in table
    assert "| predictor | 0.5 | 0.5 | decode, 4 dense |" in table


def test_the_map_is_of_the_first_text_that_has_one_and_grows_with_it(
    in_torch: TorchModel, one: Corpus, other: Corpus, tmp_path: Path
) -> None:
    def shown() -> tuple[str, int]:
        data = json.loads((tmp_path / sweep.HEAT_DATA_FILE).read_text())
        return data["corpus"], len(data["maps"])

    both = settings_of(["predictor", "oracle"], [HALF], DECODE)
    run(tmp_path, in_torch, [one], both[:1])
    assert not (tmp_path / sweep.HEAT_DATA_FILE).exists()
    run(tmp_path, in_torch, [other], both)
    assert shown() == ("other.txt", 2)
    run(tmp_path, in_torch, [one], both[1:])  # the predictor's masks are there from the first command
    assert shown() == ("one.txt", 2)
    run(tmp_path, in_torch, [other], settings_of(["predictor", "oracle"], [QUARTER], DECODE))
    assert shown() == ("one.txt", 2)
    run(tmp_path, in_torch, [one], settings_of(["predictor", "oracle"], [QUARTER], DECODE))
    assert shown() == ("one.txt", 4)


def test_pictures_of_before_do_not_stay_where_none_can_be_drawn(
    in_torch: TorchModel, one: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run(tmp_path, in_torch, [one], settings_of(["predictor", "oracle"], [HALF], DECODE))
    pictures = [tmp_path / name for name in (sweep.QUALITY_FILE, sweep.HEAT_FILE)]
    for path in pictures:
        path.write_bytes(b"of before")
    run(tmp_path, in_torch, [one], settings_of(["predictor"], [QUARTER], DECODE))
    assert not any(path.exists() for path in pictures)
    assert (tmp_path / sweep.HEAT_DATA_FILE).exists()  # still of what the folder holds


def test_a_folder_from_before_rows_were_kept_shows_what_it_can(
    in_torch: TorchModel, one: Corpus, other: Corpus, tmp_path: Path
) -> None:
    both = settings_of(["predictor", "oracle"], [HALF], DECODE)
    run(tmp_path, in_torch, [one], both)
    (tmp_path / sweep.ROWS_FILE).unlink()
    run(tmp_path, in_torch, [other], both[:1])
    assert [line[:2] for line in measured(tmp_path)] == [("other.txt", "dense"), ("other.txt", "predictor")]
    assert not (tmp_path / sweep.HEAT_DATA_FILE).exists()  # of a text that no table has
    run(tmp_path, in_torch, [one], both)
    assert len(measured(tmp_path)) == 2 + 3


@pytest.mark.parametrize("damage", [b"\xff", b"[]", b"{}", b'{"corpus": {}}', b"null"])
def test_a_damaged_row_is_named_and_what_is_proposed_helps(
    in_torch: TorchModel, one: Corpus, tmp_path: Path, damage: bytes
) -> None:
    settings = settings_of(["predictor"], [HALF], DECODE)
    run(tmp_path, in_torch, [one], settings)
    path = tmp_path / sweep.ROWS_FILE
    path.write_bytes(path.read_bytes().splitlines()[0] + b"\n" + damage + b"\n")
    with pytest.raises(InputError, match=r"rows\.jsonl, line 2 is damaged") as caught:
        run(tmp_path, in_torch, [one], settings)
    subprocess.run(caught.value.hint.partition(";")[0], shell=True, check=True)
    run(tmp_path, in_torch, [one], settings)
    assert len(measured(tmp_path)) == 2


def test_tasks_of_several_commands_have_means_where_a_setting_is_known_of_all(
    in_torch: TorchModel, tmp_path: Path
) -> None:
    folder, out = write_tasks(tmp_path / "tasks"), tmp_path / "out"
    copa, piqa, few_piqa, rte = (
        task_corpus(in_torch, folder, TASKS[name], limit=limit)
        for name, limit in (("copa", None), ("piqa", None), ("piqa", 3), ("rte", None))
    )
    half, quarter = Setting("predictor", HALF), Setting("predictor", QUARTER)
    run(out, in_torch, [copa, piqa], [half, quarter])
    first = json.loads((out / sweep.REPORT_FILE).read_text())["means"]
    run(out, in_torch, [few_piqa, rte], [half])
    means = json.loads((out / sweep.REPORT_FILE).read_text())["means"]
    of_three = [mean for mean in means if mean["tasks"] == ["copa", "piqa", "rte"]]
    assert [(mean["method"], mean["head_density"]) for mean in of_three] == [("dense", 1.0), ("predictor", 0.5)]
    assert [mean for mean in means if mean not in of_three] == first  # two tasks, the larger piqa
    expected = evaluate(in_torch, [copa, piqa, rte], [half]).means
    assert [mean["value"] for mean in of_three] == [mean.value for mean in expected]
    assert "copa, piqa, rte" in (out / sweep.TABLE_FILE).read_text()


def test_masks_that_hold_for_other_spans_are_another_sweep(engine_folders: dict[str, Path], tmp_path: Path) -> None:
    compiled, fresh = (engine_model(engine_folders["sequence"], refresh=refresh) for refresh in (None, 4))
    corpus = corpus_of(compiled, "one.txt", [PROSE], "1", 24)
    setting = Setting("predictor", HALF, "prompt", prompt_tokens=4)
    sweep.run(tmp_path, compiled, [corpus], [setting], 0, NullProgress())
    with pytest.raises(InputError, match=r"a sweep of something else: identity is .*, now .* refresh 4"):
        sweep.run(tmp_path, fresh, [corpus], [setting], 0, NullProgress())
    rows = [evaluate(model, [corpus], [setting]).rows[1] for model in (compiled, fresh)]
    assert rows[0].metrics[0].value != rows[1].metrics[0].value
