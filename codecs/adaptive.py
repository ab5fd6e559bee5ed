"""Adaptive steps: coefficients [R, T] with a step per token, coded with a bank of tables that follows the step.

Tokens fall into classes; class k has the step 2^((k - middle)/2) times the base step. A coefficient of known spread
is coded in each class with the table of the ratio of its spread to the class's step, so nothing about tables is in
the stream. What is coded with one table is put into one row, class by class, coefficient by coefficient; where the
spread is so far below the step that everything rounds to 0, nothing is coded at all.
"""

from dataclasses import dataclass

import numba as nb
import numpy as np

from lmcache_blend.codecs.rans import row_starts

CLASSES, MIDDLE = 9, 4
TABLES_PER_OCTAVE, LOWEST = 8, -4.5
"""Table i of a bank is for a spread of 2^(LOWEST + i / 8) steps; 96 of them reach from 1/23 to 166 steps."""
UNITS = 64
"""Levels and steps are integers, in 1/64 octaves, so that every machine picks the same tables."""


@dataclass(frozen=True)
class Layout:
    """Where the symbols of one plane stand. order: [T] tokens sorted by class. bounds: [CLASSES + 1] into it.

    offsets: [R, CLASSES] start of each block in the flat symbols, -1 where nothing is coded. tables: [n] the table of
    every row, lengths: [n] its symbols.
    """

    order: np.ndarray
    bounds: np.ndarray
    offsets: np.ndarray
    tables: np.ndarray
    lengths: np.ndarray


def table_ids(levels: np.ndarray, step: int, tables: int) -> np.ndarray:
    """[R] levels (spread, 1/64 octaves) at a base step -> [R, CLASSES] table numbers; 0 codes nothing."""
    classes = (np.arange(CLASSES) - MIDDLE) * (UNITS // 2)
    ratio = levels.astype(np.int64)[:, None] - step - classes[None]
    lowest, per_table = int(LOWEST * UNITS), UNITS // TABLES_PER_OCTAVE
    return np.clip((ratio - lowest + per_table // 2) // per_table, 0, tables - 1)


def layout(classes: np.ndarray, ids: np.ndarray) -> Layout:
    """classes: [T] uint8. ids: [R, CLASSES] from `table_ids`."""
    order = np.argsort(classes, kind="stable")
    counts = np.bincount(classes, minlength=CLASSES)
    bounds = np.concatenate(([0], np.cumsum(counts)))
    flat = ids.T.ravel().astype(np.uint8)  # class by class, coefficient by coefficient
    sizes = np.repeat(counts, len(ids))
    live = np.flatnonzero((flat > 0) & (sizes > 0))
    live = live[np.argsort(flat[live], kind="stable")]
    tables, first = np.unique(flat[live], return_index=True)
    lengths = np.add.reduceat(sizes[live], first) if len(live) else np.zeros(0, np.int64)
    before = np.cumsum(sizes[live]) - sizes[live]
    shift = row_starts(lengths)[:-1] - before[first] if len(live) else np.zeros(0, np.int64)
    offsets = np.full(flat.shape, -1, np.int64)
    offsets[live] = before + np.repeat(shift, np.diff(np.append(first, len(live))))
    return Layout(order, bounds, np.ascontiguousarray(offsets.reshape(CLASSES, len(ids)).T), tables, lengths)


def class_steps(step: int) -> np.ndarray:
    """[CLASSES] float32 steps of a base step in 1/64 octaves."""
    return np.exp2((step + (np.arange(CLASSES) - MIDDLE) * (UNITS // 2)) / UNITS).astype(np.float32)


@nb.njit(nogil=True, cache=True)
def gather(y, order, bounds, offsets, steps, out):
    """Coefficients y [R, T] float32 -> rounded symbols in `out`; returns the largest magnitude."""
    largest = np.float32(0)
    for r in range(len(y)):
        for c in range(len(steps)):
            at, inverse = offsets[r, c], np.float32(1) / steps[c]
            if at < 0:
                continue
            for j in range(bounds[c], bounds[c + 1]):
                v = np.rint(y[r, order[j]] * inverse)
                largest = max(largest, abs(v))
                out[at] = np.int16(v) if abs(v) <= 32767 else np.int16(0)
                at += 1
    return largest


@nb.njit(nogil=True, cache=True)
def scatter(symbols, order, bounds, offsets, steps, out):
    """Symbols -> coefficients in out [R, T] float32."""
    for r in range(len(offsets)):
        for c in range(len(steps)):
            at, step = offsets[r, c], steps[c]
            first, last = bounds[c], bounds[c + 1]
            if at < 0:
                for j in range(first, last):
                    out[r, order[j]] = np.float32(0)
            else:
                for j in range(first, last):
                    out[r, order[j]] = symbols[at + j - first] * step
