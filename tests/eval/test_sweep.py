# SPDX-License-Identifier: Apache-2.0
"""A sweep that was killed goes on where it was; nothing is computed twice; tables say what was measured."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shadowc.eval import sweep
from shadowc.eval.request import Setting
from shadowc.eval.run import Evaluation, evaluate, settings_of
from shadowc.eval.store import Store
from shadowc.eval.task import TASKS
from shadowc.eval.task_corpus import task_corpus
from shadowc.eval.texts import corpus_of
from shadowc.eval.torch_model import TorchModel
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError
from shadowc.spec.progress import Event, EventProgress, NullProgress
from tests.eval.conftest import PROSE
from tests.eval.task_files import write_tasks

HALF = Density(0.5, 0.25)
SETTINGS = settings_of(["predictor", "normalised"], [Density(), HALF], ["decode"])


def run(folder: Path, model: TorchModel, settings: list[Setting] | None = None) -> Evaluation:
    corpora = [corpus_of(model, "prose", [f"{n} {PROSE}" for n in range(12)], "0", 24)]
    return sweep.run(folder, model, corpora, SETTINGS if settings is None else settings, 0, NullProgress())


class CountedModel(TorchModel):
    """Counts what it is asked, and dies after so many askings."""

    asked: list[tuple[str, int]]
    lives: int = 1 << 30

    def score(self, requests: Any, setting: Setting) -> Any:
        if len(self.asked) >= self.lives:
            raise KeyboardInterrupt
        self.asked.append((setting.key, len(requests)))
        return super().score(requests, setting)


@pytest.fixture
def counted(in_torch: TorchModel, monkeypatch: pytest.MonkeyPatch) -> CountedModel:
    monkeypatch.setattr("shadowc.eval.run.TOKENS_AT_ONCE", 120)
    model = CountedModel(in_torch._model, in_torch._checkpoint, in_torch._predictor)
    model.asked = []
    return model


def test_an_interrupted_sweep_goes_on_and_computes_nothing_twice(counted: CountedModel, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", counted)
    every = list(counted.asked)
    assert len(every) > 10
    counted.asked, counted.lives = [], 7
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", counted)
    counted.lives = 1 << 30
    resumed = run(tmp_path / "cut", counted)
    assert counted.asked == every
    for one, other in zip(whole.rows, resumed.rows, strict=True):
        assert one.metrics == other.metrics
    for name in (sweep.FIGURES_FILE, sweep.REPORT_FILE, sweep.TABLE_FILE):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_a_store_that_forgets_would_be_noticed(
    counted: CountedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "out", counted)
    before = len(counted.asked)
    monkeypatch.setattr(Store, "_read", lambda self, path: None)
    run(tmp_path / "out", counted)
    assert len(counted.asked) == 2 * before


def test_more_densities_cost_only_themselves_and_the_dense_model_is_asked_once(
    counted: CountedModel, tmp_path: Path
) -> None:
    run(tmp_path / "out", counted)
    keys = [key for key, _ in counted.asked]
    assert set(keys) == {"dense", "predictor 0.5/0.25 decode", "normalised 0.5/0.25 decode"}  # density 1 is dense
    assert keys.count("dense") == keys.count("predictor 0.5/0.25 decode")
    counted.asked = []
    run(tmp_path / "out", counted, [*SETTINGS, Setting("predictor", Density(0.25, 0.25))])
    assert {key for key, _ in counted.asked} == {"predictor 0.25/0.25 decode"}


def test_a_line_that_was_cut_short_is_dropped_and_computed_again(counted: CountedModel, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    whole = run(folder, counted)
    path = folder / "outcomes.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[:-20])
    counted.asked = []
    again = run(folder, counted)
    assert len(counted.asked) == 1
    assert path.read_bytes() == content
    assert [row.metrics for row in again.rows] == [row.metrics for row in whole.rows]


CHILD = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from shadowc.eval import run as running
from shadowc.eval.load import torch_model
from shadowc.sparsity.importance import Origin
from tests.eval.test_sweep import run
running.TOKENS_AT_ONCE = 120
compute = running._compute
def told(*arguments):
    compute(*arguments)
    print("done", flush=True)
running._compute = told
run(Path(sys.argv[3]), torch_model(Origin(sys.argv[1], "auto", 0), Path(sys.argv[2])))
"""


@pytest.mark.slow
def test_a_killed_process_leaves_what_it_has_computed(
    counted: CountedModel, tiny_checkpoint: Path, predictor_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    arguments = [sys.executable, "-c", textwrap.dedent(CHILD), str(tiny_checkpoint), str(predictor_folder), str(folder)]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=Path(__file__).parents[2]
    ) as child:
        assert child.stdout is not None
        for _ in range(4):
            assert child.stdout.readline() == "done\n"
        os.kill(child.pid, signal.SIGKILL)
    known = len((folder / "outcomes.jsonl").read_text().splitlines())
    assert known >= 4
    run(folder, counted)
    resumed = len(counted.asked)
    counted.asked = []
    run(tmp_path / "whole", counted)
    assert resumed <= len(counted.asked) - 4


def test_a_sweep_of_something_else_is_refused_with_what_differs(
    in_torch: TorchModel, counted: CountedModel, tmp_path: Path
) -> None:
    run(tmp_path / "out", in_torch)
    other = TorchModel(in_torch._model, in_torch._checkpoint, None)
    with pytest.raises(InputError, match=r"a sweep of something else: identity is .* predictor .*, now") as caught:
        run(tmp_path / "out", other, [Setting("random", HALF)])
    assert caught.value.hint == "--sweep with another folder"
    predictor = in_torch._predictor
    assert predictor is not None
    ranked = {**predictor.controls, "static-magnitude": predictor.controls["normalised"]}
    retaught = TorchModel(in_torch._model, in_torch._checkpoint, replace(predictor, controls=ranked))
    with pytest.raises(InputError, match="a sweep of something else: identity is"):
        run(tmp_path / "out", retaught)
    with pytest.raises(InputError, match="holds something else than a sweep"):
        sweep.check(Path(__file__).parent)
    with pytest.raises(InputError, match="is a file"):
        sweep.check(Path(__file__))


