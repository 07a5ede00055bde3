# SPDX-License-Identifier: Apache-2.0
"""Weights as TensorRT takes them: one matrix each, in the type it runs in. Plain numpy is the truth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shadowc.emit import weights
from shadowc.emit.records import groups, materialise
from shadowc.emit.rows import HALF_LIMIT, Overflow, narrow
from shadowc.emit.weights import DEVICE_ALIGNMENT, write_weights
from shadowc.spec.errors import InputError, InternalError
from shadowc.spec.program import WeightRecipe

E, F, H, D = 8, 6, 2, 4
ORDER = np.array([3, 0, 5, 1, 4, 2], np.int32)


class Source:
    def __init__(self, **changes: np.ndarray) -> None:
        rng = np.random.default_rng(0)
        shapes = {"fc1": (F, E), "fc2": (E, F), **dict.fromkeys("qkvo", (E, E)), "words": (10, E)}
        self.values = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        self.values |= {"order": ORDER, **changes}

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.values))

    def tensor(self, name: str) -> np.ndarray:
        return self.values[name]


def recipes(dtype: str = "float16", *, quantised: bool = False, order: str = "") -> dict[str, WeightRecipe]:
    kind = "int8" if quantised else dtype
    ffn = {"sources": ("fc1", "fc2"), "quantised": quantised, "order": order}
    attention = {"sources": ("q", "k", "v", "o"), "quantised": quantised}
    return {
        "w1": WeightRecipe("ffn_rows", shape=(F, E), dtype=kind, part=0, **ffn),
        "w2t": WeightRecipe("ffn_rows", shape=(F, E), dtype=kind, part=1, **ffn),
        "ffn.scales": WeightRecipe("ffn_scales", shape=(F, 2), **ffn),
        **{
            name: WeightRecipe("attention_rows", shape=(H * D, E), dtype=kind, part=part, **attention)
            for part, name in enumerate(("wq", "wk", "wv", "wot"))
        },
        "attention.scales": WeightRecipe("attention_scales", shape=(H, 4, D), **attention),
        "words": WeightRecipe("copy", ("words",), (10, E), dtype),
    }


def made(found: dict[str, WeightRecipe], source: Source) -> dict[str, np.ndarray]:
    return {name: array for names in groups(found) for name, array in materialise(found, source, names).items()}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_are_neurons_and_outputs_of_heads(dtype: str) -> None:
    source = Source()
    found = made(recipes(dtype), source)
    truth = {"w1": source.tensor("fc1"), "w2t": source.tensor("fc2").T, "wot": source.tensor("o").T}
    truth |= {"wq": source.tensor("q"), "wk": source.tensor("k"), "wv": source.tensor("v")}
    for name, expected in truth.items():
        np.testing.assert_array_equal(found[name], expected.astype(np.dtype(dtype)), err_msg=name)
        assert found[name].flags.c_contiguous
    assert (found["ffn.scales"] == 1).all()
    assert (found["attention.scales"] == 1).all()


def test_neurons_move_together() -> None:
    source = Source()
    found = made(recipes("float32", order="order"), source)
    np.testing.assert_array_equal(found["w1"], source.tensor("fc1")[ORDER])
    np.testing.assert_array_equal(found["w2t"], source.tensor("fc2").T[ORDER])


def test_8_bit_rows_times_their_scales_are_the_weights() -> None:
    source = Source()
    found = made(recipes(quantised=True, order="order"), source)
    w2t = found["w2t"] * found["ffn.scales"][:, 1:]
    np.testing.assert_allclose(w2t, source.tensor("fc2").T[ORDER], atol=np.abs(source.tensor("fc2")).max() / 250)
    wot = found["wot"] * found["attention.scales"][:, 3].reshape(-1, 1)
    np.testing.assert_allclose(wot, source.tensor("o").T, atol=np.abs(source.tensor("o")).max() / 250)
    assert found["w1"].dtype == np.int8
    assert np.abs(found["w1"]).max() == 127


def test_rows_of_another_shape_are_refused() -> None:
    with pytest.raises(InternalError, match=r"fc1 makes rows \[6, 4\], the recipe needs \[6, 8\]"):
        made(recipes(), Source(fc1=np.zeros((F, 4), np.float32)))


def test_weights_too_large_for_float16_are_counted_by_tensor_and_refused(tmp_path: Path) -> None:
    source = Source()
    source.values["fc1"][2, :3] = 1e5
    source.values["o"][1, 1] = -7e4
    source.values["words"][0, 0] = HALF_LIMIT
    with pytest.raises(InputError, match=r"4 weights in 2 tensors are beyond float16's largest value 65504") as caught:
        write_weights(tmp_path / "weights.bin", recipes(), source)
    assert caught.value.problems == ("fc1: 3 weights", "o: 1 weights")
    assert "--weights bf16" in caught.value.hint
    write_weights(tmp_path / "weights.bin", recipes("bfloat16"), source)


@pytest.mark.parametrize(("value", "counted"), [(65504.0, 0), (65519.0, 0), (65520.0, 1), (-65520.0, 1), (1e9, 1)])
def test_what_rounds_to_infinity_is_counted_and_nothing_else(value: float, counted: int) -> None:
    overflow = Overflow()
    out = narrow(np.array([[value, 1.0]], np.float32), "float16", overflow, "w")
    assert sum(overflow.counts.values()) == counted == int(np.isinf(out).sum())


def test_every_tensor_starts_where_a_device_can_read_it(tmp_path: Path) -> None:
    places, entry = write_weights(tmp_path / "weights.bin", recipes(), Source(), alignment=DEVICE_ALIGNMENT)
    assert all(place.offset % 256 == 0 for place in places.values())
    content = (tmp_path / "weights.bin").read_bytes()
    assert len(content) == entry.size
    place = places["w1"]
    stored = np.frombuffer(content[place.offset : place.offset + place.length], np.float16).reshape(F, E)
    np.testing.assert_array_equal(stored, Source().tensor("fc1").astype(np.float16))


def test_the_file_is_written_in_whole_aligned_chunks(tmp_path, monkeypatch):
    """So that the page cache keeps it in large pieces; the bytes are those of one plain write."""
    monkeypatch.setattr(weights, "_WRITE_BYTES", 64)
    sizes = []

    class Recorded(weights._Aligned):
        def _flush(self) -> None:
            sizes.append(self._filled)
            super()._flush()

    monkeypatch.setattr(weights, "_Aligned", Recorded)
    _, entry = write_weights(tmp_path / "weights.bin", recipes(), Source())
    monkeypatch.undo()
    write_weights(tmp_path / "plain.bin", recipes(), Source())
    assert (tmp_path / "weights.bin").read_bytes() == (tmp_path / "plain.bin").read_bytes()
    assert set(sizes[:-1]) == {64}
    assert sum(sizes) == entry.size
