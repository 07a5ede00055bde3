# SPDX-License-Identifier: Apache-2.0
"""Every case that the CPU kernels are tested with, on the emulated CUDA kernels and in each activation type.

The test functions are those of tests/plugins; only what they call is exchanged: the kernel, the rounding of random
operands, the tolerance, and the rows that share a read.
"""

from __future__ import annotations

import functools
from types import ModuleType

import numpy as np
import pytest

from shadowc.spec.ops import OpSpec
from tests.emulation import operators
from tests.plugins import kernels as cpu_kernels
from tests.plugins import numpy_reference, test_select_threshold, test_sparse_attention, test_sparse_ffn

TILE = 16
"""SHADOWC_TILE_ROWS of plugins/cuda/kernels.h."""

OF_THE_HOST = (
    "refuses",
    "says_what",
    "reports_all",
    "names_the_types",
    "any_number_of_threads",
    "concurrent",
    "bound_twice",
)
"""Parts of names: what ONNX Runtime's operators check, and how they use its threads; test_interface.py has ours."""

OF_THE_CPU = (
    # There a row's sums are cut by neuron. Here the list is cut evenly between warps, so how a row is rounded depends
    # on which neurons the tile lists.
    "test_ffn_gives_a_row_the_same_bits_whatever_its_neighbours_leave_out",
    "test_ffn_gives_a_small_row_the_same_bits_whatever_its_neighbours_are",
    # Digits of activations, and how int4 rows are added there.
    "test_a_wide_row_that_has_no_digits_is_summed_in_floats",
    "test_int4_columns_are_summed_exactly_whatever_the_number_of_rows_and_groups",
    "test_int4_factors_without_digits_are_added_as_floats",
    "test_extreme_int4_weights_meet_extreme_digits_without_saturating",
    "test_extreme_int4_weights_meet_extreme_bytes_without_saturating",
    "test_int4_groups_whose_factors_have_no_digits_leave_the_bits_of_others",
    "test_int4_tokens_that_may_round_do_so_to_eight_bits",
    "test_int4_tokens_that_may_round_do_so_to_eight_bits_in_attention",
    # A cache narrower than the activations.
    "test_attention_rounds_to_a_float16_cache_as_ieee_does_and_attends_to_what_it_stored",
    "test_a_kernel_that_attends_to_unrounded_keys_would_be_found",
    # The plugin selects from at most 64 layers.
    "test_select_ranks_layers_together_of_which_some_are_in_no_sample",
    # The plugin's field has 32 bits.
    "test_a_block_of_more_neurons_than_there_are_is_one_of_them_all",
    # Below, with what half types can promise.
    "test_attention_survives_logits_that_overflow_exp",
)

INSTEAD = {"bfloat16": "float32", "int4": "int8", "float16": "float32"}
"""Types of weights and of the cache that the CPU kernels alone have beside float32 activations: what is drawn in
their place. Cases that name one are left out, see conftest.py."""

MODULES = (test_select_threshold, test_sparse_ffn, test_sparse_attention)


def _is_shared(name: str) -> bool:
    return name.startswith("test_") and name not in OF_THE_CPU and not any(part in name for part in OF_THE_HOST)


for _module in MODULES:
    globals().update({name: value for name, value in vars(_module).items() if _is_shared(name) and callable(value)})


NARROW = [pytest.param(act, marks=pytest.mark.slow) for act in operators.ACTIVATIONS if act != "float32"]


@pytest.fixture(scope="module", params=["float32", *NARROW], autouse=True)
def activations(request, kernels):
    """Exchanges what the tests call, for one activation type."""
    act, tolerance = request.param, operators.TOLERANCES[request.param]
    on_cpu, close = cpu_kernels.run, cpu_kernels.assert_close

    def run(spec: OpSpec, arrays: dict, threads: int = 2, kernel: bool = True, **attributes: object) -> dict:
        if kernel:
            return operators.run(kernels, spec, act, arrays, **attributes)
        return on_cpu(spec, arrays, threads, kernel, **attributes)

    def rounding(module: ModuleType):
        made = module.operands

        def known(*args: object, **sizes: object) -> dict[str, np.ndarray]:
            sizes |= {name: INSTEAD.get(sizes[name], sizes[name]) for name in ("dtype", "cache") if name in sizes}
            return operators.rounded(made(*args, **sizes), act)

        return functools.wraps(made)(known)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_kernels, "run", run)
        patch.setattr(cpu_kernels, "assert_close", lambda found, expected, *_: close(found, expected, tolerance))
        patch.setattr(numpy_reference, "TILE", TILE)
        for module in (test_sparse_ffn, test_sparse_attention):
            patch.setattr(module, "operands", rounding(module))
        yield act


def test_attention_survives_logits_that_overflow_exp(activations):
    """In half types rounding of a key moves such a logit by more than 1: only float32 gives the same shares."""
    if activations == "float32":
        test_sparse_attention.test_attention_survives_logits_that_overflow_exp()
    arrays = test_sparse_attention.operands(np.random.default_rng(28), S=3, Z=0)
    arrays["bqkv"] *= 60
    found, _ = test_sparse_attention.attend(arrays)
    assert np.isfinite(found["y"]).all()


def test_the_shared_cases_are_most_of_those_of_the_cpu_kernels():
    names = {name for module in MODULES for name in vars(module) if name.startswith("test_")}
    assert names - set(OF_THE_CPU) > set(filter(_is_shared, names))
    assert len(list(filter(_is_shared, names))) >= 28
    assert np.all([name in globals() for name in filter(_is_shared, names)])
