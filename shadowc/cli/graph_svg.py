# SPDX-License-Identifier: Apache-2.0
"""The sparse graph of an engine as a picture: what makes masks, and what each layer computes and reads under them."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from shadowc.cli import render
from shadowc.measure.expected import ExpectedBytes, expected_bytes, head_share, record_bytes
from shadowc.spec.density import Density

if TYPE_CHECKING:
    from shadowc.spec.manifest import EngineManifest

WIDTH = 1200
ROW = 48
TOP = 150
MOST_CELLS = 64
"""More units than this share cells."""
_BUS, _STREAM, _ATTENTION, _FFN = 272, 340, 400, 810
"""Left edges, and the lines of the masks and of the residual stream."""
_LEFT, _LEFT_WIDTH = 16, 236
_BOX = 370
_BOX_HEIGHT = 36
_KEPT, _OFF, _INK, _PALE, _MASK = "#2563a8", "#dfe5ec", "#1b2430", "#6b7785", "#c2571a"


@dataclass(frozen=True, slots=True)
class LayerPicture:
    """What one layer keeps and reads."""

    layer: int
    heads: float
    neurons: float
    attention_bytes: float
    ffn_bytes: float


def layers_of(manifest: EngineManifest, density: Density) -> tuple[LayerPicture, ...]:
    """Expected for every model layer: active heads and neurons, and bytes; the first is dense, as exempt ones are."""
    model, plan = manifest.model, manifest.sparsity
    attention, ffn = (size / model.layers for size in record_bytes(manifest))
    found = []
    for layer in range(model.layers):
        dense = plan is None or layer == 0 or layer - 1 in plan.exempt
        heads, neurons = (1.0, 1.0) if dense else (density.heads, density.neurons)
        read = 1.0 if dense else head_share(manifest, density)
        found.append(
            LayerPicture(layer, heads * model.heads, neurons * model.ffn, attention * read, ffn * neurons)
        )  # fmt: skip
    return tuple(found)


def svg(manifest: EngineManifest, density: Density) -> str:
    """A whole SVG document, layer by layer from the first down.

    Args:
        manifest: of the engine.
        density: that is drawn; what a single token keeps in a layer differs where ranks go over all layers.
    """
    model, plan = manifest.model, manifest.sparsity
    expected = expected_bytes(manifest, density if plan else None)
    layers = layers_of(manifest, density)
    bottom = TOP + ROW * model.layers
    parts = [*_heading(manifest, density, expected), _box(_STREAM - 60, TOP - 62, 120, "embeddings")]
    parts.append(_arrow(_STREAM, TOP - 34, _STREAM, bottom + 10))
    if plan is not None:
        parts += _masks(manifest)
    for picture in layers:
        parts += _layer(manifest, picture)
    before = ["norm"] * model.norm_first + ["projection"] * (model.projected > 0)
    head = f"{' and '.join([*before, 'LM head'])}, {render.size(expected.lm_head)}"
    parts += [_box(_STREAM - 300, bottom + 10, 330, head), *_legend(manifest, bottom + 29)]
    height = bottom + 56
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="{_INK}">\n'
        f"<title>{escape(model.name)}: sparse graph</title>\n"
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _heading(manifest: EngineManifest, density: Density, expected: ExpectedBytes) -> list[str]:
    model, plan = manifest.model, manifest.sparsity
    dense = expected_bytes(manifest)
    title = f"{model.name}, {manifest.weights} weights, target {manifest.target}"
    kept = f"{density.heads:g} of the heads and {density.neurons:g} of the neurons kept" if plan else "a dense engine"
    share = render.share(expected.total / dense.total)
    return [
        _text(24, 34, title, size=18, bold=True),
        _text(24, 56, f"{kept}: {render.size(expected.total)} of {render.size(dense.total)} per token ({share})"),
        _text(_ATTENTION, TOP - 14, f"attention: {model.heads} heads of {model.head_size}", bold=True),
        _text(_FFN, TOP - 14, f"FFN: {model.ffn} neurons{_blocks(manifest)}", bold=True),
    ]


def _blocks(manifest: EngineManifest) -> str:
    plan = manifest.sparsity
    return f" in blocks of {plan.neuron_block}" if plan and plan.neuron_block > 1 else ""


def _masks(manifest: EngineManifest) -> list[str]:
    """What scores and selects, and the line of masks down to the layers that obey them."""
    plan = manifest.sparsity
    if plan is None:
        return []
    how = "once per prompt" if plan.mask == "sequence" else "for every token"
    if plan.refresh:
        how = f"every {plan.refresh} tokens"
    # With a mask that is held, the manifest's figure is what one making of it reads.
    cost = manifest.bytes_per_token.predictor
    source = ["predictor of all layers", "reads layer 0's attention context"]
    if plan.style != "shadow":
        both = "reads what its attention reads" if plan.style == "dejavu" else "reads what attention and FFN read"
        source = ["a predictor for each layer", both]
    below = TOP + 84
    bottom = TOP + ROW * (manifest.model.layers - 1) + _MASK_LINE
    parts = [
        _frame(_LEFT, TOP - 6, _LEFT_WIDTH, 68),
        _lines(_LEFT + 12, TOP + 14, [*source, f"{render.size(cost)}, {how}"]),
        _frame(_LEFT, below, _LEFT_WIDTH, 52),
        _lines(_LEFT + 12, below + 20, ["selection", f"the highest scores, {plan.scope}ly ranked"]),
        _arrow(_LEFT + 118, TOP + 62, _LEFT + 118, below, colour=_MASK),
        _path(f"M {_LEFT + _LEFT_WIDTH} {below + 14} H {_BUS}", colour=_MASK, arrow=False),
        _path(
            f"M {_BUS} {min(below + 14, TOP + ROW + _MASK_LINE)} V {max(bottom, below + 14)}", colour=_MASK, arrow=False
        ),
    ]
    if plan.style == "shadow":
        parts.append(_path(f"M {_ATTENTION} {TOP + 5} H {_LEFT + _LEFT_WIDTH}", colour=_MASK, arrow=True))
    return parts


_MASK_LINE = 30
"""Of a row, where its masks come in."""


def _layer(manifest: EngineManifest, picture: LayerPicture) -> list[str]:
    model, plan = manifest.model, manifest.sparsity
    y = TOP + ROW * picture.layer
    attention, ffn = (size / model.layers for size in record_bytes(manifest))
    middle = y + _BOX_HEIGHT // 2
    parts = [
        _text(_STREAM - 6, middle + 1, f"layer {picture.layer}", anchor="end"),
        _path(f"M {_STREAM} {middle} H {_ATTENTION}", colour=_PALE, arrow=True),
        _path(f"M {_ATTENTION + _BOX} {middle} H {_FFN}", colour=_PALE, arrow=True),
    ]
    if plan is not None and picture.layer > 0 and picture.layer - 1 not in plan.exempt:
        line = y + _MASK_LINE
        for start, end in ((_BUS, _ATTENTION), (_ATTENTION + _BOX, _FFN)):
            parts.append(_path(f"M {start} {line} H {end}", colour=_MASK, arrow=True, dashed=True))
    blocks = -(-model.ffn // (plan.neuron_block if plan else 1))
    for x, kept, of, units, read, whole in (
        (_ATTENTION, picture.heads, model.heads, model.heads, picture.attention_bytes, attention),
        (_FFN, picture.neurons, model.ffn, blocks, picture.ffn_bytes, ffn),
    ):
        name = "heads" if x == _ATTENTION else "neurons"
        label = f"{kept:.0f} of {of} {name}, {render.size(read)}" + (
            "" if read == whole else f" of {render.size(whole)}"
        )
        parts += [_frame(x, y, _BOX, _BOX_HEIGHT), _strip(x + 8, y + 6, kept / of, units)]
        parts.append(_text(x + 8, y + 31, label, size=11))
    return parts


def _strip(x: int, y: int, share: float, units: int) -> str:
    """Cells of which a share is filled, spread evenly: which ones they are differs from token to token."""
    cells = min(units, MOST_CELLS)
    width = (_BOX - 16) / cells
    shapes = []
    for cell in range(cells):
        filled = int((cell + 1) * share + 1e-9) > int(cell * share + 1e-9)
        colour = _KEPT if filled else _OFF
        shapes.append(
            f'<rect x="{x + cell * width:.1f}" y="{y}" width="{max(width - 1.5, 1):.1f}" height="11" fill="{colour}"/>'
        )
    return "".join(shapes)


def _legend(manifest: EngineManifest, y: int) -> list[str]:
    plan = manifest.sparsity
    if plan is None:
        return []
    spread = ", and shares them out among the layers" if plan.scope == "global" else ""
    return [
        f'<rect x="{_ATTENTION}" y="{y - 10}" width="11" height="11" fill="{_KEPT}"/>',
        _text(_ATTENTION + 18, y, "computed"),
        f'<rect x="{_ATTENTION + 90}" y="{y - 10}" width="11" height="11" fill="{_OFF}"/>',
        _text(_ATTENTION + 108, y, f"not read (numbers are expected: every mask picks other units{spread})"),
    ]


def _box(x: int, y: int, width: int, text: str) -> str:
    return _frame(x, y, width, 28) + _text(x + width // 2, y + 18, text, anchor="middle")


def _frame(x: int, y: int, width: int, height: int) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" fill="#ffffff" stroke="{_PALE}"/>'


def _lines(x: int, y: int, lines: list[str]) -> str:
    return "".join(_text(x, y + 17 * at, line, bold=at == 0) for at, line in enumerate(lines))


def _text(x: int, y: int, text: str, *, size: int = 12, bold: bool = False, anchor: str = "start") -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'


def _arrow(x1: int, y1: int, x2: int, y2: int, *, colour: str = _PALE) -> str:
    return _path(f"M {x1} {y1} L {x2} {y2}", colour=colour, arrow=True)


def _path(shape: str, *, colour: str, arrow: bool, dashed: bool = False) -> str:
    """A line, with an arrow's head drawn at its end: markers are beyond many viewers."""
    dash = ' stroke-dasharray="4 3"' if dashed else ""
    line = f'<path d="{shape}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>'
    return line + (_head(shape, colour) if arrow else "")


def _head(shape: str, colour: str) -> str:
    words = shape.split()
    x, y = int(words[1]), int(words[2])
    if words[3] == "H":
        end, way = (int(words[4]), y), (1 if int(words[4]) > x else -1, 0)
    else:
        end, way = (int(words[4]), int(words[5])), (0, 1)
    back = (end[0] - 7 * way[0], end[1] - 7 * way[1])
    wings = [(back[0] + side * 4 * way[1], back[1] + side * 4 * way[0]) for side in (1, -1)]
    points = " ".join(f"{px},{py}" for px, py in (end, *wings))
    return f'<polygon points="{points}" fill="{colour}"/>'
