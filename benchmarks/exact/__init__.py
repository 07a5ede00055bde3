# SPDX-License-Identifier: Apache-2.0
"""The exact control: what skipping the zeros of ReLU saves by itself, beside masks and together with them.

Trained OPT models leave most ReLU outputs at zero, dummy weights half of them. shifted.py makes dummy checkpoints
whose fc1 biases are lowered until a given share is zero.
"""
