"""Frequency tables for rANS: a bank of shared ones, or one exact table per row.

A table holds at most 255 symbols, each a tuple of `width` neighbouring values, and the escape. Integer frequencies
sum to 2^bits. A bank is a handful of tables, ordered from peaked to flat; a row of symbols is coded with the one that
makes it shortest, and a byte names it.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch

from lmcache_blend.errors import LMCacheBlendError
from lmcache_blend.triton_kernels import tables as ops
from lmcache_blend.triton_kernels.rans import DecodeTables, EncodeTables
from lmcache_blend.triton_kernels.rans.reference import ESCAPE, MISSING, MISSING_BYTE
from lmcache_blend.triton_kernels.tables import normalise

MAP_SIZE, REACH = 1024, 127
BANK_SIZE, RATIO = 96, 1.1120069120453122
"""Means of the built-in tables rise by this from one to the next."""
BANK_DIGEST = "e484f611fd77d9c3a8ec6261260e0e308561463a4bf63682647baad89e396a94"


@dataclass(frozen=True)
class Tables:
    """n tables. bits: of the frequencies. width: [n] uint8, values a symbol stands for: 1, 2 or 4.

    freq: [n, 256] uint16. values: [n, 256, 4] int16, what a symbol stands for. reach: [n] int16, largest |value| of a
    table. cost: [n, 255] float32, bits of a single value from -127 to 127, by which encoders choose.
    """

    bits: int
    width: np.ndarray
    freq: np.ndarray
    values: np.ndarray
    reach: np.ndarray
    cost: np.ndarray

    def __len__(self) -> int:
        return len(self.width)

    @cached_property
    def cum(self) -> np.ndarray:
        """[n, 256] uint16: sum of the frequencies before each symbol."""
        return (np.cumsum(self.freq, 1, dtype=np.int64) - self.freq).astype(np.uint16)

    @cached_property
    def lut(self) -> np.ndarray:
        """[n, 2^bits] uint32 by slot: frequency - 1 (12 bits), slot - cum (12), symbol (8)."""
        return ops.slots(torch.from_numpy(self.freq), self.bits).numpy()

    @cached_property
    def kind(self) -> np.ndarray:
        """[n] uint8: the width, but 0 for tables of single values that an int8 does not hold."""
        single = self.values[:, :, 0]
        wide = ((self.freq > 0) & (np.abs(single.astype(np.int32)) > REACH) & (single != MISSING)).any(1)
        return np.where((self.width == 1) & wide, 0, self.width).astype(np.uint8)

    @cached_property
    def direct(self) -> np.ndarray:
        """`lut` with the value itself, an int8, in place of the symbol in the tables of kind 1."""
        low = np.arange(256, dtype=np.uint32)[None].repeat(len(self), 0)
        single = self.kind == 1
        first = self.values[single, :, 0]
        low[single] = np.where(first == MISSING, MISSING_BYTE, first).astype(np.int8).view(np.uint8)
        return (self.lut & np.uint32(0xFFFFFF00)) | np.take_along_axis(low, (self.lut & 255).astype(np.int64), 1)

    @cached_property
    def map(self) -> np.ndarray:
        """[n, MAP_SIZE] uint8: a tuple, read as a number to the base 2 * reach + 1, to its symbol or ESCAPE."""
        out = np.full((len(self), MAP_SIZE), ESCAPE, np.uint8)
        for i, freq in enumerate(self.freq):
            used = np.flatnonzero(freq[:ESCAPE])
            out[i, _code(self.values[i, used], int(self.width[i]), int(self.reach[i]))] = used
        return out

    @cached_property
    def for_encode(self) -> EncodeTables:
        """What the operator `rans.encode` takes."""
        parts = (self.width, self.reach, self.map, self.freq, self.cum)
        return EncodeTables(self.bits, *(torch.from_numpy(np.ascontiguousarray(x)) for x in parts))

    @cached_property
    def for_decode(self) -> DecodeTables:
        """What the operator `rans.decode` takes."""
        parts = (self.kind, self.direct, self.values)
        return DecodeTables(self.bits, *(torch.from_numpy(np.ascontiguousarray(x)) for x in parts))

    def choose(self, q: np.ndarray) -> np.ndarray:
        """[R, T] int16 -> [R] uint8: the table that codes each row shortest."""
        counts = histogram(q, REACH)
        return np.argmin(counts @ self.cost.T, 1).astype(np.uint8)


def histogram(q: np.ndarray, reach: int) -> np.ndarray:
    """[R, T] int16 -> [R, 2 reach + 1] float32 counts of -reach..reach, larger values counted at the ends."""
    return ops.histogram(torch.from_numpy(q), reach).numpy()


def bank(pmfs: Iterable[np.ndarray]) -> Tables:
    """A bank from probability functions [2 m + 1] of the values -m..m, m <= 127.

    The width is the one that codes shortest. Ties (.5 % and .002 bits) go to the wider table, which decodes faster.
    """
    made = []
    for pmf in pmfs:
        options = [_table(pmf, width) for width in (4, 2, 1)]
        best = min(rate for rate, *_ in options)
        made.append(next(rest for rate, *rest in options if rate <= best * 1.005 + 0.002))
    columns = [np.stack(column) for column in zip(*made, strict=True)]
    return Tables(12, *columns)


@lru_cache
def laplace_bank(size: int = BANK_SIZE) -> Tables:
    """The built-in bank: discretised Laplace distributions with mean magnitudes from 1/400 to 60, in equal ratios."""
    means = np.cumprod(np.append(1 / 400, np.full(size - 1, RATIO)))
    made = bank(_laplace(m) for m in means)
    digest = hashlib.sha256()
    for part, kind in ((made.freq, "<u2"), (made.width, "u1"), (made.values, "<i2")):
        digest.update(part.astype(kind).tobytes())
    if size == BANK_SIZE and digest.hexdigest() != BANK_DIGEST:
        raise LMCacheBlendError("the built-in tables come out otherwise on this machine: chunks would be misread")
    return made


class PlainTables(Tables):
    """Tables of single consecutive values: the map is made without a loop per table."""

    @cached_property
    def map(self) -> np.ndarray:
        out = np.full((len(self), MAP_SIZE), ESCAPE, np.uint8)
        first = self.values[0, 0, 0] + self.reach[0] if len(self) else 0
        out[:, first : first + ESCAPE] = np.where(self.freq[:, :ESCAPE] > 0, np.arange(ESCAPE), ESCAPE)
        return out


def tables_from(freq: np.ndarray, first: int, bits: int, escape: np.ndarray | None = None) -> Tables:
    """Tables at width 1 from frequencies [n, A], A <= 255, of the values first, first + 1, ..., as they are.

    escape: [n], frequency of the escape, None for none. Raises ValueError unless each table sums to 2^bits.
    """
    n, size = freq.shape
    full = np.zeros((n, 256), np.uint16)
    full[:, :size] = freq
    full[:, ESCAPE] = 0 if escape is None else escape
    if (full.sum(1, dtype=np.int64) != 1 << bits).any():
        raise ValueError(f"a table's frequencies do not sum to {1 << bits}")
    values = np.zeros((n, 256, 4), np.int16)
    values[:, :size, 0] = np.arange(first, first + size)
    values[:, ESCAPE] = MISSING
    reach = np.full(n, max(-first, first + size - 1), np.int16)
    return PlainTables(bits, np.ones(n, np.uint8), full, values, reach, np.zeros((n, 2 * REACH + 1), np.float32))


def exact(counts: np.ndarray, bits: int) -> Tables:
    """One table per row of counts [n, A], A <= 255, of the values 0..A-1, at width 1; every counted value is coded."""
    return tables_from(ops.frequencies(torch.from_numpy(counts.astype(np.float64)), bits).numpy(), 0, bits)


def byte_frequencies(freq: np.ndarray) -> np.ndarray:
    """Frequencies that sum to 256 -> uint8, as `rans.decode_exact` takes them: 256, that of a row's only value, is 255.

    No other row sums to 255.
    """
    return (freq - (freq == 256)).astype(np.uint8)


def _table(pmf: np.ndarray, width: int) -> tuple[float, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(bits per value, width, freq, values, reach, cost) of one table over tuples of independent values."""
    pmf = np.asarray(pmf, np.float64) / np.sum(pmf)
    middle = len(pmf) // 2
    reach = min({1: REACH, 2: 15, 4: 2}[width], middle)
    inner, joint = pmf[middle - reach : middle + reach + 1], np.ones(1)
    for _ in range(width):
        joint = np.outer(joint, inner).ravel()
    # A rare tuple is cheaper as an escape than in a frequency of 1 / 4096 that it does not fill.
    order = np.argsort(-joint, kind="stable")[:ESCAPE]
    order = order[joint[order] > 2.0**-14]
    rest = max(1.0 - float(joint[order].sum()), 2.0**-20)
    freq = np.zeros(256, np.uint16)
    weights = np.append(joint[order], rest)
    freq[np.append(np.arange(len(order)), ESCAPE)] = normalise(weights, 12)
    rate = float(weights @ (12 - np.log2(freq[np.append(np.arange(len(order)), ESCAPE)]))) + rest * 16 * width
    values = np.zeros((256, 4), np.int16)
    for place in range(width):
        values[: len(order), place] = order // (2 * reach + 1) ** (width - 1 - place) % (2 * reach + 1) - reach
    values[ESCAPE] = MISSING
    cost = np.full(2 * REACH + 1, 28.0, np.float32)
    low = REACH - middle
    cost[low : low + len(pmf)] = np.minimum(28.0, -np.log2(np.maximum(pmf, 2.0**-40)))
    return rate / width, np.uint8(width), freq, values, np.int16(reach), cost  # type: ignore[return-value]


def _code(values: np.ndarray, width: int, reach: int) -> np.ndarray:
    code = np.zeros(len(values), np.int64)
    for place in range(width):
        code = code * (2 * reach + 1) + values[:, place] + reach
    return code


def _laplace(mean: float) -> np.ndarray:
    """Probabilities of -127..127 for a rounded Laplace variable whose rounded magnitude has the given mean.

    With s = exp(-1 / 2b) the mean is s / (1 - s^2) and P(k) = s^(2|k| - 1) (1 - s^2) / 2: no exp, so that every machine
    has the same bits.
    """
    s = ((1 + 4 * mean * mean) ** 0.5 - 1) / (2 * mean)
    tail = np.cumprod(np.append(s, np.full(REACH - 1, s * s))) * ((1 - s * s) / 2)
    return np.concatenate((tail[::-1], [1 - s], tail))
