"""KVTC (arXiv 2511.01815): principal components across layers, bits by dynamic programming, DEFLATE.

The keys before RoPE of a run of layers are one vector per token, the values another. Each is projected on principal
components that were fitted offline; neighbouring components form groups of 1, 16, 64, 256 or 1024; a token's group has
a float16 zero and step and integers of 1 to 8 bits; other components have nothing (`codecs/allocation.py`). The first 4
and the last 128 tokens stay in 16 bits. Profile: "layers" [1], the length of a run, and for run i of keys "k<i>.mean"
[C] float32, "k<i>.basis" [R, C] float16 and "k<i>.errors" [options, R] float32; of values "v<i>" likewise.
"""

import zlib
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import pydantic
import torch

from lmcache_blend.codecs.allocation import ALONE, COSTS, NOTHING, OPTIONS, UNIT, allocate, group_errors
from lmcache_blend.codecs.base import codecs
from lmcache_blend.codecs.calibration import Calibration
from lmcache_blend.codecs.container import Shape, array, join, split
from lmcache_blend.codecs.entropy import SIZE, checked_size, inflate
from lmcache_blend.codecs.grouped import dequantise, pack, quantise, unpack
from lmcache_blend.codecs.pipeline import PipelineCodec
from lmcache_blend.codecs.profile import Profile
from lmcache_blend.codecs.quantise import finite
from lmcache_blend.codecs.recent import Recent
from lmcache_blend.codecs.stages import EMPTY, NotCodable, Plane, Stage
from lmcache_blend.codecs.transforms import Sinks, to_f16
from lmcache_blend.errors import ConfigError, CorruptChunkError

LARGEST_JOINT_DIM = 6144
BLOCK_TOKENS, SAMPLE_TOKENS = 4096, 128
GROUP_SIZES = np.array([size for size, _ in OPTIONS])


class Fitted:
    """A profile made ready: float32 bases, and the groups of each budget that was asked for."""

    def __init__(self, profile: Profile):
        if profile.codec != "kvtc":
            raise ConfigError(f"the profile was fitted for codec {profile.codec!r}, not 'kvtc'")
        tensors = profile.tensors
        try:
            self.profile, self.layers = profile, int(tensors["layers"][0])
            self.means = {n[:-5]: x for n, x in tensors.items() if n.endswith(".mean")}
            self.bases = {n: tensors[f"{n}.basis"].astype(np.float32) for n in self.means}
            self._errors = {n: tensors[f"{n}.errors"] for n in self.means}
        except KeyError as error:
            raise ConfigError(f"the profile has no tensor {error}; fit it again") from None
        self._groups: dict[tuple[str, float], list[int]] = {}

    def groups(self, name: str, bits: float) -> list[int]:
        """Options of the groups that run `name` takes at `bits` per element."""
        if (name, bits) not in self._groups:
            budget = int(bits * len(self.means[name]) / UNIT)
            self._groups[name, bits] = allocate(self._errors[name], GROUP_SIZES, COSTS, budget)
        return self._groups[name, bits]


