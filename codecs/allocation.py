"""Bits for principal components: what each way of coding a group costs and loses, and the best mix under a budget.

KVTC (arXiv 2511.01815) cuts the components, sorted by variance, into groups of neighbours and gives each group a
number of bits, so that the squared error is smallest for a number of bits per token. Dynamic programming over
(components so far, bits so far) finds the optimum, the groups' float16 zeros and steps counted in.
"""

import numba as nb
import numpy as np

SIZES, UNIT = (16, 64, 256, 1024), 16
OPTIONS = ((1, 0), (1, 16), *((size, bits) for size in SIZES for bits in range(1, 9)))
"""(components, bits of each): none at all, one component as float16, groups of integers."""
NOTHING, ALONE = 0, 1
COSTS = np.array([0, 1, *(size * bits // UNIT + 2 for size, bits in OPTIONS[2:])])
"""Units of 16 bits that a token of the group takes."""


def group_errors(y: np.ndarray) -> np.ndarray:
    """y [N, R] float32, components of N tokens -> [options, R] float32.

    Mean squared error per token of the group that begins at a component, infinite where it would pass the last one.
    """
    y = np.ascontiguousarray(y, np.float32)
    out = np.full((len(OPTIONS), y.shape[1]), np.inf, np.float32)
    out[NOTHING] = np.square(y, dtype=np.float64).mean(0)
    out[ALONE] = np.square(y - y.astype(np.float16), dtype=np.float64).mean(0)
    for i, size in enumerate(SIZES):
        starts = y.shape[1] - size + 1
        if starts > 0:
            out[2 + 8 * i : 10 + 8 * i, :starts] = _integer_errors(y, size)
    return out


def allocate(errors: np.ndarray, sizes: np.ndarray, costs: np.ndarray, budget: int) -> list[int]:
    """Numbers of the options, from the first component on, that lose least at a cost of at most `budget`.

    errors [K, R] as `group_errors` gives them; sizes [K] components and costs [K] of each option. Option 0 is one
    component at no cost; it is left out at the end.
    """
    choice = _solve(errors.astype(np.float64), sizes, costs, budget)
    out, at, left = [], errors.shape[1], budget
    while at:
        option = int(choice[at, left])
        out.append(option)
        at, left = at - int(sizes[option]), left - int(costs[option])
    out.reverse()
    while out and out[-1] == NOTHING:
        out.pop()
    return out


@nb.njit(nogil=True, cache=True)
def _solve(errors, sizes, costs, budget):
    """[R + 1, budget + 1] uint8: the last option of the best mix for the first components at a cost of at most that."""
    components = errors.shape[1]
    best = np.full((components + 1, budget + 1), np.inf)
    choice = np.zeros((components + 1, budget + 1), np.uint8)
    best[0] = 0.0
    for end in range(1, components + 1):
        for k in range(len(sizes)):
            start, cost = end - sizes[k], costs[k]
            if start < 0:
                continue
            for left in range(cost, budget + 1):
                error = best[start, left - cost] + errors[k, start]
                if error < best[end, left]:
                    best[end, left] = error
                    choice[end, left] = k
    return choice


@nb.njit(nogil=True, cache=True, fastmath=True)
def _integer_errors(y, size):
    """[8, starts]: what 1 to 8 bits lose between the extremes of each group of `size`, mean over tokens."""
    starts = y.shape[1] - size + 1
    out = np.zeros((8, starts))
    for row in y:
        for start in range(starts):
            part = row[start : start + size]
            low, high = part.min(), part.max()
            for bits in range(1, 9):
                step = (high - low) / np.float32((1 << bits) - 1)
                if step <= 0:
                    continue
                scale, lost = np.float32(1) / step, np.float32(0)
                for v in part:
                    q = (v - low) * scale
                    d = q - np.rint(q)
                    lost += d * d
                out[bits - 1, start] += lost * step * step
    return out / len(y)
