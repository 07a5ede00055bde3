# SPDX-License-Identifier: Apache-2.0
"""Targets tensorrt-rtx and tensorrt: two plans over one weights.bin, built in a process of their own."""
