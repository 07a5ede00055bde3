# SPDX-License-Identifier: Apache-2.0
"""`make gpu-test`: everything that needs the GPU, or one line that says why it cannot run here.

Kernels against their oracles, compute-sanitizer, whole engines against the cpu engine, then the table of times.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from shadowc.runtime.tensorrt.cuda import open_cuda
from shadowc.spec.errors import SetupError, ShadowcError
from tests.gpu import build, table
from tests.gpu.report import MISSED, NOT_RUN, Outcomes, exit_code

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parents[1] / "build" / "gpu"
CODES = f"exit codes: 1 to 5 failed or could not run, {NOT_RUN} something was not run, {MISSED} a goal is missed"


def main(arguments: Sequence[str] = ()) -> int:
    """Exit code: 0 only if everything ran, all of it passed and every goal is met, save what the arguments allow."""
    parser = argparse.ArgumentParser("gpu-test", description=__doc__, epilog=CODES)
    parser.add_argument("--allow-skips", action="store_true", help="parts that were not run do not count as failures")
    parser.add_argument("--allow-missed", action="store_true", help="missed goals do not count as failures")
    allowed = parser.parse_args(arguments)
    try:
        card = open_cuda().gpu
        build.nvcc()
    except (SetupError, build.UnavailableError) as error:
        print(f"gpu-test cannot run here: {getattr(error, 'message', error)}")
        return 1
    print(f"gpu-test on {card}")
    outcomes = Outcomes()
    failed = int(pytest.main([str(FOLDER), "-m", "gpu", "-p", "no:xdist"], plugins=[outcomes]))
    goals, not_run = (), outcomes.not_run
    try:
        measured = table.main(RESULTS, tests=outcomes.summary, not_run=outcomes.not_run)
        goals, not_run = measured.goals, [*not_run, *measured.not_run]
    except (ShadowcError, RuntimeError, OSError) as error:  # a failed kernel may leave no device to measure on
        failed = failed or 1
        not_run.append(f"the table of times: {error}")
    print(f"tests: {outcomes.summary}")
    for what in not_run:
        print(f"not run: {what}")
    for goal in goals:
        if not goal.met:
            print(f"goal missed: {goal.sentence}")
    return exit_code(failed, not_run, goals, allow_skips=allowed.allow_skips, allow_missed=allowed.allow_missed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
