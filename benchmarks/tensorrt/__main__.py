# SPDX-License-Identifier: Apache-2.0
"""Prints the table: plan size, build time, memory and what the runtime needs, one row per way. See the package."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

import shadowc
from benchmarks.tensorrt.graphs import joined, with_constants
from shadowc.emit.tensorrt.builder import private_links
from shadowc.emit.tensorrt.checks import builder_of, plugin_of
from shadowc.spec.manifest import WEIGHTS_FILE, EngineManifest, PlanTensor, TensorRtPart

TARGET = "tensorrt-rtx"
Profile = dict[str, tuple[tuple[int, ...], ...]]
"""Input -> its smallest, best and largest sizes."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to hold both phases."""

    title: str
    plans: tuple[tuple[str, tuple[Profile, ...]], ...]
    """Graph and profiles of each plan."""
    runtime: str
    """What it asks of the program that runs it."""


def main(arguments: list[str]) -> None:
    """Compile, build every way, print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tensorrt", description=__doc__)
    parser.add_argument("model", help="its shape with random weights, such as opt-mini or opt-1.3b")
    parser.add_argument("--engine", type=Path, help="a folder that `shadowc compile` made; default: compile one")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="shadowc-ways-") as name:
        scratch = Path(name)
        folder = given.engine or shadowc.compile(
            shadowc.CompileOptions(model=given.model, load_format="dummy", target=TARGET, out=scratch / "engine")
        )
        part = EngineManifest.model_validate_json((Path(folder) / "engine.json").read_bytes()).tensorrt
        if part is None:
            parser.error(f"{folder} is not an engine for TensorRT")
        write_graphs(Path(folder).resolve(), part, scratch)
        _say("way", "plan", "MB", "seconds of CPU", "peak GB", "what the runtime needs")
        _say(*["---"] * 6)
        for way in ways(part):
            for graph, profiles in way.plans:
                _say(way.title, graph, *measured(scratch, graph, profiles), way.runtime)


def ways(part: TensorRtPart) -> Iterator[Way]:
    """All of them, the chosen one first."""
    plans = {name: plan.inputs for name, plan in part.plans.items()}
    decode, prefill = (ranges(plans[name]) for name in ("decode", "prefill"))
    whole = tuple(sizes[1] for sizes in prefill["input_ids"])
    step, prompt = (ranges(plans["decode"], tokens=one) for one in ((1, 1, 1), whole))
    bound = {name: sum(one.kind == "weight" for one in inputs) for name, inputs in plans.items()}
    table = f"{bound['decode']} and {bound['prefill']} addresses bound once a context; one copy of the weights"
    yield Way("two plans, weights as inputs (chosen)", (("decode", (decode,)), ("prefill", (prefill,))), table)
    yield Way(
        "two plans, weights as constants", (("decode-constants", (decode,)), ("prefill-constants", (prefill,))),
        "a copy of the weights per plan, on disk and on the device",
    )  # fmt: skip
    slow = "prompts run through the sparse kernels"
    yield Way("one plan, two profiles, weights as inputs", (("decode", (step, prompt)),), slow)
    yield Way("one plan, two profiles, weights as constants", (("decode-constants", (step, prompt)),), slow)
    yield Way(
        "prefill plan with two profiles, constants",
        (("prefill-constants", (ranges(plans["prefill"], tokens=(1, 1, 1)), prefill)),),
        "no sparsity; shows what profiles cost where weights feed products",
    )
    both = {**decode, **prefill}
    either = "input_ids and every cache fit both branches"
    yield Way("one plan with an ONNX If, weights as inputs", (("either", (both,)),), either)
    yield Way("one plan with an ONNX If, weights as constants", (("either-constants", (both,)),), either)


def ranges(inputs: tuple[PlanTensor, ...], tokens: tuple[int, ...] | None = None) -> Profile:
    """The profile of a plan's inputs, with other numbers of new tokens if given."""
    made: Profile = {}
    for tensor in inputs:
        if tensor.smallest and tensor.best and tensor.largest:
            made[tensor.name] = (tensor.smallest, tensor.best, tensor.largest)
            if tokens and tensor.kind == "token":
                batches = [sizes[0] for sizes in made[tensor.name]]
                made[tensor.name] = tuple(zip(batches, tokens, strict=True))
    return made


def write_graphs(folder: Path, part: TensorRtPart, scratch: Path) -> None:
    """Every graph that `ways` names, beside a link to the engine's weights."""
    (scratch / WEIGHTS_FILE).symlink_to(folder / WEIGHTS_FILE)
    graphs = {str(name): onnx.load(folder / plan.onnx) for name, plan in part.plans.items()}
    graphs["either"] = joined(graphs["prefill"], graphs["decode"])
    for name, graph in graphs.items():
        (scratch / f"{name}.onnx").write_bytes(graph.SerializeToString())
        constant = with_constants(graph, part.weights)
        (scratch / f"{name}-constants.onnx").write_bytes(constant.SerializeToString())


def measured(scratch: Path, graph: str, profiles: tuple[Profile, ...]) -> tuple[str, str, str]:
    """Megabytes, seconds and gigabytes of one build; why not, where the builder refuses or dies."""
    bindings = builder_of(TARGET)
    request = {
        "family": bindings.family, "plugin": str(plugin_of(bindings).resolve()), "profiles": profiles,
        "onnx": str(scratch / f"{graph}.onnx"), "plan": str(scratch / "plan"),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as links:
        names = private_links(bindings, Path(links) / "lib")
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.tensorrt.one_build"], input=json.dumps(request), text=True,
            env=os.environ | ({} if names is None else {"LD_LIBRARY_PATH": str(names)}),
            capture_output=True, check=False,
        )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
        return f"fails, exit {done.returncode}: {last}", "", ""
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if answer["error"]:
        return f"fails: {answer['error']}", "", ""
    return f"{answer['bytes'] / 1e6:,.1f}", f"{answer['seconds']:.1f}", f"{answer['peak'] / 1e9:.2f}"


def _say(*cells: str) -> None:
    sys.stdout.write(f"| {' | '.join(cells)} |\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
