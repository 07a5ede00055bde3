# SPDX-License-Identifier: Apache-2.0
"""Many rows with int8 weights: products in integers where the CPU has VNNI or AMX, else with floats."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from shadowc.spec.ops import SPARSE_ATTENTION, SPARSE_FFN
from tests.plugins import kernels, numpy_reference, test_sparse_attention, test_sparse_ffn

LEVELS = ("avx2", "avx512", "avx512_icelake", "avx512_amx") if kernels.MACHINE == "x86_64" else ()
INTEGERS = ("avx512_icelake", "avx512_amx")
"""Levels whose sums are exact: they agree bit for bit."""
PROMPT = "prompt"
ENOUGH = 1 << 16
"""Weights from which panels are used at all (KernelsFor in plugins/cpu/panel_rows.cc)."""


def ffn_operands(seed, **shape):
    arrays = test_sparse_ffn.operands(np.random.default_rng(seed), dtype="int8", **shape)
    assert arrays["w"].size >= ENOUGH
    return arrays


def attention_operands(seed, **shape):
    arrays = test_sparse_attention.operands(np.random.default_rng(seed), dtype="int8", **shape)
    assert arrays["w"].size >= ENOUGH
    return arrays


def compute() -> dict[str, np.ndarray]:
    """What every level is asked for: widths, neurons and rows with and without remainders, masks, zero rows."""
    results = {}
    for E, F, rows, block in ((64, 1100, 16, 1), (129, 270, 17, 16), (200, 1090, 40, 3), (256, 130, 70, 16)):
        arrays = ffn_operands(E, B=rows, F=F, E=E, block=block)
        arrays["x"][rows // 2] = 0
        for skip_zeros in (0, 1):
            found = kernels.run(SPARSE_FFN, arrays, block=block, skip_zeros=skip_zeros)
            results[f"ffn_{E}_{skip_zeros}"], results[f"ffn_read_{E}_{skip_zeros}"] = found["y"], found["read"]
    for D, H in ((64, 3), (80, 3), (96, 2), (128, 1), (37, 5)):
        for kv in ("all", "active"):
            arrays = attention_operands(D, S=35, Z=20, H=H, D=D, T=50, fixed_mask=True)
            found = kernels.run(SPARSE_ATTENTION, arrays, kv=kv)
            for name in ("y", "context", "read"):
                results[f"attention_{D}_{kv}_{name}"] = found[name]
            for name in ("present_key", "present_value"):
                results[f"attention_{D}_{kv}_{name}"] = test_sparse_attention.live(found[name], arrays)
    return results | prompts()


def prompts() -> dict[str, np.ndarray]:
    """The same of prompts, whose panels have one digit, two or, where a row has an outlier, both; names say PROMPT.

    Levels that compute with other digits differ in them.
    """
    results = {}
    for E, F, rows in ((129, 1100, 16), (200, 600, 33), (1030, 300, 70)):
        arrays = ffn_operands(E, S=rows, Z=0, F=F, E=E)
        arrays["x"][0, rows // 2], arrays["x"][0, rows // 3, 5] = 0, 300
        for few_digits in (1, 2):
            found = kernels.run(SPARSE_FFN, arrays, few_digits=few_digits)["y"]
            results[f"{PROMPT}_ffn_{E}_{few_digits}"] = found
    for D, H, rows in ((64, 3, 70), (37, 5, 40)):
        arrays = attention_operands(D, S=rows, Z=0, H=H, D=D, T=80)
        arrays["x"][0, rows // 3, 5] = 300
        for few_digits in (1, 2):
            found = kernels.run(SPARSE_ATTENTION, arrays, few_digits=few_digits)
            for name in ("y", "present_key", "present_value"):
                live = found[name] if name == "y" else test_sparse_attention.live(found[name], arrays)
                results[f"{PROMPT}_attention_{D}_{few_digits}_{name}"] = live
    return results


def at_level(level: str, path) -> dict[str, np.ndarray] | None:
    code = "import sys, numpy; from tests.plugins import test_panels; numpy.savez(sys.argv[1], **test_panels.compute())"
    process = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env=os.environ | {"SHADOWC_ISA": level, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
    )
    if "which this CPU does not have" in process.stderr:
        return None
    assert process.returncode == 0, process.stderr
    with np.load(path) as results:
        return dict(results)


@pytest.fixture(scope="module")
def levels(tmp_path_factory) -> dict[str, dict[str, np.ndarray]]:
    folder = tmp_path_factory.mktemp("levels")
    found = {level: at_level(level, folder / f"{level}.npz") for level in LEVELS}
    return {level: results for level, results in found.items() if results is not None}


def test_every_level_agrees_with_the_best_one(levels):
    if not levels:
        pytest.skip("no level with panels here")
    best = compute()
    for results in levels.values():
        assert set(results) == set(best)
        for name, expected in best.items():
            if not name.startswith(PROMPT):
                kernels.assert_close(results[name], expected)


def test_levels_that_compute_in_integers_agree_bit_for_bit_and_are_not_the_float_path(levels):
    integers = [levels[level] for level in INTEGERS if level in levels]
    if not integers:
        pytest.skip("neither VNNI nor AMX here")
    for results in integers[1:]:
        for name, expected in integers[0].items():
            np.testing.assert_array_equal(results[name], expected, err_msg=name)
    for name, floats in levels["avx512"].items():
        if name.endswith("_y") or name.startswith("ffn_2"):
            assert (floats != integers[0][name]).any() or not floats.any()


@pytest.mark.parametrize(("E", "F", "block"), [(65, 600, 1), (520, 1100, 16), (1030, 70, 4), (192, 2100, 1)])
@pytest.mark.parametrize(("B", "S", "Z"), [(1, 33, 0), (2, 20, 7), (18, 1, 1)])
def test_ffn_of_many_rows_equals_its_definition(B, S, Z, E, F, block):
    arrays = ffn_operands(B + E, B=B, S=S, Z=Z, F=F, E=E, block=block)
    test_sparse_ffn.assert_as_defined(arrays, layer=1, block=block, skip_zeros=B % 2)


@pytest.mark.parametrize(("H", "D"), [(3, 64), (3, 80), (2, 96), (2, 128), (5, 37)])
@pytest.mark.parametrize(("B", "S", "Z"), [(1, 35, 0), (2, 17, 9), (20, 1, 1)])
@pytest.mark.parametrize("cache", test_sparse_attention.CACHES)
def test_attention_of_many_rows_equals_its_definition(B, S, Z, H, D, cache):
    arrays = attention_operands(B + D, B=B, S=S, Z=Z, H=H, D=D, T=40, cache=cache)
    test_sparse_attention.assert_as_defined(arrays, layer=1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e35, 1e-38])
def test_ffn_of_a_row_without_digits_is_what_floats_give_and_its_neighbours_keep_their_bits(value):
    arrays = ffn_operands(3, B=20, F=600, E=100)
    clean = test_sparse_ffn.ffn(arrays)[0]
    arrays["x"][7] = 0
    arrays["x"][7, 0, 3] = value
    y, read = test_sparse_ffn.ffn(arrays)
    alone = {name: arrays[name][7:8] if name in ("x", "scores", "threshold") else arrays[name] for name in arrays}
    kernels.assert_close(y[7], test_sparse_ffn.ffn(alone)[0][0])
    others = np.arange(20) != 7
    np.testing.assert_array_equal(y[others], clean[others])
    with np.errstate(invalid="ignore"):
        assert read == numpy_reference.sparse_ffn(**arrays)[1]


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e35])
def test_attention_of_a_row_without_digits_spoils_no_earlier_one(value):
    arrays = attention_operands(4, S=20, Z=0, H=3, D=64, T=24)
    clean, _ = test_sparse_attention.attend(arrays)
    arrays["x"][0, 12, 5] = value
    found, _ = test_sparse_attention.attend(arrays)
    np.testing.assert_array_equal(found["y"][0, :12], clean["y"][0, :12])
    assert not np.isfinite(found["present_key"][0, :, arrays["past"][0] + 12]).all() or value == 1e35
    assert (found["y"][0, 12] != clean["y"][0, 12]).all()


def test_hidden_values_without_digits_come_from_floats():
    """x has digits, b1 makes some hidden values infinite: the result is infinite or NaN as with floats."""
    arrays = ffn_operands(5, B=20, F=600, E=100)
    arrays["b1"][17] = np.inf
    y, _ = test_sparse_ffn.ffn(arrays)
    active = numpy_reference.unit_mask(arrays["x"], arrays["scores"], arrays["threshold"], 0)[:, 0, 17]
    assert active.any()
    assert not active.all()
    assert not np.isfinite(y[active]).any()
    assert np.isfinite(y[~active]).all()


def test_ffn_gives_a_row_the_same_bits_whatever_its_neighbours_are_and_leave_out():
    arrays = ffn_operands(6, B=40, F=2100, E=200, block=4)
    first = kernels.run(SPARSE_FFN, arrays, block=4)["y"][3]
    arrays["x"][4:] *= 50
    arrays["x"][5, 0, 0] = np.nan
    arrays["threshold"][:3] = np.inf
    np.testing.assert_array_equal(kernels.run(SPARSE_FFN, arrays, block=4)["y"][3], first)
    arrays["threshold"][np.arange(40) != 3] = np.inf
    np.testing.assert_array_equal(kernels.run(SPARSE_FFN, arrays, block=4)["y"][3], first)
    fewer = {name: arrays[name][:17] if name in ("x", "scores", "threshold") else arrays[name] for name in arrays}
    np.testing.assert_array_equal(kernels.run(SPARSE_FFN, fewer, block=4)["y"][3], first)


def test_ffn_of_many_rows_reads_only_first_halves_when_no_neuron_fires():
    arrays = ffn_operands(7, B=20, Z=0, F=600, E=100)
    arrays["b1"] -= 1000
    y, read = test_sparse_ffn.ffn(arrays, skip_zeros=1)
    np.testing.assert_array_equal(y, np.broadcast_to(arrays["b2"], y.shape))
    assert read == numpy_reference.Read(600, 600 * (100 + 4))


def test_ffn_returns_exactly_the_bias_when_no_row_computes_anything():
    arrays = ffn_operands(8, B=20, F=600, E=100)
    arrays["threshold"][:] = np.inf
    y, read = test_sparse_ffn.ffn(arrays)
    np.testing.assert_array_equal(y, np.broadcast_to(arrays["b2"], y.shape))
    assert read == numpy_reference.Read(0, 0)


@pytest.mark.parametrize("largest", [1.0, 3.0, 0.7300001, 5.1e-7, 123456.79])
def test_the_largest_value_of_a_row_keeps_its_digits(largest):
    """Scaled to 24 bits it may round up: one more than three balanced digits hold would wrap to a negative."""
    arrays = ffn_operands(9, B=64, Z=0, F=600, E=100)
    arrays["x"] /= np.abs(arrays["x"]).max(axis=2, keepdims=True)
    arrays["x"] *= np.float32(largest) * np.linspace(1, 2, 64, dtype=np.float32)[:, None, None]
    test_sparse_ffn.assert_as_defined(arrays)


def test_extreme_weights_and_digits_do_not_overflow():
    """All weights at 127 or -127, all values equal: the largest sums that the widest model can make."""
    E, F = 9216, 24
    arrays = ffn_operands(10, B=16, Z=0, F=F, E=E)
    arrays["x"][:] = 1
    arrays["w"][:, 0] = np.where(np.arange(F) % 2, 127, -127)[:, None]
    test_sparse_ffn.assert_as_defined(arrays)


def rounded_to(x, most):
    """Each row of x as a multiple of its step, of which its largest value is so many."""
    step = np.abs(x).max(-1, keepdims=True) / most
    return np.round(x / np.where(step == 0, 1, step)) * step


def rounded(x, digits):
    """The same in that many balanced digits of base 256."""
    return rounded_to(x, 127 * sum(256.0**place for place in range(digits)))


def test_a_digit_too_few_is_noticed():
    """What kernels of two digits would return is out of tolerance, of three well within it."""
    arrays = ffn_operands(13, S=33, Z=0, F=1100, E=520)
    fc1, fc2 = np.moveaxis(arrays["w"] * arrays["scales"].astype(np.float64)[..., None], 1, 0)

    def computed(digits):
        hidden = np.maximum(rounded(arrays["x"].astype(np.float64), digits) @ fc1.T + arrays["b1"], 0)
        return rounded(hidden * arrays["scales"][:, 1], digits) @ (fc2 / arrays["scales"][:, 1:]) + arrays["b2"]

    expected = numpy_reference.sparse_ffn(**arrays)[0]
    kernels.assert_close(computed(3), expected, kernels.TOLERANCE / 20)
    with pytest.raises(AssertionError):
        kernels.assert_close(computed(2), expected)


@pytest.mark.parametrize("rows", [16, 70])
def test_many_rows_repeat_their_bits_at_any_number_of_threads(rows):
    arrays = ffn_operands(11, B=rows, F=2100, E=200)
    first = kernels.run(SPARSE_FFN, arrays, threads=1)["y"]
    for threads in (2, 3):
        np.testing.assert_array_equal(kernels.run(SPARSE_FFN, arrays, threads=threads)["y"], first)
    arrays = attention_operands(12, S=rows, Z=0, H=3, D=80, T=80)
    first = kernels.run(SPARSE_ATTENTION, arrays, threads=1)["y"]
    for threads in (2, 3):
        np.testing.assert_array_equal(kernels.run(SPARSE_ATTENTION, arrays, threads=threads)["y"], first)
