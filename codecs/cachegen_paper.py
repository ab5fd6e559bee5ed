"""CacheGen as its paper describes it (Liu et al., arXiv 2310.07240, section 5): anchors, deltas, tables fitted offline.

Tokens come in groups of ten. The first of each, its anchor, is kept at 8 bits, scaled by its largest magnitude; the
others are differences to their group's decoded anchor, in steps of their channel's deviation: 0.5, 1.0 and 1.5 of it in
the first, middle and last third of the layers. Anchors and deltas each have a table per layer and channel, profiled
offline. Without a profile the deviations travel with the chunk, and tables that are shared or of the chunk serve.

Profile tensors, S in "kv", i the layer: "S.i.deviation" [C] float32; "S.i.anchor" and, per level n, "S.i.delta.n":
[C, 2 m + 2] uint16, frequencies of -m..m and of the escape, which sum to 4096.
"""

import struct
from collections.abc import Callable
from typing import Literal

import numba as nb
import numpy as np
import pydantic

from lmcache_blend.codecs import rans
from lmcache_blend.codecs.cachegen_lmcache import TILE, absmax, from_scales, to_scales
from lmcache_blend.codecs.calibration import Calibration
from lmcache_blend.codecs.container import join, split
from lmcache_blend.codecs.entropy import Rans
from lmcache_blend.codecs.profile import Profile
from lmcache_blend.codecs.quantise import LARGEST, to_symbols
from lmcache_blend.codecs.smallest import RansSmallest
from lmcache_blend.codecs.stages import EMPTY, NotCodable, Plane, Stage, register_stage
from lmcache_blend.codecs.tables import REACH, Tables, histogram, normalise, tables_from
from lmcache_blend.errors import ConfigError, CorruptChunkError

Level = Literal[1, 2, 3]
THIRDS = (0.5, 1.0, 1.5)
LEVELS: dict[Level, float] = {1: 2.0, 2: 1.0, 3: 0.5}
GROUP, LARGEST_GROUP, ANCHOR_MAX = 10, 4096, 127
BITS = 12
PRIOR_TOKENS = 32.0
"""How many tokens the Laplace prior of a fitted table counts for."""
RAREST = 2.0**-13
"""A value less likely than this gets no symbol: escapes cost less than the frequency of 1 in 4096 it needs."""
SMALLEST_STEP, LARGEST_VALUE = np.float32(2.0**-100), 2.0**100
LENGTH = struct.Struct("<I")


