"""Adaptive steps: coefficients [R, T] with a step per token, coded with a bank of tables that follows the step.

Tokens fall into classes; class k has the step 2^((k - middle)/2) times the base step. A coefficient of known spread
is coded in each class with the table of the ratio of its spread to the class's step, so nothing about tables is in
the stream. What is coded with one table is put into one row, class by class, coefficient by coefficient; where the
spread is so far below the step that everything rounds to 0, nothing is coded at all.
"""

from dataclasses import dataclass
from functools import lru_cache

import numba as nb
import numpy as np

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
    return Layout(*_layout(np.array(classes), ids.astype(np.uint8)))


@nb.njit(nogil=True, cache=True)
def _layout(classes, ids):
    """Sorts by counting, thrice faster than numpy's calls: tokens by class, blocks by table, class and coefficient."""
    kinds = ids.shape[1]
    counts, bounds = np.zeros(kinds, np.int64), np.zeros(kinds + 1, np.int64)
    for k in classes:
        counts[k] += 1
    for c in range(kinds):
        bounds[c + 1] = bounds[c] + counts[c]
    order, at = np.empty(len(classes), np.int64), bounds.copy()
    for t in range(len(classes)):
        order[at[classes[t]]] = t
        at[classes[t]] += 1
    totals = np.zeros(256, np.int64)
    for r in range(len(ids)):
        for c in range(kinds):
            totals[ids[r, c]] += counts[c]
    rows = 0
    for table in range(1, 256):
        rows += totals[table] > 0
    tables, lengths = np.empty(rows, np.uint8), np.empty(rows, np.int64)
    starts, row, first = np.zeros(256, np.int64), 0, 0
    for table in range(1, 256):
        if totals[table]:
            tables[row], lengths[row], starts[table] = table, totals[table], first
            first += (totals[table] + 3) // 4 * 4  # as `rans.row_starts`
            row += 1
    offsets = np.full(ids.shape, -1, np.int64)
    for c in range(kinds):
        if counts[c]:
            for r in range(len(ids)):
                if ids[r, c]:
                    offsets[r, c] = starts[ids[r, c]]
                    starts[ids[r, c]] += counts[c]
    return order, bounds, offsets, tables, lengths


@lru_cache(maxsize=64)
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
def scatter(symbols, order, bounds, offsets, steps, out, first):
    """Symbols -> coefficients [R, T] in columns first..first + T of the first R rows of out."""
    for r in range(len(offsets)):
        row = out[r, first : first + len(order)]
        for c in range(len(steps)):
            at, step = offsets[r, c], steps[c]
            begin, end = bounds[c], bounds[c + 1]
            if at < 0:
                for j in range(begin, end):
                    row[order[j]] = np.float32(0)
            else:
                for j in range(begin, end):
                    row[order[j]] = symbols[at + j - begin] * step


@nb.njit(nogil=True, cache=True)
def add(symbols, order, bounds, offsets, steps, basis, out, first):
    """Adds symbols times rows of basis [R, D] to rows first..first + T of out, skipping symbols that are 0."""
    for r in range(len(offsets)):
        vector = basis[r]
        for c in range(len(steps)):
            at, step = offsets[r, c], steps[c]
            if at < 0:
                continue
            begin, end = bounds[c], bounds[c + 1]
            for j in range(begin, end):
                symbol = symbols[at + j - begin]
                if symbol != 0:
                    row, factor = out[first + order[j]], np.float32(symbol) * step
                    for d in range(len(vector)):
                        row[d] += factor * vector[d]
