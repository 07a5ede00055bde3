# SPDX-License-Identifier: Apache-2.0
"""The picture of the sparse graph is a well-formed SVG that shows what the manifest says, and nothing outside it."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from shadowc.cli.graph_svg import _KEPT, _OFF, layers_of, svg
from shadowc.measure.expected import expected_bytes
from shadowc.spec.density import Density
from shadowc.spec.manifest import EngineManifest
from tests.null.test_manifest import manifest

SPACE = "{http://www.w3.org/2000/svg}"
DENSITY = Density(0.5, 0.25)


def parsed(engine: EngineManifest, density: Density = DENSITY) -> ElementTree.Element:
    return ElementTree.fromstring(svg(engine, density))


def texts(root: ElementTree.Element) -> list[str]:
    return [str(element.text) for element in root.iter(f"{SPACE}text")]


def sparse(**changes: object) -> EngineManifest:
    found = manifest()
    assert found.sparsity is not None
    return found.model_copy(update={"sparsity": found.sparsity.model_copy(update={"exempt": (), **changes})})


def test_every_layer_says_what_it_keeps_and_reads() -> None:
    found = texts(parsed(sparse()))
    assert [text for text in found if text.startswith("layer ") and text[6:].isdigit()] == [
        f"layer {i}" for i in range(4)
    ]
    assert sum(text.startswith("4 of 4 heads") for text in found) == 1
    assert sum(text.startswith("2 of 4 heads") for text in found) == 3
    assert sum(text.startswith("64 of 256 neurons") for text in found) == 3
    assert "predictor of all layers" in found


def test_filled_cells_are_the_share_that_is_kept() -> None:
    cells = [element.get("fill") for element in parsed(sparse()).iter(f"{SPACE}rect") if element.get("height") == "11"]
    legend = 1
    assert cells.count(_KEPT) == (4 + 3 * 2) + (16 + 3 * 4) + legend
    assert cells.count(_OFF) == 3 * 2 + 3 * 12 + legend


def test_bytes_of_the_layers_are_those_expected_of_the_engine() -> None:
    for engine in (sparse(), sparse(mask="sequence"), sparse(exempt=(1,))):
        layers, expected = layers_of(engine, DENSITY), expected_bytes(engine, DENSITY)
        assert sum(layer.attention_bytes for layer in layers) == pytest.approx(expected.attention)
        assert sum(layer.ffn_bytes for layer in layers) == pytest.approx(expected.neurons)


def test_exempt_layers_are_drawn_dense() -> None:
    assert [layer.heads for layer in layers_of(sparse(exempt=(1,)), DENSITY)] == [4, 2, 4, 2]


def test_dense_engine_has_no_predictor_and_no_masks() -> None:
    found = texts(parsed(manifest(sparsity=None)))
    assert not [text for text in found if "predictor" in text or "selection" in text]
    assert sum(text.startswith("4 of 4 heads") for text in found) == 4


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({}, "norm and LM head, "),
        ({"norm_first": False}, "LM head, "),
        ({"norm_first": False, "projected": 32}, "projection and LM head, "),
        ({"projected": 32}, "norm and projection and LM head, "),
    ],
)
def test_what_stands_before_the_logits_is_what_the_model_has(facts: dict[str, object], says: str) -> None:
    engine = sparse()
    found = texts(parsed(engine.model_copy(update={"model": engine.model.model_copy(update=facts)})))
    assert [text for text in found if "LM head" in text and text.startswith(says)]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mask": "sequence"}, "once per prompt"),
        ({"mask": "sequence", "refresh": 8}, "every 8 tokens"),
        ({"style": "dejavu", "scope": "local"}, "a predictor for each layer"),
    ],
)
def test_kind_of_mask_is_told(changes: dict[str, object], says: str) -> None:
    assert any(says in text for text in texts(parsed(sparse(**changes))))


def test_nothing_is_drawn_outside_and_names_cannot_break_the_document() -> None:
    engine = sparse()
    odd = engine.model_copy(update={"model": engine.model.model_copy(update={"name": 'a<b>&"c'})})
    root = parsed(odd)
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    for element in root.iter():
        if element.tag in (f"{SPACE}rect", f"{SPACE}text"):
            x, y = float(element.get("x", 0)), float(element.get("y", 0))
            assert 0 <= x < width
            assert 0 <= y < height
        if element.tag == f"{SPACE}rect":
            assert x + float(element.get("width", 0)) <= width
            assert y + float(element.get("height", 0)) <= height
    assert any('a<b>&"c' in text for text in texts(root))
