# SPDX-License-Identifier: Apache-2.0
"""Starts TensorRT's builder in a process of its own and turns what it says into progress, a result or one sentence.

TensorRT can end the process that it runs in; and for a network with plugins it opens the bare name
`libtensorrt_rtx.so`, which only a search path that was set before the process began can resolve.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from shadowc.emit.tensorrt.messages import LESS_MEMORY, explained, first_cause
from shadowc.runtime.tensorrt.bindings import Bindings, Messages
from shadowc.spec.errors import InternalError, SetupError
from shadowc.spec.manifest import PlanPart
from shadowc.spec.ops import DOMAIN
from shadowc.spec.progress import Progress
from shadowc.stage_cache import default_root

_CHILD = "shadowc.emit.tensorrt.child"
_LINKS = ("libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so")
_PLUGIN_ERROR = "shadowc: error: "
_TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """One plan to build."""

    bindings: Bindings
    plugin: Path
    folder: Path
    """Where the graph lies and the plan goes."""
    plan: PlanPart
    operators: Mapping[str, str]
    """Of every node that must become a plugin, name -> operator and attributes; see `plugin_operators`."""
    capabilities: tuple[str, ...]
    """Such as "8.6"; empty: the builder's default."""
    memory_note: str = ""
    """What to say if memory runs out."""


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What the builder made, and at which cost."""

    bytes: int
    seconds: float
    peak_bytes: int
    version: str
    registered: tuple[str, ...]
    """Operators of the plugin, namespace::name::version."""


@dataclass(slots=True)
class _Heard:
    """What came from the child."""

    messages: Messages = field(default_factory=Messages)
    done: dict[str, Any] | None = None
    refused: dict[str, Any] = field(default_factory=dict)


def build_plan(request: BuildRequest, progress: Progress) -> BuildResult:
    """Build one plan.

    Raises:
        SetupError: the builder refused, or died; with the reason that it logged first.
        InternalError: it built another network than the one described.
    """
    with tempfile.TemporaryDirectory(prefix="shadowc-build-") as scratch:
        heard, code, printed = _run_child(request, Path(scratch), progress)
    for line in printed.splitlines():
        if line.startswith(_PLUGIN_ERROR):  # a plugin that cannot reach TensorRT's logger
            heard.messages.errors.insert(0, line)
            break
    if heard.done is None:
        raise _failure(request, heard, code, printed)
    _check(request, heard.done)
    done = heard.done
    return BuildResult(done["bytes"], done["seconds"], done["peak_bytes"], done["version"], tuple(done["registered"]))


def _run_child(request: BuildRequest, scratch: Path, progress: Progress) -> tuple[_Heard, int, str]:
    question = scratch / "request.json"
    question.write_text(json.dumps(_question(request)), encoding="utf-8")
    links = private_links(request.bindings, scratch / "lib")
    environment = dict(os.environ)
    if links is not None:
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, (str(links), os.environ.get("LD_LIBRARY_PATH"))))
    with (scratch / "printed").open("w+b") as printed, _pipe() as (events, write_end):
        child = subprocess.Popen(
            [sys.executable, "-m", _CHILD, str(question), str(write_end)],
            stdin=subprocess.DEVNULL, stdout=printed, stderr=printed, env=environment, pass_fds=(write_end,),
        )  # fmt: skip
        try:
            os.close(write_end)
            heard = _listen(events, progress)
            code = child.wait()
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        printed.seek(0)
        return heard, code, printed.read().decode(errors="replace")


def private_links(bindings: Bindings, folder: Path) -> Path | None:
    """A folder with the names that the builder opens, for packages whose libraries have others; None: not needed."""
    if bindings.folder is None:
        return None
    folder.mkdir()
    for name in _LINKS:
        library = next(iter(sorted(bindings.folder.glob(f"{name}.*"))), None)
        if library is None:
            raise SetupError(f"{bindings.folder} holds no {name}", hint="pip install --force-reinstall 'shadowc[rtx]'")
        for link in (name, f"{name}.1"):
            (folder / link).symlink_to(library)
    return folder


@contextmanager
def _pipe() -> Iterator[tuple[IO[str], int]]:
    """The reading end as a file, and the number of the writing end, which the reader closes once the child has it."""
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, encoding="utf-8", errors="replace") as events:
        yield events, write_end


def _listen(events: IO[str], progress: Progress) -> _Heard:
    heard = _Heard()
    for line in events:
        try:
            event = json.loads(line)
        except ValueError:
            continue  # the last line of a process that died
        kind = event.pop("kind")
        if kind == "advance":
            progress.advance(event["done"], event["total"], "steps")
        elif kind == "error":
            heard.messages.errors.append(event["text"])
        elif kind == "warning":
            heard.messages.warnings.append(event["text"])
        elif kind == "refused":
            heard.refused = event
        else:
            heard.done = event
    return heard


def _question(request: BuildRequest) -> dict[str, object]:
    bindings, folder = request.bindings, request.folder
    return {
        "family": bindings.family,
        "plugin": str(request.plugin.resolve()),
        "onnx": str((folder / request.plan.onnx).resolve()),
        "plan": str((folder / request.plan.file).resolve()),
        "inputs": [tensor.model_dump(mode="json") for tensor in request.plan.inputs],
        "capabilities": list(request.capabilities),
        "timing_cache": str(timing_cache(bindings) or ""),
    }


def timing_cache(bindings: Bindings) -> Path | None:
    """Where measured times are kept between builds; None: TensorRT for RTX measures on the user's card instead."""
    if bindings.family == "rtx1":
        return None
    return default_root() / "tensorrt" / f"{bindings.family}-{bindings.version}.timing"


