# SPDX-License-Identifier: Apache-2.0
"""`make gpu-test`: everything that needs the GPU, or one line that says why it cannot run here.

Kernels against their oracles, compute-sanitizer, whole engines against the cpu engine, then the table of times.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from shadowc.runtime.tensorrt.cuda import open_cuda
from shadowc.spec.errors import SetupError
from tests.gpu import build, table

FOLDER = Path(__file__).parent
RESULTS = FOLDER.parents[1] / "build" / "gpu"


def main() -> int:
    """Exit code: 0 only if something ran and all of it passed."""
    try:
        card = open_cuda().gpu
        build.nvcc()
    except (SetupError, build.UnavailableError) as error:
        print(f"gpu-test cannot run here: {getattr(error, 'message', error)}")
        return 1
    print(f"gpu-test on {card}")
    failed = pytest.main([str(FOLDER), "-m", "gpu", "-p", "no:xdist"])
    table.main(RESULTS)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
