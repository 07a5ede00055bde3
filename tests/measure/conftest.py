# SPDX-License-Identifier: Apache-2.0
"""The engines of the end-to-end tests."""

from tests.e2e.conftest import int8_engine, sequence_engine, sparse_engine, stage_cache

__all__ = ["int8_engine", "sequence_engine", "sparse_engine", "stage_cache"]