def _failure(request: BuildRequest, heard: _Heard, code: int, printed: str) -> SetupError:
    """One sentence for a build that gave no plan."""
    messages = heard.messages
    if not messages.errors and not heard.refused.get("reasons"):
        messages.errors.append(_last_line(printed))
    text, hint = explained(messages, heard.refused, request.plugin)
    ended = signal.Signals(-code).name if code < 0 else ""
    if ended == "SIGKILL":
        text, hint = "its process was killed, as the system does when memory runs out", LESS_MEMORY
    elif ended and hint != LESS_MEMORY:
        text, hint = f"its process ended itself ({ended}) after {first_cause(messages)!r}", "shadowc doctor"
    if hint == LESS_MEMORY and request.memory_note:
        text += f": {request.memory_note}"
    return SetupError(f"{request.bindings.title} could not build {request.plan.file}: {text}", hint=hint)


def _last_line(printed: str) -> str:
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"


def _check(request: BuildRequest, done: dict[str, Any]) -> None:
    """The network that was built is the one that engine.json will describe."""
    for name in sorted(request.operators.keys() | done["operators"].keys()):
        ours, theirs = (side.get(name, "no operator") for side in (request.operators, done["operators"]))
        if ours != theirs:
            raise InternalError(f"{request.plan.file}: {name} is {theirs!r} in the plan, {ours!r} in the graph")
    for side in ("inputs", "outputs"):
        wanted = {tensor.name: (tensor.dtype, list(tensor.shape)) for tensor in getattr(request.plan, side)}
        found = {tensor["name"]: (_dtype(tensor["dtype"]), tensor["shape"]) for tensor in done[side]}
        for name in sorted(wanted.keys() | found.keys()):
            if wanted.get(name) != found.get(name):
                raise InternalError(
                    f"{request.plan.file}: {side[:-1]} {name} is {found.get(name)} in the plan, the table says "
                    f"{wanted.get(name)}"
                )


def _dtype(name: str) -> str:
    return _TYPES.get(name, name.lower())


def plugin_operators(nodes: Iterable[Any]) -> dict[str, str]:
    """Of the nodes that the plugin library provides, name -> operator and attributes as the plugin writes its fields.

    An example: `{"layers.0.ffn": "SparseFFN block=16 layer=0 skip_zeros=1"}`.
    """
    return {
        node.name: " ".join((node.op, *sorted(f"{name}={_field(value)}" for name, value in node.attrs.items())))
        for node in nodes
        if node.domain == DOMAIN
    }


def _field(value: int | str | Iterable[int]) -> str:
    return str(value) if isinstance(value, int | str) else ",".join(map(str, value))
