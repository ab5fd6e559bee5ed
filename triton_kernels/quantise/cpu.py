"""Quantisation on CPU of float32 rows, in groups of neighbours: numba for what numpy needs six passes for."""

import numba as nb
import numpy as np


def quantise(x: np.ndarray, group: int, bits: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [R, N] -> (codes [R, N] uint8, step [R, G] float16, zero [R, G] float16, empty where symmetric)."""
    top = 2 * ((1 << bits - 1) - 1) if symmetric else (1 << bits) - 1
    firsts = np.arange(0, x.shape[1], group)
    # Beyond float16 a step is infinite, as `ops.quantise` says.
    with np.errstate(over="ignore"):
        if symmetric:
            step = (np.maximum.reduceat(np.abs(x), firsts, 1) * np.float32(2 / top)).astype(np.float16)
            zero, zeros = np.empty(0, np.float16), -step.astype(np.float32) * (top // 2)
        else:
            low = np.minimum.reduceat(x, firsts, 1)
            zero = low.astype(np.float16)
            step = ((np.maximum.reduceat(x, firsts, 1) - low) / np.float32(top)).astype(np.float16)
            zeros = zero.astype(np.float32)
    q = np.empty(x.shape, np.uint8)
    _codes(x, zeros, step.astype(np.float32), group, np.float32(top), q)
    return q, step, zero


def dequantise(q: np.ndarray, zero: np.ndarray, step: np.ndarray, group: int) -> np.ndarray:
    """q [R, N] uint8, zero and step [R, G] float32 -> [R, N] float32."""
    out = np.empty(q.shape, np.float32)
    _values(q, zero, step, group, out)
    return out


@nb.njit(nogil=True, cache=True)
def _codes(x, zeros, steps, group, top, q):
    for r in range(x.shape[0]):
        for g in range(steps.shape[1]):
            z, s = zeros[r, g], steps[r, g]
            if not s > 0:
                s = np.float32(np.inf)
            row, out = x[r, g * group : (g + 1) * group], q[r, g * group : (g + 1) * group]
            for i in range(len(row)):
                out[i] = np.uint8(np.int32(min(max(np.rint((row[i] - z) / s), np.float32(0)), top)))


@nb.njit(nogil=True, cache=True)
def _values(q, zeros, steps, group, out):
    for r in range(q.shape[0]):
        for g in range(steps.shape[1]):
            z, s = zeros[r, g], steps[r, g]
            row, target = q[r, g * group : (g + 1) * group], out[r, g * group : (g + 1) * group]
            for i in range(len(row)):
                target[i] = np.float32(row[i]) * s + z
