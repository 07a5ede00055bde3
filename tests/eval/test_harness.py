# SPDX-License-Identifier: Apache-2.0
"""lm-eval's own templates, on the same files, give what `shadowc eval` gives: to the last digit.

They run where lm-eval is installed. The last test makes such an environment.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shadowc.eval.request import Outcome, Setting
from shadowc.eval.run import evaluate
from shadowc.eval.store import Store
from shadowc.eval.task import TASKS
from shadowc.eval.task_corpus import task_corpus
from shadowc.eval.texts import wikitext_corpus
from shadowc.spec.density import Density
from tests.eval.task_files import WIKITEXT, write_lines, write_tasks

TOP = Path(__file__).parents[2]
HERE = importlib.util.find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not HERE, reason="lm-eval is not installed")
PUBLISHED = {
    "piqa": "piqa/piqa.yaml",
    "copa": "super_glue/copa/default.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "winogrande": "winogrande/default.yaml",
    "rte": "glue/rte/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "wikitext": "wikitext/wikitext.yaml",
}
"""The definitions that lm-eval carries, below its folder of tasks."""
DENSITY = Density(0.5, 0.25)
LOCAL = """include: {published}
task: local_{name}
dataset_path: json
dataset_name: null
dataset_kwargs:
  data_files:
    test: {folder}/eval.jsonl
    fewshot: {folder}/fewshot.jsonl
training_split: null
validation_split: null
test_split: test
fewshot_split: fewshot
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks and WikiText pages."""
    base = write_tasks(tmp_path_factory.mktemp("harness") / "tasks")
    (base / "wiki.raw").write_text(WIKITEXT, "utf-8")
    return base


@pytest.fixture(scope="module")
def quiet_lm_eval(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Without network, and with caches of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


def of_lm_eval(folder: Path, base: Path, model: Any, names: tuple[str, ...], shots: int) -> dict[str, Any]:
    """What lm-eval says of tasks with local files, and its requests."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    root = Path(lm_eval.__file__).parent / "tasks"
    for name in names:
        text = LOCAL.format(published=root / PUBLISHED[name], name=name, folder=folder / name)
        (base / f"{name}.yaml").write_text(text, "utf-8")
    return dict(
        lm_eval.simple_evaluate(
            model=model,
            tasks=[f"local_{name}" for name in names],
            num_fewshot=shots,
            task_manager=TaskManager(include_path=str(base), include_defaults=False),
            log_samples=True,
        )
    )


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shots", [0, 5])
def test_lm_eval_and_eval_agree_to_the_last_digit(
    tiny_checkpoint: Path, predictor_folder: Path, folder: Path, tmp_path: Path, quiet_lm_eval: None, shots: int
) -> None:
    from shadowc.eval.harness import ShadowcLM

    model = ShadowcLM(model=str(tiny_checkpoint), predictor=str(predictor_folder), density="0.5/0.25")
    theirs = of_lm_eval(folder, tmp_path, model, tuple(TASKS), shots)
    setting = Setting("predictor", DENSITY)
    for name, task in TASKS.items():
        corpus, store = task_corpus(model.evaluated, folder, task, shots), Store()
        _, row = evaluate(model.evaluated, [corpus], [setting], store=store).rows
        found = theirs["results"][f"local_{name}"]
        for metric in row.metrics:
            assert found[f"{metric.name},none"] == metric.value, name
            assert found[f"{metric.name}_stderr,none"] == metric.standard_error, name
        outcomes = store.of((corpus.key, setting.key))
        for index, sample in enumerate(sorted(theirs["samples"][f"local_{name}"], key=lambda one: one["doc_id"])):
            pairs = _with_front(corpus.questions[index].pairs, sample["arguments"])
            assert [tuple(pair) for pair in sample["arguments"]] == pairs, name
            assert [_answer(one) for one in sample["filtered_resps"]] == list(map(_ours, outcomes[index])), name


def _with_front(pairs: tuple[tuple[str, str], ...], arguments: Any) -> list[tuple[str, str]]:
    """Our pairs behind the solved examples that lm-eval has drawn; equal log-likelihoods say that ours are the same."""
    front = arguments[0][0].removesuffix(pairs[0][0])
    return [(front + prompt, text) for prompt, text in pairs]


def _answer(response: Any) -> tuple[float, bool]:
    return float(response[0]), str(response[1]) == "True"


def _ours(outcome: Outcome) -> tuple[float, bool]:
    return outcome.log_probability, outcome.greedy


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_wikitext_is_lm_evals(tiny_checkpoint: Path, folder: Path, tmp_path: Path, quiet_lm_eval: None) -> None:
    from shadowc.eval.harness import ShadowcLM
    from shadowc.eval.wikitext import pages

    model = ShadowcLM(model=str(tiny_checkpoint))
    for name in ("eval", "fewshot"):
        write_lines(folder / "wikitext" / f"{name}.jsonl", [{"page": page} for page in pages(WIKITEXT)])
    theirs = of_lm_eval(folder, tmp_path, model, ("wikitext",), 0)["results"]["local_wikitext"]
    corpus = wikitext_corpus(model.evaluated, folder / "wiki.raw")
    (dense,) = evaluate(model.evaluated, [corpus], []).rows
    assert len(corpus.items) > len(corpus.documents) == 2
    for metric in dense.metrics:
        if f"{metric.name},none" in theirs:
            assert theirs[f"{metric.name},none"] == pytest.approx(metric.value, rel=1e-12)
    assert {f"{metric.name},none" for metric in dense.metrics} >= {
        name for name in theirs if ",none" in name and "stderr" not in name
    }


@needs_lm_eval
def test_arguments_that_the_model_does_not_have_are_refused(tiny_checkpoint: Path) -> None:
    from shadowc.eval.harness import ShadowcLM
    from shadowc.spec.errors import InputError

    with pytest.raises(InputError, match="has no dtype"):
        ShadowcLM(model=str(tiny_checkpoint), dtype="float16")
    with pytest.raises(InputError, match="an engine or a model"):
        ShadowcLM()


@pytest.mark.timeout(1800)
@pytest.mark.network
@pytest.mark.slow
@pytest.mark.skipif(HERE, reason="lm-eval is installed here: the tests above ran")
def test_they_agree_in_an_environment_with_lm_eval(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "lm-eval>=0.4.9"], check=True)
    ours = os.pathsep.join((str(TOP), sysconfig.get_paths()["purelib"]))
    run = subprocess.run(
        [python, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", __file__, "-m", "not network"],
        cwd=TOP,
        env={**os.environ, "PYTHONPATH": ours},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    assert "4 passed" in run.stdout, run.stdout
    assert "skipped" not in run.stdout
