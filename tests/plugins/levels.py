# SPDX-License-Identifier: Apache-2.0
"""SIMD levels of the library that is tested, by the names that SHADOWC_ISA takes."""

from __future__ import annotations

from tests.plugins import kernels

HERE = {
    "x86_64": ("sse2", "ssse3", "sse4", "avx2", "avx512", "avx512_icelake", "avx512_zen4", "avx512_amx"),
    "aarch64": ("neon_without_aes", "neon", "neon_bf16", "sve", "sve2", "sve_256", "sve2_128"),
}.get(kernels.MACHINE, ())
