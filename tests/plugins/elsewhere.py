# SPDX-License-Identifier: Apache-2.0
"""Lets the tests of this folder call kernels that run in another process: another SIMD level, or another build."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnxruntime
import pytest

from shadowc.spec.ops import OpSpec
from tests.plugins import kernels

Run = Callable[..., dict[str, np.ndarray]]
"""Signature of kernels.run, without `kernel`."""


@contextlib.contextmanager
def kernels_run_by(run: Run) -> Iterator[None]:
    """While it lasts, kernels.run of a kernel is `run`; the ONNX functions stay in this process."""
    here = kernels.run

    def choose(spec: OpSpec, arrays: dict, threads: int = 2, kernel: bool = True, **attributes: object) -> dict:
        if kernel:
            return run(spec, arrays, threads=threads, **attributes)
        return here(spec, arrays, threads, kernel, **attributes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "run", choose)
        yield


class UnavailableError(Exception):
    """What this machine lacks, as a sentence."""


@contextlib.contextmanager
def at_level(level: str) -> Iterator[Run]:
    """A Python of its own for a SIMD level: SHADOWC_ISA is read once per process.

    Raises:
        UnavailableError: the processor does not have the level.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.plugins.elsewhere"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"SHADOWC_ISA": level, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    to, answers = process.stdin, process.stdout
    assert to is not None
    assert answers is not None

    def answer() -> Any:
        found = pickle.load(answers)
        if isinstance(found, Exception):
            raise found
        return found

    def run(*arguments: object, **named: object) -> dict[str, np.ndarray]:
        pickle.dump((arguments, named), to)
        to.flush()
        return answer()

    try:
        assert answer() == level
        yield run
    finally:
        to.close()
        answers.close()
        process.wait(30)


def _level() -> str:
    """The level that kernels run on in this process."""
    try:
        onnxruntime.SessionOptions().register_custom_ops_library(str(kernels.library()))
    except Exception as error:
        if "which this CPU does not have" in str(error):
            raise UnavailableError(str(error)) from None
        raise
    isa = ctypes.CDLL(str(kernels.library())).shadowc_ort_isa
    isa.restype = ctypes.c_char_p
    return isa().decode()


def serve() -> None:
    """Says the level, then answers the calls of `at_level` on standard input, until it ends."""
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # what a library prints must not get between the answers

        def answer(call: Callable[[], object]) -> None:
            try:
                found = call()
            except UnavailableError as error:
                found = error
            except Exception as error:  # those of ONNX Runtime cannot be pickled
                found = RuntimeError(str(error))
            pickle.dump(found, answers)
            answers.flush()

        answer(_level)
        with contextlib.suppress(EOFError):
            while True:
                arguments, named = pickle.load(sys.stdin.buffer)
                answer(lambda: kernels.run(*arguments, **named))  # noqa: B023


if __name__ == "__main__":
    from tests.plugins import elsewhere

    elsewhere.serve()  # not this module's own: the exceptions have to be the importer's
