# SPDX-License-Identifier: Apache-2.0
"""Texts that several engines of one process write in turns, a few tokens each; all but a text's first two are timed."""

from __future__ import annotations

from itertools import accumulate
from threading import Semaphore, Thread
from time import perf_counter
from typing import TYPE_CHECKING, Any

from shadowc.spec.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt

    from shadowc.runtime.causal import CausalEngine
    from shadowc.spec.density import Density

TURN_TOKENS = 4
"""Of one turn: some quarter of a second at the size of OPT-1.3B."""


def turn_sizes(tokens: int) -> list[int]:
    """Tokens timed in each turn, all together so many."""
    return [min(TURN_TOKENS, tokens - begun) for begun in range(0, tokens, TURN_TOKENS)]


def tokens_generated(tokens: int) -> int:
    """New tokens of a text of which so many are timed: the first is the prompt's, the second comes right behind it."""
    return 2 + tokens


class _Closed(Exception):  # noqa: N818 (no error: the way out of `generate`)
    """Nobody wants the rest of a text."""


class Text:
    """What one engine generates at one density, in a thread that waits between its turns.

    Args:
        engine: whose texts have caches of their own.
        prompt: ids [B,S], read in the first turn.
        density: of all tokens.
        sizes: tokens timed in each turn.
    """

    def __init__(
        self, engine: CausalEngine, prompt: npt.NDArray[np.int64], density: Density, sizes: Sequence[int]
    ) -> None:
        self.seconds: list[float] = []
        """Of every token that was timed, of several rows a step's over the rows; those of a run all at its first."""
        self.bytes_read = 0.0
        """Per token, known after the last turn."""
        self._engine, self._prompt, self._density, self._sizes = engine, prompt, density, sizes
        self._ends = list(accumulate(sizes))
        self._known = 0
        self._began: float | None = None
        self._error: BaseException | None = None
        self._closed, self._ended = False, False
        self._mine, self._others = Semaphore(0), Semaphore(0)
        self._thread = Thread(target=self._write, name="shadowc-text", daemon=True)

    def go_on(self) -> None:
        """One turn; the last one ends the text.

        Raises:
            ShadowcError: as `generate` does.
            InternalError: the text has ended: it has had all its turns, or its context has no room for them.
        """
        if self._ended:
            raise InternalError(f"a text ended behind {len(self.seconds)} of {sum(self._sizes)} timed tokens")
        if self._thread.ident is None:
            self._thread.start()
        self._mine.release()
        self._others.acquire()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """End the text where it is, and its thread."""
        self._closed = True
        if self._thread.ident is not None:
            self._mine.release()
            self._thread.join()

    def _write(self) -> None:
        self._mine.acquire()
        try:
            new = tokens_generated(sum(self._sizes))
            stream = self._behind_a_token
            self._engine.generate(self._prompt, new, new, self._density, stream, stream_every=TURN_TOKENS)
            self.bytes_read = self._engine.last_stats.bytes_read
        except BaseException as error:  # raised where the turn was given
            self._error = error
        finally:
            self._ended = True
            self._others.release()

    def _behind_a_token(self, _: Any) -> None:
        self._leave_if_closed()
        self._known += 1
        if self._known == 1:
            return
        if self._began is not None:
            self.seconds.append((perf_counter() - self._began) / len(self._prompt))
        if len(self.seconds) == self._ends[0] and len(self._ends) > 1:
            del self._ends[0]
            self._others.release()
            self._mine.acquire()
            self._leave_if_closed()
        self._began = perf_counter()

    def _leave_if_closed(self) -> None:
        if self._closed:
            raise _Closed
