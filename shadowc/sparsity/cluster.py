# SPDX-License-Identifier: Apache-2.0
"""Neuron orders: which neurons share a block, so that blocks can be kept or skipped as a whole.

In: an importance trace. Out: one permutation of the neurons per predicted layer; permuting fc1 rows and fc2 columns
together changes nothing in what the model computes. Neurons are points whose coordinates are their importances at
the recorded positions; a layer is cut in two along the direction in which its points differ most, each half again,
and so on down to blocks. The first cut mostly separates strong from weak neurons, later ones contexts.

Letters: M positions, Lp predicted layers (model layers 1..L-1), F neurons, N blocks, R directions kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from shadowc.sparsity.importance import ImportanceTrace

    Floats = npt.NDArray[np.float32]

DIRECTIONS = 64
"""Principal directions in which the points are described before cutting."""
POWER_STEPS = 3
SQUARINGS = 5
CENTRE_STEPS = 10
SEED = 20240624


def neuron_orders(
    trace: ImportanceTrace, block: int, rows: npt.NDArray[np.intp] | None = None
) -> npt.NDArray[np.int32]:
    """Return int32 [Lp, F]: entry i is the checkpoint's neuron that becomes neuron i; the identity for block 1.

    Args:
        trace: the importances.
        block: neurons per block; the last block may be short.
        rows: positions to use (training leaves its validation positions out); None: all.
    """
    orders = np.tile(np.arange(trace.neurons, dtype=np.int32), (trace.layers - 1, 1))
    if block > 1:
        for layer in range(1, trace.layers):
            neurons_MF = trace.neurons_MF(layer)
            orders[layer - 1] = layer_order(neurons_MF if rows is None else neurons_MF[rows], block)
    return orders


def layer_order(neurons_MF: Floats, block: int) -> npt.NDArray[np.int32]:
    """Return the order of one layer; the same input gives the same order (at the same number of threads)."""
    points_FR = _points(_profiles(neurons_MF))
    parts = [np.arange(len(points_FR))]
    while any(len(part) > block for part in parts):
        parts = [half for part in parts for half in _cut(points_FR, part, block)]
    return np.concatenate(parts).astype(np.int32)


def block_sums(neurons_MF: Floats, order_F: npt.NDArray[np.int32], block: int) -> Floats:
    """Return [M, N]: the importance of each block, its neurons taken in `order_F`."""
    if block == 1:
        return np.take(neurons_MF, order_F, axis=1)  # an index would leave columns together, as slower rows
    starts_N = np.arange(0, neurons_MF.shape[1], block)
    sums: Floats = np.add.reduceat(neurons_MF[:, order_F], starts_N, axis=1)
    return sums


def _profiles(neurons_MF: Floats) -> Floats:
    """Return each position's importances relative to its largest, square-rooted.

    Relative, because a position's scale (how surprising its text was) says nothing about which neurons belong
    together; the root, because a few huge scores would decide every cut. A score with a sign keeps it.
    """
    size_MF = np.abs(neurons_MF)
    largest_M1 = size_MF.max(axis=1, keepdims=True)
    profiles: Floats = np.copysign(np.sqrt(size_MF / np.where(largest_M1 > 0, largest_M1, 1)), neurons_MF)
    return profiles


def _points(profiles_MF: Floats) -> Floats:
    """Return [F, R]: the neurons in the main directions of their profiles (randomised subspace iteration)."""
    rank = min(DIRECTIONS, *profiles_MF.shape)
    subspace_MR = np.random.default_rng(SEED).standard_normal((profiles_MF.shape[0], rank), dtype=np.float32)
    for _ in range(POWER_STEPS):
        subspace_MR = np.linalg.qr(profiles_MF @ (profiles_MF.T @ subspace_MR))[0]
    points: Floats = profiles_MF.T @ subspace_MR
    return points


def _cut(points_FR: Floats, part: npt.NDArray[np.intp], block: int) -> list[npt.NDArray[np.intp]]:
    """Cut one part in two; whole blocks on the left side.

    First along the widest direction, then along the line between the two centres until nothing moves (2-means with
    fixed sizes), which heals cuts through the middle of a group.
    """
    if len(part) <= block:
        return [part]
    centred_FR = points_FR[part] - points_FR[part].mean(axis=0)
    left = -(-len(part) // block) // 2 * block
    ranked = _ranked_along(_widest(centred_FR), centred_FR)
    for _ in range(CENTRE_STEPS):
        before = set(ranked[:left].tolist())
        direction_R = centred_FR[ranked[:left]].mean(axis=0) - centred_FR[ranked[left:]].mean(axis=0)
        ranked = _ranked_along(direction_R, centred_FR)
        if set(ranked[:left].tolist()) == before:
            break
    return [part[ranked[:left]], part[ranked[left:]]]


def _ranked_along(direction_R: Floats, centred_FR: Floats) -> npt.NDArray[np.intp]:
    """Return the points' indices, the farthest along the direction first.

    Not `@`: OpenBLAS's AVX-512 product of rows of five numbers raises the invalid flag from lanes it throws away.
    """
    return np.argsort(-np.einsum("fr,r->f", centred_FR, direction_R), kind="stable")


def _widest(centred_FR: Floats) -> Floats:
    """Return the direction in which the points differ most: a column of a high power of their covariance."""
    power_RR = centred_FR.T.astype(np.float64) @ centred_FR
    for _ in range(SQUARINGS):
        power_RR = power_RR / (np.trace(power_RR) or 1.0)
        power_RR = power_RR @ power_RR
    widest: Floats = power_RR[:, np.argmax(np.diagonal(power_RR))].astype(np.float32)
    return widest
