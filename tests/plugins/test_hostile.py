# SPDX-License-Identifier: Apache-2.0
"""No index, length, attribute or bit pattern makes an operator touch memory that is not its own: it answers or refuses.

The calls are made in processes of their own, on operands between forbidden pages (hostile.py): a bad access ends one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.plugins.levels import HERE


def hostile(seed: int, count: int, *defect: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.plugins.hostile", str(seed), str(count), *defect]
    wanted = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
    return subprocess.run(command, env=os.environ | wanted, capture_output=True, text=True, check=False, timeout=1000)


def assert_answers_and_refuses(done: subprocess.CompletedProcess[str], count: int) -> None:
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stdout}{done.stderr}"
    found = json.loads(done.stdout)
    assert found["answered"] + found["refused"] == count
    assert min(found.values()) > count // 4


def test_operators_answer_or_refuse_and_touch_nothing_else() -> None:
    assert_answers_and_refuses(hostile(0, 400), 400)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("level", HERE)
def test_operators_of_every_level_answer_or_refuse_and_touch_nothing_else(level: str) -> None:
    done = hostile(1, 3000, SHADOWC_ISA=level)
    if done.returncode and "which this CPU does not have" in done.stderr:
        pytest.skip(f"no {level} here")
    assert_answers_and_refuses(done, 3000)


@pytest.mark.parametrize("defect", ["read", "write"])
def test_an_operand_that_reaches_into_a_forbidden_page_ends_the_process(defect: str) -> None:
    done = hostile(0, 20, defect)
    assert done.returncode in (-signal.SIGSEGV, -signal.SIGBUS), done.stderr
    assert done.stdout.startswith("bound"), "the operands never reached the operator"


def test_a_byte_written_beside_an_output_is_noticed() -> None:
    done = hostile(0, 20, "beside")
    assert done.returncode == 1
    assert "something was written beside threshold" in done.stderr