@register_stage("anchor_delta")
class AnchorDelta(Stage):
    """Anchors and deltas of one layer's K or V to bytes, by the plane's profile where it has one."""

    level: Level = 2
    """Steps are the paper's at 2, twice as wide at 1, half as wide at 3."""
    group: int = pydantic.Field(default=GROUP, ge=2, le=LARGEST_GROUP)
    """Tokens of a group, its anchor included."""
    step: float = pydantic.Field(default=1.0, ge=1e-3, le=1e3)
    """Multiplies every step."""

    def encode(self, x: np.ndarray, plane: Plane) -> tuple[np.ndarray, bytes]:
        anchors, scale, deltas = parts(x, self.group)
        if plane.profile is None:
            spread = to_scales(_bfloat16(_deviation(deltas)))
            deviation = from_scales(memoryview(spread), len(x))
            streams = [spread, RansSmallest().encode(anchors + np.int16(ANCHOR_MAX), plane)[1]]
            streams.append(Rans().encode(self._symbols(deltas, deviation, plane), plane)[1])
        else:
            deviation, anchor_tables, delta_tables = self._fitted(plane)
            rows, symbols = np.arange(len(x)), self._symbols(deltas, deviation, plane)
            streams = [rans.encode(anchors, rows, anchor_tables), rans.encode(symbols, rows, delta_tables)]
        return EMPTY, join([LENGTH.pack(x.shape[1]), to_scales(scale), *streams])

    def decode(self, y: np.ndarray, side: memoryview, plane: Plane) -> np.ndarray:
        length, scales, *streams = split(side, 5 if plane.profile is None else 4)
        tokens = LENGTH.unpack(length)[0] if len(length) == LENGTH.size else -1
        if not 0 <= tokens <= plane.tokens:
            raise CorruptChunkError(f"{tokens} coded tokens in a chunk of {plane.tokens}")
        groups, rows = -(-tokens // self.group), plane.channels
        scale = from_scales(scales, groups)
        if plane.profile is None:
            deviation = from_scales(streams[0], rows)
            anchors = RansSmallest().decode(EMPTY, streams[1], plane) - np.int16(ANCHOR_MAX)
            deltas = Rans().decode(EMPTY, streams[2], plane)
        else:
            deviation, anchor_tables, delta_tables = self._fitted(plane)
            anchors = rans.decode(streams[0], np.arange(rows), groups, anchor_tables)
            deltas = rans.decode(streams[1], np.arange(rows), tokens - groups, delta_tables)
        if anchors.shape != (rows, groups) or deltas.shape != (rows, tokens - groups):
            raise CorruptChunkError(f"anchors {anchors.shape} and deltas {deltas.shape} are not of {tokens} tokens")
        anchors, deltas = np.ascontiguousarray(anchors), np.ascontiguousarray(deltas)
        return _restore(anchors, scale / np.float32(ANCHOR_MAX), deltas, self.steps(deviation, plane), self.group).T

    def steps(self, deviation: np.ndarray, plane: Plane) -> np.ndarray:
        """Width of a step per channel [C] float32: the layer third's, the level's and `step` times the deviation."""
        third = THIRDS[3 * plane.first // plane.num_layers]
        factor = np.float32(third * LEVELS[self.level] * self.step)
        with np.errstate(over="ignore"):
            return np.maximum(deviation * factor, SMALLEST_STEP)

    def _symbols(self, deltas: np.ndarray, deviation: np.ndarray, plane: Plane) -> np.ndarray:
        return to_symbols(deltas / self.steps(deviation, plane)[:, None])

    def _fitted(self, plane: Plane) -> tuple[np.ndarray, Tables, Tables]:
        """Deviation [C], tables of the anchors and of the deltas. Raises ConfigError on a profile that lacks them."""
        name, tensors = f"{plane.slot}.{plane.first}", plane.profile.tensors
        try:
            deviation = tensors[f"{name}.deviation"]
            tables = [_tables(tensors[f"{name}.{what}"]) for what in ("anchor", f"delta.{self.level}")]
            if {deviation.shape, *((len(t),) for t in tables)} != {(plane.channels,)}:
                raise ValueError(f"they are not of {plane.channels} channels")
        except (KeyError, ValueError) as error:
            raise ConfigError(f"the profile's tables of {name} are damaged ({error}); fit it again") from None
        return deviation, tables[0], tables[1]


def parts(x: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[C, T] -> anchors [C, G] int16, their scales [G] float32, deltas [C, T - G] float32. Raises NotCodable."""
    if absmax(x).max(initial=0) > LARGEST_VALUE:
        raise NotCodable
    scale = absmax(x[:, ::group])
    with np.errstate(divide="ignore", over="ignore"):
        factor = np.float32(ANCHOR_MAX) / scale
    anchors = np.rint(x[:, ::group] * np.where(np.isfinite(factor), factor, np.float32(0)))
    base = np.repeat(anchors * (scale / np.float32(ANCHOR_MAX)), group, 1)[:, : x.shape[1]]
    return anchors.astype(np.int16), scale, (x - base)[:, np.arange(x.shape[1]) % group != 0]


def fit(
    calibration: Calibration,
    *,
    group: int = GROUP,
    step: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> Profile:
    """Deviations and tables of every layer and channel, for all levels at this group and step.

    The keys are taken as the calibration hands them out: to compress keys after RoPE, calibrate on such keys. progress
    is called with (layers done, layers). Raises ConfigError.
    """
    stage = AnchorDelta(group=group, step=step)
    target, tensors = calibration.target, {}
    layers = len(target.shapes)
    for i, shape in enumerate(target.shapes):
        for slot, kv in zip("kv", calibration.kv(i), strict=True):
            if not kv.shape[1]:
                continue
            ends = np.cumsum(calibration.lengths)[:-1]
            found = [parts(x, group) for x in np.split(kv.cpu().numpy().T, ends, 1)]
            deltas = np.concatenate([d for _, _, d in found], 1)
            deviation = _deviation(deltas)
            plane = Plane(slot, i, (shape,), layers, deltas.shape[1], np.zeros(0, np.int64))
            tensors[f"{slot}.{i}.deviation"] = deviation
            tensors[f"{slot}.{i}.anchor"] = _frequencies(np.concatenate([a for a, _, _ in found], 1))
            for level in LEVELS:
                steps = stage.replace(level=level).steps(deviation, plane)
                symbols = np.clip(np.rint(deltas / steps[:, None]), -LARGEST, LARGEST).astype(np.int16)
                tensors[f"{slot}.{i}.delta.{level}"] = _frequencies(symbols)
        if progress is not None:
            progress(i + 1, layers)
    settings = {"group": group, "step": step, "tokens": int(sum(calibration.lengths))}
    return Profile("cachegen", target.name, target.fingerprint, target.shapes, tensors, settings, calibration.texts)


def _frequencies(q: np.ndarray) -> np.ndarray:
    """Symbols [C, N] -> [C, 2 m + 2] uint16: of the values -m..m and of the escape, smoothed with a Laplace prior."""
    values = np.arange(-REACH, REACH + 1)
    inside = np.abs(q) <= REACH
    counts = histogram(q, REACH).astype(np.float64)
    counts[:, 0] -= (q < -REACH).sum(1)
    counts[:, -1] -= (q > REACH).sum(1)
    mean = (counts @ values / np.maximum(counts.sum(1), 1))[:, None]
    spread = (counts * np.abs(values - mean)).sum(1, keepdims=True) / np.maximum(counts.sum(1, keepdims=True), 1)
    prior = np.exp(-np.abs(values - mean) / np.maximum(spread, 0.1))
    p = counts + PRIOR_TOKENS * prior / prior.sum(1, keepdims=True)
    p /= p.sum(1, keepdims=True) + (~inside).sum(1, keepdims=True)
    p[p < RAREST] = 0
    escape = np.maximum(1 - p.sum(1, keepdims=True), RAREST)
    reach = int(np.abs(values[(p > 0).any(0)]).max(initial=0))
    kept = np.hstack((p[:, REACH - reach : REACH + reach + 1], escape))
    return np.stack([normalise(row, BITS) for row in kept])


def _tables(freq: np.ndarray) -> Tables:
    if not (freq[:, -1] > 0).all():
        raise ValueError("a table without an escape")
    return tables_from(freq[:, :-1], 1 - freq.shape[1] // 2, BITS, freq[:, -1])


def _deviation(deltas: np.ndarray) -> np.ndarray:
    """[C, N] -> [C] float32, root mean square; 0 without deltas."""
    square = np.square(deltas, dtype=np.float64).mean(1) if deltas.shape[1] else np.zeros(len(deltas))
    return np.sqrt(square).astype(np.float32)


def _bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 with the lower half of the bits cleared: two bytes are enough, and the range stays."""
    return (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


@nb.njit(nogil=True, cache=True)
def _restore(anchors, scale, deltas, steps, group):
    """Anchors [C, G] and deltas [C, T - G] to values [T, C], by tiles as in `cachegen_lmcache._dequantise`."""
    channels, tokens = len(anchors), anchors.shape[1] + deltas.shape[1]
    out, tile = np.empty((tokens, channels), np.float32), np.empty((TILE, TILE), np.float32)
    for t0 in range(0, tokens, TILE):
        n = min(TILE, tokens - t0)
        for c0 in range(0, channels, TILE):
            m = min(TILE, channels - c0)
            for c in range(c0, c0 + m):
                g = t0 // group
                at = t0 - g * group
                for t in range(n):
                    base = anchors[c, g] * scale[g]
                    tile[c - c0, t] = base + deltas[c, t0 + t - g - 1] * steps[c] if at else base
                    at += 1
                    if at == group:
                        at, g = 0, g + 1
            for t in range(n):
                for c in range(m):
                    out[t0 + t, c0 + c] = tile[c, t]
    return out