class Components(Stage):
    """Projection, grouped integers and DEFLATE. The groups are in the stream: decoding needs the bases only."""

    bits: float

    def encode(self, x: np.ndarray, plane: Plane) -> tuple[np.ndarray, bytes]:
        fitted, name = plane.profile, self._name(plane)
        groups = fitted.groups(name, self.bits)
        rank = int(GROUP_SIZES[groups].sum())
        y = fitted.bases[name][:rank] @ (x - fitted.means[name][:, None])
        if not np.isfinite(y).all():
            raise NotCodable
        halves, integers, at = [], [], 0
        for option in groups:
            size, bits = OPTIONS[option]
            part, at = y[at : at + size], at + size
            if option == ALONE:
                halves.append(to_f16(part))
            elif option != NOTHING:
                zero, step, q = quantise(part.T, None, bits)
                halves += [zero, step]
                integers.append(pack(q, bits))
        # The two bytes of a float16 have nothing in common, the same byte of neighbouring tokens has.
        shuffled = np.frombuffer(b"".join(halves), np.uint8).reshape(-1, 2).T.tobytes()
        body = zlib.compress(b"".join((shuffled, *integers)))
        return EMPTY, join([SIZE.pack(rank, x.shape[1]), zlib.compress(bytes(groups), 9), body])

    def decode(self, y: np.ndarray, side: memoryview, plane: Plane) -> np.ndarray:
        fitted, name = plane.profile, self._name(plane)
        size, groups, body = split(side, 3)
        rank, tokens = checked_size(size, plane)
        options = np.frombuffer(inflate(groups, plane.channels), np.uint8)
        if (options >= len(OPTIONS)).any() or GROUP_SIZES[options].sum() != rank or rank > len(fitted.bases[name]):
            raise CorruptChunkError(f"{len(options)} groups of components do not make {rank}")
        halves = int(np.where(options == ALONE, 1, np.where(options == NOTHING, 0, 2)).sum())
        integers = [(n, b) for n, b in (OPTIONS[i] for i in options if i > ALONE)]
        sizes = [-(-tokens * n * b // 8) for n, b in integers]
        data = array(inflate(body, 2 * halves * tokens + sum(sizes)), "u1", (2 * halves * tokens + sum(sizes),))
        head = np.ascontiguousarray(data[: 2 * halves * tokens].reshape(2, -1).T).view("<f2").reshape(halves, tokens)
        numbers, at = finite(head.astype(np.float32)), 2 * halves * tokens
        out, row, half = np.zeros((rank, tokens), np.float32), 0, 0
        for option in options:
            n, bits = OPTIONS[option]
            if option == ALONE:
                out[row] = numbers[half]
                half += 1
            elif option != NOTHING:
                end = at + -(-tokens * n * bits // 8)
                q = unpack(data[at:end].data, bits, (tokens, n))
                out[row : row + n] = dequantise(q, numbers[half][:, None], numbers[half + 1][:, None], None).T
                at, half = end, half + 2
            row += n
        return fitted.bases[name][:rank].T @ out + fitted.means[name][:, None]

    def _name(self, plane: Plane) -> str:
        fitted = plane.profile
        name = f"{plane.slot}{plane.first // fitted.layers}"
        if plane.first % fitted.layers or len(fitted.means.get(name, ())) != plane.channels:
            raise CorruptChunkError(f"layers {plane.first} and on are no run of {fitted.layers} layers of the profile")
        return name


@codecs.register("kvtc")
class Kvtc(PipelineCodec):
    """Needs a profile: `lmcache-blend codec fit --codec kvtc`. Raises ConfigError without one."""

    profile: str | None = None
    """Path of the profile."""
    bits: float = pydantic.Field(default=2.0, gt=0, le=8)
    """Bits per element of K and of V before DEFLATE, zeros and steps included, kept tokens not."""
    sinks: int = pydantic.Field(default=4, ge=0)
    """First tokens kept in float16."""
    recent: int = pydantic.Field(default=128, ge=0)
    """Last tokens kept in float16."""

    def stages(self, plane: Plane) -> Sequence[Stage]:
        return (Sinks(tokens=self.sinks), Recent(tokens=self.recent), Components(bits=self.bits))

    def layers_per_segment(self, num_layers: int) -> int:
        return self._fitted().layers

    def profile_for(self, shapes: tuple[Shape, ...]) -> Fitted:
        fitted = self._fitted()
        fitted.profile.check_shapes(shapes)
        return fitted

    @property
    def profile_digest(self) -> str:
        return self._fitted().profile.digest

    def _fitted(self) -> Fitted:
        if self.profile is None:
            raise ConfigError(
                "codec kvtc needs a profile: make one with `lmcache-blend codec fit --codec kvtc` "
                "and set profile to its path"
            )
        return _ready(self.profile, Profile.load(self.profile).digest)


def fit(
    calibration: Calibration,
    *,
    layers: int | None = None,
    rank: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Profile:
    """Principal components of each run of layers, and what their groups lose at each number of bits.

    layers: length of a run; by default all, where that makes at most 6,144 dimensions, else the largest divisor of L
    that does. rank: components kept, by default half the calibration tokens. progress is called with (layers done,
    layers). Raises ConfigError.
    """
    target, tokens = calibration.target, sum(calibration.lengths)
    total = len(target.shapes)
    run = layers if layers is not None else _default_layers(target.shapes)
    if not 1 <= run <= total or tokens < 2 or (rank is not None and rank < 1):
        raise ConfigError(
            f"layers = {run} of {total}, rank = {rank}, {tokens} calibration tokens: layers must be 1 to {total}, "
            "rank at least 1, tokens at least 2"
        )
    tensors = {"layers": np.array([run], np.int64)}
    for first in range(0, total, run):
        members = range(first, min(first + run, total))
        pairs = [calibration.kv(layer) for layer in members]
        for slot, letter in enumerate("kv"):
            parts = [pair[slot] for pair in pairs]
            if not sum(part.shape[1] for part in parts):
                continue
            name = f"{letter}{first // run}"
            mean, basis = _principal(parts, rank or max(1, tokens // 2))
            tensors[f"{name}.mean"], tensors[f"{name}.basis"] = mean, basis
            sample = torch.linspace(0, tokens - 1, min(tokens, SAMPLE_TOKENS)).long()
            x = torch.cat([part[sample.to(part.device)].float() for part in parts], 1).cpu().numpy()
            tensors[f"{name}.errors"] = group_errors((x - mean) @ basis.astype(np.float32).T)
        if progress is not None:
            progress(members[-1] + 1, total)
    settings = {"layers": run, "rank": rank, "tokens": tokens}
    return Profile("kvtc", target.name, target.fingerprint, target.shapes, tensors, settings, calibration.texts)


def _principal(parts: Sequence[torch.Tensor], rank: int) -> tuple[np.ndarray, np.ndarray]:
    """[N, Ci] each -> mean [C] float32 and the first `rank` components [R, C] float16 of their concatenation."""
    mean = torch.cat([part.mean(0, dtype=torch.float64) for part in parts]).float()
    covariance = torch.zeros(len(mean), len(mean), device=mean.device)
    for at in range(0, len(parts[0]), BLOCK_TOKENS):
        x = torch.cat([part[at : at + BLOCK_TOKENS].float() for part in parts], 1) - mean
        covariance.addmm_(x.T, x)
    vectors = torch.linalg.eigh(covariance)[1].flip(1)[:, :rank]
    return mean.cpu().numpy(), vectors.T.contiguous().half().cpu().numpy()


def _default_layers(shapes: tuple[Shape, ...]) -> int:
    total = len(shapes)

    def fits(run: int) -> bool:
        runs = [shapes[i : i + run] for i in range(0, total, run)]
        sizes = [(sum(h * d for h, d, _, _ in r), sum(h * d for _, _, h, d in r)) for r in runs]
        return max(max(pair) for pair in sizes) <= LARGEST_JOINT_DIM

    return next((n for n in range(total, 0, -1) if total % n == 0 and fits(n)), 1)


@lru_cache(maxsize=2)
def _ready(path: str, digest: str) -> Fitted:
    return Fitted(Profile.load(path))
