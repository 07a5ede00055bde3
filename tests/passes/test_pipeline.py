# SPDX-License-Identifier: Apache-2.0
"""The schedule and the runner of passes."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from shadowc.pipeline import REPORT_FILE, run_passes, schedule
from shadowc.spec.errors import InternalError, UnsupportedError
from tests.trace import deep

SPARSE = [
    "canonicalise", "insert_predictor", "sparsify_attention", "fill_heads", "sparsify_ffn", "cluster_neurons",
    "fuse_predictor",
]  # fmt: skip
LAST = ["finalise", "fold_norms"]
DENSE = ["canonicalise", "sparsify_attention", "sparsify_ffn"]


@pytest.mark.parametrize(
    ("weights", "sparse", "expected"),
    [
        ("fp32", True, [*SPARSE, *LAST]),
        *((weights, True, [*SPARSE, "quantise", "narrow_cache", *LAST]) for weights in ("bf16", "int8", "int4")),
        ("fp32", False, [*DENSE, *LAST]),
        ("int8", False, [*DENSE, "quantise", "narrow_cache", *LAST]),
    ],
)
def test_schedule_lists_the_passes_of_an_engine(weights: str, sparse: bool, expected: list[str]) -> None:
    steps = schedule(target="cpu", weights=weights, skip_zeros=True, sparse=sparse)
    assert [step.name for step in steps] == expected


@pytest.mark.parametrize(("target", "weights"), [("tpu", "fp32"), ("cpu", "int3"), ("tensorrt", "int4")])
def test_schedule_refuses_what_it_does_not_know_with_a_hint(target: str, weights: str) -> None:
    with pytest.raises(UnsupportedError, match="expected one of") as caught:
        schedule(target=target, weights=weights, skip_zeros=False, sparse=True)
    assert caught.value.hint


def test_skip_zeros_reaches_every_ffn() -> None:
    for flag in (False, True):
        nodes = deep.compiled(deep.plan(), skip_zeros=flag).graph.nodes
        assert {node.attrs["skip_zeros"] for node in nodes if node.op == "SparseFFN"} == {int(flag)}


def test_plan_and_schedule_have_to_agree() -> None:
    dense, sparse = (
        schedule(target="cpu", weights="fp32", skip_zeros=False, sparse=sparse) for sparse in (False, True)
    )
    with pytest.raises(InternalError, match="no sparsity plan"):
        run_passes(deep.traced(), sparse)
    with pytest.raises(InternalError, match="no predictor"):
        run_passes(deep.traced(deep.plan()), dense)


def test_dump_holds_the_graph_after_every_pass_and_all_counts(tmp_path: Path) -> None:
    steps = schedule(target="cpu", weights="int8", skip_zeros=True, sparse=True)
    reports = run_passes(deep.traced(deep.plan()), steps, tmp_path / "dump")
    names = sorted(path.name for path in (tmp_path / "dump").iterdir())
    expected = [f"{number:02d}-{name}.onnx" for number, name in enumerate(["trace", *(step.name for step in steps)])]
    assert names == [*expected, REPORT_FILE]
    for name in expected:
        onnx.checker.check_model(onnx.load(tmp_path / "dump" / name))
    written = json.loads((tmp_path / "dump" / REPORT_FILE).read_text(encoding="utf-8"))
    assert [(entry["name"], entry["counts"]) for entry in written] == [(entry.name, entry.counts) for entry in reports]


def test_dump_is_byte_identical_when_repeated(tmp_path: Path) -> None:
    steps = schedule(target="cpu", weights="int8", skip_zeros=True, sparse=True)
    contents = []
    for folder in (tmp_path / "once", tmp_path / "again"):
        run_passes(deep.traced(deep.plan()), steps, folder)
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert contents[0] == contents[1]
