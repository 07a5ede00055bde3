# SPDX-License-Identifier: Apache-2.0
"""From a transformed program to files: weight packing, one module per target, the engine folder."""
