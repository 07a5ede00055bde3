# SPDX-License-Identifier: Apache-2.0
"""Writes docs/gpu-kernels.md: what each CUDA kernel must move, and the time that bandwidth alone allows.

Run it after a change of a kernel's launch structure or of what it moves; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil
from pathlib import Path
from typing import NamedTuple

PAGE = Path(__file__).resolve().parent.parent / "docs" / "gpu-kernels.md"
CARDS = {"A100": 2039e9, "H100": 3352e9, "4090": 1008e9}
"""Bytes per second of memory, from the makers' data sheets."""

DENSITIES = (1.0, 0.5, 0.2)
SLOTS = 1024
"""Filled cache slots in the tables."""
BLOCK = 16
"""Neurons per unit in the tables."""
GOAL_SLOTS, GOAL_SPEEDUP, GOAL_SHARE = 513, 1.7, 0.8
"""Filled slots, speed-up and share of the bandwidth of the goal, as tests/gpu has them."""


class Model(NamedTuple):
    """Sizes of one OPT."""

    name: str
    layers: int
    hidden: int
    neurons: int
    heads: int

    @property
    def head_size(self) -> int:
        """D."""
        return self.hidden // self.heads


MODELS = (
    Model("opt-1.3b", 24, 2048, 8192, 32),
    Model("opt-6.7b", 32, 4096, 16384, 32),
    Model("opt-13b", 40, 5120, 20480, 40),
)


class Moved(NamedTuple):
    """Bytes of one kernel for one layer, one token, 2-byte activations."""

    kernel: str
    size: float


def row_bytes(model: Model, weight: int) -> int:
    """One row of a weight matrix, its scale included."""
    return model.hidden * weight + 4


