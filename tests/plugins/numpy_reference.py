# SPDX-License-Identifier: Apache-2.0
"""What the three operators compute, as plain float64 loops: independent of the ONNX functions and of the kernels.

Arrays are named as the operands in shadowc/spec/ops.py. Letters: B batch, S new tokens, Z sparse tail, L predicted
layers, N units, H heads, D head size, E hidden, T cache capacity, F neurons.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TILE = 32
"""Rows that share one pass over the records; `read` counts a record once per tile that needs it."""


@dataclass(frozen=True)
class Read:
    """What a kernel must report as read of `w` and `scales`."""

    records: int
    bytes: int


def real(w, scales):
    """Records as float64: each row times its scale; int4 (uint8, low half first) by groups of twice 32 values."""
    if w.dtype != np.uint8:
        return w.astype(np.float64) * scales[..., None]
    bytes_ = w.reshape(*scales.shape, 32).astype(np.int64)
    values = np.concatenate([bytes_ % 16, bytes_ // 16], axis=-1) - 8
    return (values * scales[..., None].astype(np.float64)).reshape(*w.shape[:-1], -1)


def row_bytes(w, scales):
    """Bytes of one record row and its scales."""
    return (w.nbytes + scales.nbytes) // w[..., 0].size


def unit_mask(x, scores, threshold, layer):
    """[B,S,N] bool: dense before the last Z tokens, then not(score < threshold)."""
    (B, S, _), Z, N = x.shape, scores.shape[1], scores.shape[3]
    mask = np.ones((B, S, N), bool)
    if S:
        below = scores[:, :, layer] < threshold[:, :, layer, None]
        mask[:, S - Z :] = np.broadcast_to(~below, (B, Z, N))
    return mask


def select_threshold(scores, density, scope="local", exempt=(-1,), min_active=0):
    B, Z, L, N = scores.shape
    rank = np.where(np.isnan(scores), np.inf, scores)
    kept = [layer for layer in range(L) if layer not in exempt]
    threshold = np.full((B, Z, L), -np.inf, np.float32)
    for b, z in np.ndindex(B, Z):
        share = float(density[b if len(density) > 1 else 0])
        share = 1.0 if np.isnan(share) else min(max(share, 0.0), 1.0)
        for layer in kept:
            pool = rank[b, z, kept] if scope == "global" else rank[b, z, layer]
            descending = np.sort(pool, axis=None)[::-1]
            k = int(np.floor(share * descending.size + 0.5))
            value = np.inf if k == 0 else -np.inf if k == descending.size else descending[k - 1]
            if min_active:
                value = min(value, np.sort(rank[b, z, layer])[::-1][min(min_active, N) - 1])
            threshold[b, z, layer] = value
    active = (~(scores < threshold[..., None])).sum(-1).astype(np.int32)
    return threshold, active


def normalised(x, scale, bias, epsilon):
    """LayerNorm of the last axis."""
    x = x.astype(np.float64)
    variance = x.var(axis=-1, keepdims=True)
    return (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(variance + np.float64(np.float32(epsilon))) * scale + bias


def sparse_ffn(x, scores, threshold, w, scales, b1, b2, norm_scale=None, norm_bias=None, *, epsilon=1e-5, **attributes):
    if norm_scale is None:
        return _sparse_ffn(x, scores, threshold, w, scales, b1, b2, **attributes)
    inner = normalised(x, norm_scale, norm_bias, epsilon)
    y, read = _sparse_ffn(inner, scores, threshold, w, scales, b1, b2, **attributes)
    return x + y, read


def _sparse_ffn(x, scores, threshold, w, scales, b1, b2, layer=0, block=1, skip_zeros=0):
    F = w.shape[0]
    mask = np.repeat(unit_mask(x, scores, threshold, layer), block, axis=2)[:, :, :F]
    records = real(w, scales)
    hidden = x.astype(np.float64) @ records[:, 0].T + b1
    hidden = np.where(mask, np.where(hidden < 0, 0, hidden), 0)  # NaN stays
    y = hidden @ records[:, 1] + b2

    rows, fired = mask.reshape(-1, F), (hidden != 0).reshape(-1, F)
    halves = touched = 0
    for first in range(0, len(rows), TILE):
        needed = rows[first : first + TILE].any(0)
        touched += needed.sum()
        halves += needed.sum() + (fired[first : first + TILE].any(0) if skip_zeros else needed).sum()
    return y, Read(int(touched), int(halves) * row_bytes(w, scales))


def sparse_attention(x, *operands, norm_scale=None, norm_bias=None, epsilon=1e-5, **named):
    """As `_sparse_attention`, with the norm in front and the residual around both if they are given."""
    if norm_scale is None:
        return _sparse_attention(x, *operands, **named)
    y, *rest = _sparse_attention(normalised(x, norm_scale, norm_bias, epsilon), *operands, **named)
    return x + y, *rest


def _sparse_attention(
    x, scores, threshold, w, scales, bqkv, bo, past_key, past_value, start, past, layer=0, kv="all", stored=None
):
    """Y, present_key, present_value, context and Read; slots that no new token took keep what past held.

    `stored`: keys and values to attend to in place of those computed here, as a narrow cache has rounded them.
    """
    B, S, E = x.shape
    H, _, D, _ = w.shape
    mask = unit_mask(x, scores, threshold, layer)
    records = real(w, scales)
    key, value = past_key.astype(np.float64), past_value.astype(np.float64)
    with np.errstate(invalid="ignore"):  # slots that nobody wrote may hold signalling NaN
        kept_key, kept_value = (array.astype(np.float64) for array in stored) if stored else (key, value)
    context = np.zeros((B, S, H, D))
    for b, h in np.ndindex(B, H):
        q, k, v = (x[b].astype(np.float64) @ records[h, part].T + bqkv[h, part] for part in range(3))
        for s in range(S):
            if kv == "all" or mask[b, s, h]:
                key[b, h, past[b] + s], value[b, h, past[b] + s] = k[s], v[s]
        for s in range(S):
            seen = slice(start[b], past[b] + s + 1)
            if mask[b, s, h] and seen.start < seen.stop:
                logits = kept_key[b, h, seen] @ q[s] / np.sqrt(D)
                share = np.exp(logits - logits.max())
                context[b, s, h] = share / share.sum() @ kept_value[b, h, seen]
    context = context.reshape(B, S, E)
    y = context @ records[:, 3].reshape(E, E) + bo

    rows, touched, parts = mask.reshape(-1, H), 0, 0
    for first in range(0, len(rows), TILE):
        needed = rows[first : first + TILE].any(0)
        touched += H if kv == "all" else needed.sum()
        parts += 4 * needed.sum() + (2 * (~needed).sum() if kv == "all" else 0)
    return y, key, value, context, Read(int(touched), int(parts) * D * row_bytes(w, scales))
