# SPDX-License-Identifier: Apache-2.0
"""`shadowc run --map`: which units each token computes, while the text comes.

On a terminal a map that moves, layers down, heads and neurons across; elsewhere a plain line per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from shadowc.cli import render
from shadowc.spec.density import UNIT_KINDS

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.text import Text

    from shadowc.measure.mask_map import MaskMap
    from shadowc.runtime.mask_trace import TokenMasks

_OFF, _ON = (38, 44, 54), (96, 190, 255)
_UPPER_HALF = "▀"
"""Its foreground is one layer, its background the next."""
_LABEL = 6
_TEXT_LINES = 3
"""Lines of the text's end that stand above the map."""


class PlainMap:
    """One line per token on standard error.

    Args:
        counted: adds up the masks.
        say: prints one line.
    """

    shows_text = False

    def __init__(self, counted: MaskMap, say: Callable[[str], None]) -> None:
        self._map = counted
        self._say = say

    def watch(self, masks: TokenMasks) -> None:
        """Take the masks of the next token."""
        self._map.add(masks)
        by_layer = (f"{kind} {' '.join(map(str, self._map.active(kind)))}" for kind in UNIT_KINDS)
        self._say(f"token {self._map.tokens + 1}, active units by layer: {', '.join(by_layer)}")

    def piece(self, text: str) -> None:
        """The text is shown elsewhere."""

    def close(self) -> None:
        """Nothing stays open."""


class LiveMap:
    """A moving map on a terminal, the end of the text above it; the last map stays.

    Args:
        counted: adds up the masks.
        console: of the terminal.
        prompt: what the text begins with.
    """

    shows_text = True

    def __init__(self, counted: MaskMap, console: Console, prompt: str) -> None:
        from rich.live import Live

        self._map = counted
        self._console = console
        self._text = prompt
        self._live = Live(console=console, auto_refresh=False, vertical_overflow="crop")
        self._started = False

    def watch(self, masks: TokenMasks) -> None:
        """Take the masks of the next token."""
        self._map.add(masks)
        self._refresh()

    def piece(self, text: str) -> None:
        """Take the next piece of text."""
        self._text += text
        if self._map.tokens:
            self._refresh()

    def close(self) -> None:
        """Leave the last map where it is."""
        if self._started:
            self._live.stop()

    def _refresh(self) -> None:
        if not self._started:
            self._live.start()
            self._started = True
        self._live.update(self._view(), refresh=True)

    def _view(self) -> Group:
        from rich.console import Group
        from rich.text import Text

        width = self._console.width
        lines = Text(self._text).wrap(self._console, max(width - 1, 10))[-_TEXT_LINES:]
        return Group(*lines, Text(), *map_lines(self._map, width))


def map_lines(counted: MaskMap, width: int) -> list[Text]:
    """The last token's map, two layers to a line, in so many columns."""
    from rich.style import Style
    from rich.text import Text

    from shadowc.measure.mask_map import cells

    room = max(width - _LABEL - 4, 8)
    heads = cells(counted.last("heads"), max(room // 4, 4))
    neurons = cells(counted.last("neurons"), max(room - heads.shape[1], 4))
    totals = {kind: f"{counted.active(kind).sum()} of {counted.last(kind).size} {_name(kind)}" for kind in UNIT_KINDS}
    lines = [Text(f"{'':{_LABEL}} token {counted.tokens + 1}: {totals['heads']}, {totals['neurons']}", style="dim")]
    for layer in range(0, len(heads), 2):
        line = Text(f"{layer:>{_LABEL}} ")
        for part in (heads, neurons):
            below = part[layer + 1] if layer + 1 < len(part) else None
            for at, above in enumerate(part[layer]):
                style = Style(color=_colour(above), bgcolor=None if below is None else _colour(below[at]))
                line.append(_UPPER_HALF, style)
            line.append("  ")
        lines.append(line)
    return lines


def _name(kind: str) -> str:
    return "heads" if kind == "heads" else "units of neurons"


def _colour(share: float) -> str:
    red, green, blue = (round(off + share * (on - off)) for off, on in zip(_OFF, _ON, strict=True))
    return f"#{red:02x}{green:02x}{blue:02x}"


def map_view(counted: MaskMap, prompt: str) -> PlainMap | LiveMap:
    """The view that fits standard error."""
    console = render.talk_console()
    return LiveMap(counted, console, prompt) if console.is_terminal else PlainMap(counted, render.say)
