# SPDX-License-Identifier: Apache-2.0
"""Runs engine folders of targets tensorrt and tensorrt-rtx: checks, device memory, two plans over one set of weights.

`bindings` finds TensorRT's Python package, `cuda` wraps the CUDA runtime, `device` says what a device must do (a
host-memory stand-in runs the same code in tests), `layout` computes every buffer from engine.json, `workspace` holds
the buffers and the captured graph of a batch size, `decoder` feeds tokens, `engine` is what `shadowc.load` returns.
"""
