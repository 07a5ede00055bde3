# SPDX-License-Identifier: Apache-2.0
"""How many cores a process may use decides how work is handed out, and no bit of the result."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.plugins import test_sparse_attention, test_sparse_ffn

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to cores")


def digests() -> str:
    """Hashes of a row of both operators, cut into many pieces."""
    arrays = test_sparse_ffn.operands(np.random.default_rng(30), B=1, F=12000, E=256, block=16)
    y, read = test_sparse_ffn.ffn(arrays, block=16)
    found = [hashlib.sha256(y.tobytes()).hexdigest(), str(read)]
    arrays = test_sparse_attention.operands(np.random.default_rng(31), H=13, D=16)
    results, _ = test_sparse_attention.attend(arrays)
    found += [hashlib.sha256(results[name].tobytes()).hexdigest() for name in ("y", "context")]
    return "\n".join(found)


def test_a_row_has_the_same_bits_on_one_core_and_on_all():
    code = "from tests.plugins import test_cores; print(test_cores.digests())"
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("this machine has one core")
    found = []
    for chosen in (cores[:1], cores):
        bind = f"import os; os.sched_setaffinity(0, {set(chosen)!r}); "
        run = [sys.executable, "-c", bind + code]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        found.append(subprocess.run(run, env=env, capture_output=True, text=True, check=True).stdout)
    assert found[0] == found[1]
    assert len(found[0].splitlines()) == 4
