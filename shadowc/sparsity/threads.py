# SPDX-License-Identifier: Apache-2.0
"""One thread for small work: threads that wait for each other many times a second cost more than they bring.

On a machine that does other work too, two threads were up to a hundred times slower here than one (each waits at
every small matrix product for the other, which has no core). One thread also makes results independent of the
number of cores. Large products use all threads, as torch is set.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

THREADED_WORK = 1 << 30
"""Multiplications between two waits from which on several threads pay."""


@contextmanager
def threads_for(work: int) -> Iterator[None]:
    """Let torch use one thread for a while if the work, in multiplications per call, is small."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1 if work < THREADED_WORK else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
