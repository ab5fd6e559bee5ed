"""Content matching: find stored segments in a prompt at any offset, and cut new text where the text itself says.

A rolling (polynomial) hash of every window of WINDOW tokens is looked up in an index of the first windows of stored
segments; a match is verified by the segment's full key (SHA-256 over model, tenant and all its tokens), so that a
collision costs time, never a wrong answer. Text that no segment covers is cut where the hash of its last few tokens has
its low bits zero: the same passage is cut at the same places wherever it stands (content-defined chunking, LBFS 2001).
"""

import struct
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

WINDOW = 24
"""Tokens that find a segment; shorter segments are not found."""
CUT_WINDOW, CUT_BITS, CUT_MAX = 8, 7, 512
BASE = np.uint64(0x9E3779B97F4A7C15 | 1)
RECORD = struct.Struct("<QI")

Span = tuple[int, int]


def rolling(tokens: np.ndarray, window: int) -> np.ndarray:
    """Hashes [T - window + 1] uint64 of all windows of token ids [T]; empty where the text is shorter.

    >>> a, b = rolling(np.arange(40), 24), rolling(np.arange(5, 40), 24)
    >>> bool((a[5:] == b).all()), len(a)
    (True, 17)
    """
    ids = _mixed(tokens)
    n = len(ids) - window + 1
    if n <= 0:
        return np.empty(0, np.uint64)
    out = np.zeros(n, np.uint64)
    with np.errstate(over="ignore"):
        for i in range(window):
            out = out * BASE + ids[i : i + n]
    return out ^ (out >> np.uint64(29))


def cuts(tokens: np.ndarray, start: int, end: int, least: int) -> list[Span]:
    """Segments of tokens[start:end], each `least` to CUT_MAX tokens, that end where the text itself says so.

    What follows the last cut is no segment: it ends where this prompt ends, not where the text does.
    """
    hashes = rolling(tokens[start:end], CUT_WINDOW)
    ends = np.flatnonzero(hashes & np.uint64((1 << CUT_BITS) - 1) == 0) + CUT_WINDOW + start
    out, at = [], start
    for cut in ends.tolist():
        while cut - at > CUT_MAX:
            out.append((at, at + CUT_MAX))
            at += CUT_MAX
        if cut - at >= least:
            out.append((at, cut))
            at = cut
    return out


class SegmentIndex:
    """First windows of stored segments -> their lengths. Kept in a file that several processes append to.

    It only proposes: entries of segments that were evicted, or that belong to another tenant or model, fail the check
    of the full key.
    """

    def __init__(self, path: Path | None = None):
        self.path = path
        self._lengths: defaultdict[int, list[int]] = defaultdict(list)
        self._known = np.empty(0, np.uint64)
        self._stale = True
        self._read = 0
        self.refresh()

    def __len__(self) -> int:
        return sum(map(len, self._lengths.values()))

    def refresh(self) -> None:
        """Take in what other processes added."""
        if self.path is None or not self.path.exists() or self.path.stat().st_size <= self._read:
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        whole = len(data) - len(data) % RECORD.size
        self._read += whole
        for value, length in RECORD.iter_unpack(data[:whole]):
            self._add(value, length)

    def add(self, tokens: np.ndarray) -> None:
        """Remember a segment [T]."""
        if len(tokens) < WINDOW:
            return
        value = int(rolling(tokens[:WINDOW], WINDOW)[0])
        if not self._add(value, len(tokens)) or self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(RECORD.pack(value, len(tokens)))

    def _add(self, value: int, length: int) -> bool:
        lengths = self._lengths[value]
        if length in lengths:
            return False
        lengths.append(length)
        lengths.sort(reverse=True)
        self._stale = True
        return True

    def candidates(self, tokens: np.ndarray, start: int) -> Iterator[tuple[int, list[int]]]:
        """(offset, lengths of segments that may begin there, longest first), ascending from `start`."""
        if self._stale:
            self._known, self._stale = np.fromiter(self._lengths, np.uint64, len(self._lengths)), False
        hashes = rolling(tokens[start:], WINDOW)
        for i in np.flatnonzero(np.isin(hashes, self._known)).tolist():
            yield i + start, self._lengths[int(hashes[i])]

    def match(self, tokens: np.ndarray, start: int, stored: Callable[[Span], bool]) -> list[Span]:
        """Stored segments in tokens[start:], from the left, the longest at each offset, none overlapping.

        stored: whether a span's full key is in the store.
        """
        self.refresh()
        out, free = [], start
        for at, lengths in self.candidates(tokens, start):
            if at < free:
                continue
            for length in lengths:
                if at + length <= len(tokens) and stored((at, at + length)):
                    out.append((at, at + length))
                    free = at + length
                    break
        return out


def with_gaps(tokens: np.ndarray, start: int, matched: list[Span], least: int) -> list[Span]:
    """The matched spans and, in the gaps between them, new segments to store; ascending."""
    out, at = [], start
    for span in [*matched, (len(tokens), len(tokens))]:
        out += cuts(tokens, at, span[0], least)
        if span[1] > span[0]:
            out.append(span)
        at = span[1]
    return out


def _mixed(tokens: np.ndarray) -> np.ndarray:
    """Token ids spread over 64 bits, so that neighbouring ids do not give neighbouring hashes."""
    with np.errstate(over="ignore"):
        x = (np.asarray(tokens).astype(np.uint64) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    return x ^ (x >> np.uint64(31))
