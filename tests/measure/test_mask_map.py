# SPDX-License-Identifier: Apache-2.0
"""The map of masks counts what it is given; its picture and its lines show those counts."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from rich.console import Console

from shadowc.cli.mask_view import LiveMap, PlainMap, map_lines
from shadowc.measure.mask_map import _ALWAYS, _NEVER, MaskMap, cells, png
from shadowc.runtime.mask_trace import TokenMasks

HEADS = np.array([[[1, 0], [1, 1]], [[0, 1], [0, 0]]], bool)
"""Of two tokens: two predicted layers of two heads."""
NEURONS = np.array([[[1, 1, 0, 0, 0], [1, 0, 0, 0, 1]], [[1, 0, 1, 0, 0], [0, 0, 0, 0, 1]]], bool)


def counted() -> MaskMap:
    found = MaskMap()
    for heads, neurons in zip(HEADS, NEURONS, strict=True):
        found.add(TokenMasks(heads[None], neurons[None]))
    return found


def decoded(data: bytes) -> tuple[np.ndarray, dict[str, bytes]]:
    """A PNG read by hand: every checksum is checked."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, parts = 8, {}
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        parts[kind.decode()] = body
        at += 12 + length
    width, height, *rest = struct.unpack(">IIBBBBB", parts["IHDR"])
    assert rest == [8, 2, 0, 0, 0]
    rows = np.frombuffer(zlib.decompress(parts["IDAT"]), np.uint8).reshape(height, 1 + 3 * width)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 3), parts


def test_means_are_shares_of_tokens_and_the_first_layer_is_dense() -> None:
    found = counted()
    np.testing.assert_array_equal(found.mean("heads"), [[1, 1], [0.5, 0.5], [0.5, 0.5]])
    np.testing.assert_array_equal(found.last("heads"), [[1, 1], [0, 1], [0, 0]])
    assert found.active("neurons").tolist() == [5, 2, 1]
    assert found.tokens == 2


def test_neighbours_share_a_cell_where_there_is_no_room() -> None:
    share = np.array([[1, 0, 0, 0, 1, 1.0]])
    np.testing.assert_array_equal(cells(share, 3), [[0.5, 0, 1]])
    np.testing.assert_array_equal(cells(share, 6), share)
    np.testing.assert_array_equal(cells(share, 100), share)
    for count in range(1, 7):
        assert cells(share, count).shape == (1, count)


def test_picture_has_the_colours_of_the_means() -> None:
    image, _ = decoded(png(counted().picture()))
    assert image.shape == (3 * 12, 2 * 160 + 12 + 5 * 64, 3)
    np.testing.assert_array_equal(image[0, 0], _ALWAYS.astype(np.uint8))
    halfway = np.rint((_NEVER + _ALWAYS) / 2)
    np.testing.assert_array_equal(image[12, 0], halfway)
    right = 2 * 160 + 12
    np.testing.assert_array_equal(image[-1, right + 4 * 64], _ALWAYS.astype(np.uint8))
    np.testing.assert_array_equal(image[-1, right + 3 * 64], _NEVER.astype(np.uint8))
    np.testing.assert_array_equal(image[5, 2 * 160 + 3], [255, 255, 255])


def test_png_keeps_every_pixel_and_its_description() -> None:
    image = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    found, parts = decoded(png(image, "opt: a map"))
    np.testing.assert_array_equal(found, image)
    assert parts["tEXt"] == b"Description\0opt: a map"


def test_plain_lines_tell_active_units_by_layer() -> None:
    lines: list[str] = []
    view = PlainMap(MaskMap(), lines.append)
    view.watch(TokenMasks(HEADS[0][None], NEURONS[0][None]))
    assert lines == ["token 2, active units by layer: heads 2 1 2, neurons 5 2 2"]


@pytest.mark.parametrize("width", [20, 60, 200])
def test_map_fits_its_terminal_two_layers_to_a_line(width: int) -> None:
    first, *rows = map_lines(counted(), width)
    assert "3 of 6 heads, 8 of 15 units of neurons" in first.plain
    assert [row.plain.count("▀") for row in rows] == [7, 7]  # three layers: the last line has one
    assert all(row.cell_len <= width for row in rows)


def test_cells_of_a_line_have_the_colours_of_both_layers() -> None:
    row = map_lines(counted(), 80)[1]
    styles = [(str(span.style.color.name), str(span.style.bgcolor.name)) for span in row.spans]
    on, off = "#60beff", "#262c36"
    assert styles[:2] == [(on, off), (on, on)]  # layer 0 is dense, layer 1 kept its second head


def test_live_map_shows_text_and_map_and_leaves_the_last_one() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=60, height=30, color_system="truecolor")
    view = LiveMap(MaskMap(), console, "Once")
    for heads, neurons in zip(HEADS, NEURONS, strict=True):
        view.watch(TokenMasks(heads[None], neurons[None]))
        view.piece(" upon")
    view.close()
    written = screen.getvalue()
    assert "Once upon upon" in written
    assert "token 3" in written
    assert "▀" in written


def test_view_that_saw_no_token_writes_nothing() -> None:
    screen = io.StringIO()
    view = LiveMap(MaskMap(), Console(file=screen, force_terminal=True), "Once")
    view.piece(" upon")
    view.close()
    assert screen.getvalue() == ""
