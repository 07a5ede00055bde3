# SPDX-License-Identifier: Apache-2.0
"""Time per token against density and against model size, beside the floor that the memory sets."""