@pytest.mark.parametrize(
    "damage",
    [
        b"\xff", b"\0\0\0\0", b"not JSON", b"[]", b"{}", b'{"corpus": [], "setting": "dense", "items": {}}',
        b'{"corpus": "prose", "setting": "dense", "items": []}',
        b'{"corpus": "prose", "setting": "dense", "items": {"0": [[1.0]]}}',
        b'{"corpus": "prose", "setting": "dense", "items": {"0": [[1.0, true, Infinity, 0, 0]]}}',
    ],
)  # fmt: skip
def test_a_damaged_line_is_named_and_taking_it_out_helps(counted: CountedModel, tmp_path: Path, damage: bytes) -> None:
    run(tmp_path, counted)
    path = tmp_path / "outcomes.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damage, *lines[2:]]) + b"\n")
    with pytest.raises(InputError, match=r"outcomes\.jsonl, line 2 is damaged") as caught:
        run(tmp_path, counted)
    command = caught.value.hint.partition(" takes it out")[0]
    subprocess.run(command, shell=True, check=True)
    counted.asked = []
    run(tmp_path, counted)
    assert len(counted.asked) == 1


@pytest.mark.parametrize("content", ["[]", "{", "null", "[" * 100_000], ids=["list", "cut", "null", "deep"])
def test_a_damaged_description_of_a_sweep_is_refused(in_torch: TorchModel, tmp_path: Path, content: str) -> None:
    run(tmp_path, in_torch, SETTINGS[:1])
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(InputError, match=r"sweep\.json is damaged") as caught:
        run(tmp_path, in_torch, SETTINGS[:1])
    assert "--sweep OTHER" in caught.value.hint


def test_two_sweeps_at_once_in_one_folder_are_refused(in_torch: TorchModel, tmp_path: Path) -> None:
    with (
        Store().kept_in(tmp_path, {}),
        pytest.raises(InputError, match="another process writes to"),
        Store().kept_in(tmp_path, {}),
    ):
        pass


def test_the_tidy_table_has_a_line_per_figure_and_says_how_it_was_measured(
    in_torch: TorchModel, tmp_path: Path
) -> None:
    evaluation = run(tmp_path / "out", in_torch)
    lines = list(csv.DictReader((tmp_path / "out" / "figures.csv").read_text().splitlines()))
    assert len(lines) == sum(len(row.metrics) for row in evaluation.rows) == 5 * 2
    last = [line for line in lines if line["metric"] == "bits_per_byte"][-1]
    row = evaluation.rows[-1]
    assert (last["method"], last["protocol"], last["head_density"], last["neuron_density"]) == (
        "normalised", "decode", "0.5", "0.25",
    )  # fmt: skip
    assert float(last["value"]) == row.metrics[0].value
    assert float(last["low"]) < float(last["value"]) < float(last["high"])
    assert float(last["effective_sparsity"]) == row.sparsity > 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["protocols"]["decode"].startswith("every token behind the dense prompt under a mask of its own")
    (compared,) = [one for one in report["corpora"][0]["comparisons"] if one["head_density"] == 0.5]
    assert compared["methods"] == ["predictor", "normalised"]
    assert compared["value"] == evaluation.rows[3].metrics[0].value - row.metrics[0].value
    table = (tmp_path / "out" / "report.md").read_text()
    assert "- `decode`: every token" in table
    assert "| predictor - normalised | 0.5 | 0.25 | decode |" in table


def test_tasks_and_texts_go_together(in_torch: TorchModel, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    corpora = [
        corpus_of(in_torch, "prose", [PROSE], "0", 24),
        *(task_corpus(in_torch, tasks, TASKS[name], shots) for name in ("rte", "hellaswag") for shots in (0, 2)),
    ]
    seen: list[Event] = []
    evaluation = evaluate(in_torch, corpora, SETTINGS, progress=EventProgress(seen.append))
    by_corpus = {row.corpus.name: row for row in evaluation.rows if row.setting == SETTINGS[2]}
    assert by_corpus["rte, 0 shots"].masked_share < by_corpus["hellaswag, 0 shots"].masked_share < 1
    assert by_corpus["prose"].masked_share > 0.9
    assert [metric.name for metric in by_corpus["hellaswag, 2 shots"].metrics] == ["acc", "acc_norm"]
    last = [event for event in seen if event.total][-1]
    assert last.done == last.total


def test_pictures_are_drawn_where_matplotlib_is(in_torch: TorchModel, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run(tmp_path / "out", in_torch)
    for name in (sweep.QUALITY_FILE, sweep.RECALL_FILE):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_figures_are_written_and_the_lack_is_told(
    in_torch: TorchModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    seen: list[Event] = []
    corpora = [corpus_of(in_torch, "prose", [PROSE], "0", 24)]
    sweep.run(tmp_path / "out", in_torch, corpora, SETTINGS, 0, EventProgress(seen.append))
    notes = [event.text for event in seen if event.kind == "note"]
    assert notes == ["no pictures: matplotlib is not installed; pip install 'shadowc[plot]'"]
    assert (tmp_path / "out" / "figures.csv").is_file()
    assert not (tmp_path / "out" / sweep.QUALITY_FILE).exists()