def splits(model: Model, weight: int) -> int:
    """Splits of the list in gather_sum.cu for one row of activations."""
    strips = ceil(model.hidden / (32 * (16 // weight)))
    return min(64, max(1, ceil(320 / strips)))


def moved(model: Model, weight: int, density: float, *, kv: str = "all", slots: int = SLOTS) -> Iterator[Moved]:
    """Every kernel of a sparse layer; `weight` is bytes per weight."""
    E, F, H, D = model.hidden, model.neurons, model.heads, model.head_size
    neurons, heads, row = density * F, round(density * H), row_bytes(model, weight)
    projected = heads + 2 * (H if kv == "all" else heads)
    partial = 2 * 4 * splits(model, weight) * E
    yield Moved("list_tile (heads)", 16 * H)
    yield Moved("project", projected * D * (row + 4) + 2 * E + 4 * heads * D + 4 * E)
    yield Moved("attend_span, merge_spans", heads * (slots * 2 * D * 2 + ceil(slots / 256) * 2 * 4 * (D + 2)))
    yield Moved("sum_members (wot)", heads * D * (row + 4) + partial / 2)
    yield Moved("finish_sum (attention)", partial / 2 + 6 * E)
    yield Moved("list_tile (neurons)", 16 * F / BLOCK)
    yield Moved("hidden_of_listed", neurons * (row + 8) + 2 * E)
    yield Moved("sum_members (w2t)", neurons * (row + 4) + partial / 2)
    yield Moved("finish_sum (FFN)", partial / 2 + 6 * E)


def counted(model: Model, weight: int, density: float, kv: str, slots: int) -> float:
    """Bytes of a sparse layer as the measurement on a GPU counts them: weights, scales, keys and values."""
    H, D, row = model.heads, model.head_size, row_bytes(model, weight)
    heads = round(density * H)
    rows = 2 * density * model.neurons + (2 * heads + 2 * (H if kv == "all" else heads)) * D
    return rows * row + heads * slots * 2 * D * 2


def dense(model: Model, slots: int) -> float:
    """Bytes of a dense fp16 layer: weights, keys and values."""
    E = model.hidden
    return (4 * E * E + 2 * E * model.neurons + 2 * slots * E) * 2


def selection(model: Model, units: int) -> float:
    """Bytes of one selection for all predicted layers: scores once from memory (later passes find them in L2)."""
    return (model.layers - 1) * (4 * units + 8)


def page() -> str:
    """The whole page."""
    tables = "".join(_model_table(model, weight) for model in MODELS for weight in (2, 1))
    return HEAD + _launch_table() + NOTES + tables + _selection_table() + SHARES + _bounds_table() + ALLOWED


def _cells(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |\n"


def _launch_table() -> str:
    heads = ("kernel", "file", "grid", "block", "bytes, one token")
    return "".join(_cells(*row) for row in (heads, ["---"] * len(heads), *LAUNCHES))


def _model_table(model: Model, weight: int) -> str:
    name = "fp16" if weight == 2 else "int8"
    out = f"\n### {model.name}, {name} weights\n\n"
    columns = [f"{d:g}: {unit}" for d in DENSITIES for unit in ("MB", *(f"us {card}" for card in CARDS))]
    out += _cells("kernel", *columns) + _cells(*(["---"] * (1 + len(columns))))
    per_density = [list(moved(model, weight, density)) for density in DENSITIES]
    for rows in zip(*per_density, strict=True):
        out += _cells(rows[0].kernel, *_figures([row.size for row in rows]))
    totals = [sum(row.size for row in rows) for rows in per_density]
    out += _cells("one layer", *_figures(totals))
    out += _cells(f"{model.layers} layers", *_figures([total * model.layers for total in totals]))
    return out


def _figures(sizes: list[float]) -> Iterator[str]:
    for size in sizes:
        yield f"{size / 1e6:.3g}" if size < 1e9 else f"{size / 1e6:.0f}"
        for bandwidth in CARDS.values():
            yield f"{size / bandwidth * 1e6:.1f}" if size / bandwidth < 1e-3 else f"{size / bandwidth * 1e6:.0f}"


def _selection_table() -> str:
    out = "\n### Selection\n\nOnce per token, for all layers but the first, whatever the density.\n\n"
    out += _cells("model", "units of a layer", "kB", *(f"us {card}" for card in CARDS))
    out += _cells(*(["---"] * (3 + len(CARDS))))
    for model in MODELS:
        for what, units in (
            ("heads", model.heads),
            ("blocks of 16", model.neurons // BLOCK),
            ("neurons", model.neurons),
        ):
            size = selection(model, units)
            times = (f"{size / bandwidth * 1e6:.2f}" for bandwidth in CARDS.values())
            out += _cells(model.name, f"{units} ({what})", f"{size / 1e3:.0f}", *times)
    return out


def _bounds_table() -> str:
    cases = [(weight, density) for weight in (2, 1) for density in (0.5, 0.2)]
    names = [f"{'fp16' if weight == 2 else 'int8'} at {density:g}" for weight, density in cases]
    last = "cuBLAS at most, for the goal"
    out = _cells("model", "kv", *names, "fp16 at 0.5, every byte", last) + _cells(*(["---"] * (4 + len(cases))))
    for model in MODELS:
        whole = dense(model, GOAL_SLOTS)
        for kv in ("all", "active"):
            bounds = [whole / counted(model, *case, kv, GOAL_SLOTS) for case in cases]
            every = whole / sum(row.size for row in moved(model, 2, 0.5, kv=kv, slots=GOAL_SLOTS))
            limit = f"{100 * bounds[0] * GOAL_SHARE / GOAL_SPEEDUP:.0f} %"
            out += _cells(model.name, kv, *(f"{bound:.2f}x" for bound in [*bounds, every]), limit)
    return out


LAUNCHES = (
    ("`list_tile`", "unit_list.cu", "tiles", 512, "4 N scores, 4 N bits, 8 per listed unit"),
    ("`hidden_of_listed`", "sparse_ffn.cu", "F / (8 warps x 2 to 4 neurons), tiles", 256,
     "k (E ws + 12): w1 row, scale, bias, result"),
    ("`sum_members`", "gather_sum.cu", "E / (32 lanes x 16 bytes), splits, tiles", 256,
     "k (E ws + 8): w2t row, scale, coefficient; 4 E per split"),
    ("`finish_sum`", "gather_sum.cu", "E / 128, rows", 128, "4 E per split, bias, y"),
    ("`project`", "sparse_attention.cu", "3 E / (8 warps x 2 to 4 rows), tiles", 256,
     "(A + 2 H) D (E ws + 8) with `kv=all`, 3 A D (E ws + 8) else"),
    ("`copy_prefix`", "sparse_attention.cu", "16, B H", 256, "only if past and present differ: 4 P E as"),
    ("`attend_span`", "attend.cu", "H, T / 256, rows", 256, "2 A P D as"),
    ("`merge_spans`", "attend.cu", "H, rows", 128, "A (D + 2) 4 per span; only if T > 256"),
    ("`sum_members`", "gather_sum.cu", "as above", 256, "A D (E ws + 8) of wot"),
    ("`select_local`", "select_threshold.cu", "rows x L", 512, "4 N per layer from memory; three more passes from L2"),
    ("`count_layer` x 3, `finish_global`", "select_threshold.cu", "L, rows", 512,
     "the same, one launch per pass; 24 KiB of histograms per row"),
)  # fmt: skip
"""Kernel, file, grid, threads, bytes."""

HEAD = """\
<!-- Generated by scripts/gpu_kernels_page.py; edit that file and run the script. -->
# CUDA kernels

`plugins/cuda/` holds the three operators as plain SIMT kernels behind a C interface (`kernels.h`), without TensorRT.
**No kernel has run on a GPU yet.** What is known of them: they compile for sm_75 to sm_120, and on the host, compiled
over the shim in `tests/emulation/shim`, they give what the ONNX functions of the operators give, for every case that
the CPU kernels are tested with, in fp32, fp16, bf16 and with int8 weights, in two orders of threads, and on random bits
under AddressSanitizer. The times below are arithmetic, not measurements: bytes divided by the bandwidth on the card's
data sheet. `make gpu-test` on a machine with a GPU measures the same kernels.

## Launches

Letters as in [ops.md](ops.md); R rows = B * S, cut into chunks of 64 and tiles of 1, 4 or 16 rows that share every
weight that is read. ws bytes per weight, as bytes per activation; k active neurons, A active heads, P seen slots.

"""
NOTES = """
A call of SparseFFN is 4 launches per chunk, of SparseAttention 6 (5 if T <= 256, one more if it copies the cache), of
SelectThreshold 1 (local) or 5 (global), for all layers at once. Grids are sized for density 1 and blocks without work
leave at once, so the host never needs to know a count and a call can be captured into a CUDA graph.

How they are meant to reach the bandwidth:

- Rows are contiguous and read in 16-byte loads that are used once (evict-first). One row of activations: a warp holds
  8 such loads per lane in flight (2 neurons x 4 in `hidden_of_listed` and `project`, 8 listed rows in `sum_members`).
- The list is cut evenly between warps, so an uneven mask costs nothing; which units are active changes no schedule.
- `sum_members` cuts the list into as many splits as make about 320 blocks; a second pass adds the splits in order.
  At low density fewer splits are used (at least 4 listed rows per warp), and fewer partial sums are written.
- Sums are fp32 in a fixed order; there is no atomic on floats. `read` and histograms use integer atomics.
- `skip_zeros` leaves zero neurons out of `sum_members` at the places where they were, so no bit changes.
- A tile of 16 rows keeps up to 128 sums per lane: arithmetic, not bandwidth, is then near its limit for int8 weights.

Known costs: `list_tile` is one block per tile and adds its launch to every operator; attention with T > 256 adds
`merge_spans`; a row's rounding depends on which neurons its tile lists (the same call always gives the same bits).

## Bytes and times for one token

Batch 1, one new token, `kv=all`, no `skip_zeros`, 1024 filled slots, units of 16 neurons, fp16 activations and cache;
density applies to heads and neurons alike. Columns: megabytes, then microseconds at full bandwidth on the A100 80 GB
SXM (2039 GB/s), the H100 SXM (3352 GB/s) and the RTX 4090 (1008 GB/s).
"""

SHARES = """
At density 0.5 the FFN moves half of its bytes; attention three quarters of its weights (keys and values of skipped
heads are still written, so that later tokens may use them) and half of the cache. With `kv=active`, legal for a fixed
mask, attention moves half of everything.

## What the bytes allow against dense layers

The goal: at density 0.5 and batch 1, FFN and attention in fp16 at least 1.7x faster than the dense fp16 products of
cuBLAS, at 80 % of the bandwidth. `make gpu-test` counts and times attention over the cache on both sides: cuBLAS does
the products with all keys and values too (without the softmax between them). The table gives dense bytes divided by
sparse bytes, the speed-up if both sides moved their bytes equally fast, with 513 slots; int8 weights too are held
against dense fp16. "Every byte" adds lists, activations and partial sums to the sparse side, as if none stayed in L2.
The last column is the share of the bandwidth above which cuBLAS puts 1.7x out of reach of sparse fp16 kernels at 80 %.

"""
ALLOWED = """
So with `kv=all`, as a predicted mask needs it, half of the units is at the limit of the goal: 1.7x then means that the
sparse kernels use the bandwidth at least as well as cuBLAS does. With `kv=active`, with int8 weights, or at a lower
density there is room. `make gpu-test` judges both values of `kv` and prints beside each what the bytes allow and the
share of the bandwidth that cuBLAS reaches.

It fails for whatever was not run, such as engines without a TensorRT for the card (make prints `Error 10`), and for a
missed goal (`Error 11`), unless told otherwise: `make gpu-test ALLOW_SKIPS=1 ALLOW_MISSED=1`. What was not run and
which goals were met stands in the card's file in build/gpu too.
"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
