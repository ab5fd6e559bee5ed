"""Tables on CPU."""

import numba as nb
import numpy as np


def histogram(q: np.ndarray, reach: int) -> np.ndarray:
    """[R, T] -> [R, 2 reach + 1] float32 counts of -reach..reach, larger values counted at the ends."""
    rows, span = len(q), 2 * reach + 1
    index = np.clip(q, -reach, reach).astype(np.int64) + reach + span * np.arange(rows)[:, None]
    return np.bincount(index.ravel(), minlength=rows * span).reshape(rows, span).astype(np.float32)


@nb.njit(nogil=True, cache=True)
def slots(freq, bits):
    """By slot: frequency - 1 (12 bits), slot - cum (12), symbol (8)."""
    out = np.empty((len(freq), 1 << bits), np.uint32)
    for i in range(len(freq)):
        at = 0
        for s in range(freq.shape[1]):
            f = np.int64(freq[i, s])
            for k in range(f):
                out[i, at] = ((f - 1) << 20) | (k << 8) | s
                at += 1
    return out
