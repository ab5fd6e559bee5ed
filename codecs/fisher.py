"""fisher_klt and fisher_diagonal: transforms of pre-RoPE keys and values fitted to what the model's output depends on.

Per group of layers, K and V are one vector per token. From it goes the mean, and what the token's own id foretells (a
linear map of a small learned table of token features: both sides know the ids). The rest is turned into the
eigenvectors of its covariance in the tempered Fisher metric, M^(1/2) S M^(1/2) with M = E[g g^T] of the loss with
labels drawn from the model, quantised by plain rounding with one step for the whole model, and coded with a bank of
static tables. Tokens that the output depends on more, by a linear map of their KV that is fitted to the gradients'
energy, get a finer step: a class per token is in the stream. Coefficients that round to zero everywhere are neither
coded nor computed.

The transform coding follows KVTC (arXiv 2511.01815); the Fisher metric, the token table and the classes are our own.
"""

import logging
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pydantic
import torch

from lmcache_blend.codecs import adaptive, rans
from lmcache_blend.codecs.base import codecs
from lmcache_blend.codecs.container import Container, Header, Shape, array, join, split
from lmcache_blend.codecs.entropy import Rans, inflate
from lmcache_blend.codecs.pipeline import (
    CODED,
    Allocate,
    CodedChunk,
    PipelineCodec,
    codec_id,
    fresh,
    layers_or_error,
    unstack,
)
from lmcache_blend.codecs.products import product
from lmcache_blend.codecs.profile import Profile
from lmcache_blend.codecs.quantise import Uniform
from lmcache_blend.codecs.stages import EMPTY, NotCodable, Plane, Stage
from lmcache_blend.codecs.tables import Tables
from lmcache_blend.codecs.transforms import Mean, Sinks
from lmcache_blend.errors import ConfigError, CorruptChunkError
from lmcache_blend.types import KVChunk, Pair

FEATURE_SCALE = np.float32(1 / 16)
"""Token features are int8 in units of this."""
ALARM_RATIO, ALARM_TOKENS = 1.3, 4096
DENSE = -160
"""Coefficients whose spread is this far from the step, in 1/64 octaves, are seldom 0 often enough to be left out of a
matrix product."""
RECENT = ((128, 1), (32, 1))
"""Of the most recent tokens, this many go down by so many classes; a class is half an octave of the step."""

log = logging.getLogger("lmcache_blend.codecs")


@dataclass(frozen=True)
class Group:
    """What is fitted for one group of layers; D its channels, R coefficients, F token features.

    mean [D]. forward [D, R] and inverse [R, D], or both [D] for fisher_diagonal. levels [R] int32, falling: the spread
    of the coefficients in 1/64 octaves of the profile's unit. predict [F, D]: the foretold vector. score [D + F + 1]:
    log importance as a linear map of vector, features and 1; score_range: its lowest and highest value.
    """

    mean: np.ndarray
    forward: np.ndarray
    inverse: np.ndarray
    levels: np.ndarray
    predict: np.ndarray
    score: np.ndarray
    score_range: np.ndarray


class Fitted:
    """A profile, read: groups of layers, the bank of tables, token features [V, F] int8."""

    def __init__(self, profile: Profile):
        t = profile.tensors
        self.profile, self.size = profile, int(t["layers"][0])
        self.features: np.ndarray = t["features"]
        count = -(-len(profile.shapes) // self.size)
        names = ("mean", "forward", "inverse", "levels", "predict", "score", "score_range")
        self.groups = [Group(*(_wide(t[f"{i}.{name}"]) for name in names)) for i in range(count)]
        self.tables = Tables(12, *(t[f"bank.{name}"] for name in ("width", "freq", "values", "reach", "cost")))
        self._used: dict[tuple[int, int], tuple[np.ndarray, Any]] = {}
        self.distinct = lru_cache(maxsize=16)(self._distinct)

    def used(self, number: int, step: int) -> tuple[np.ndarray, Any]:
        """Tables [R', CLASSES] of the coefficients of a group that some class codes at that step, and their index:
        those of a basis stand in front, since their levels fall."""
        if (number, step) not in self._used:
            if len(self._used) > 64 * len(self.groups):  # a chunk of another's may name any step
                self._used.clear()
            group = self.groups[number]
            ids = adaptive.table_ids(group.levels, step, len(self.tables))
            live = (ids > 0).any(1)
            used = np.flatnonzero(live) if group.forward.ndim == 1 else slice(0, int(live.sum()))
            self._used[number, step] = np.ascontiguousarray(ids[used]), used
        return self._used[number, step]

    def _distinct(self, ids: bytes) -> tuple[torch.Tensor, torch.Tensor]:
        """Of token ids (int64): features [U, F] of those that differ, and the place [T] of each among them.

        The same for every layer; and much of a text are repetitions, whose KV is foretold once.
        """
        distinct, places = np.unique(np.frombuffer(ids, np.int64), return_inverse=True)
        return self.features_of(distinct).T.contiguous(), torch.from_numpy(places)

    def features_of(self, ids: np.ndarray) -> torch.Tensor:
        """[F, T] float32 features of token ids [T]; ids beyond the table have none."""
        known = np.where((ids >= 0) & (ids < len(self.features)), ids, 0)
        found = self.features[known].astype(np.float32) * FEATURE_SCALE
        found[known != ids] = 0
        return torch.from_numpy(np.ascontiguousarray(found.T))


@dataclass(frozen=True)
class Symbols:
    """What the stream of a plane says. skip: tokens before the first. used: the coefficients that have symbols."""

    values: np.ndarray
    where: adaptive.Layout
    used: Any
    step: int
    skip: int


class Coded(Stage):
    """x [D, T] -> bytes, by the fitted group of the plane. skip: tokens in front that went to an earlier stage."""

    skip: int
    step: int = 0
    """Base step in 1/64 octaves of the profile's unit."""
    recent: bool = False

    def encode(self, x: np.ndarray, plane: Plane) -> tuple[np.ndarray, bytes]:
        fitted: Fitted = plane.profile
        group = _group(plane)
        features = fitted.features_of(plane.token_ids[self.skip :][: x.shape[1]])
        centred = torch.from_numpy(x - group.mean[:, None])
        classes = self._classes(group, centred, features)
        ids, used = fitted.used(_number(plane), self.step)
        if group.forward.ndim == 1:
            y = centred.numpy()[used] * group.forward[used, None]
        else:
            rest = centred - torch.from_numpy(group.predict).T @ features
            y = (torch.from_numpy(group.forward[:, used]).T @ rest).numpy()
        where = adaptive.layout(classes, ids)
        symbols = np.zeros(int(rans.row_starts(where.lengths)[-1]), np.int16)
        steps = adaptive.class_steps(self.step)
        if not adaptive.gather(y, where.order, where.bounds, where.offsets, steps, symbols) < 32767:
            raise NotCodable
        stream = rans.encode_rows(symbols, where.lengths, where.tables, fitted.tables)
        return EMPTY, join([np.int16(self.step).tobytes(), zlib.compress(classes.tobytes(), 9), stream])

    def decode(self, y: np.ndarray, side: memoryview, plane: Plane) -> np.ndarray:
        length = max(0, plane.tokens - self.skip)
        out = np.empty((length, plane.channels), np.float32)
        synthesise([(_symbols(side, plane, self.skip), plane)], out)
        return out.T

    def _classes(self, group: Group, centred: torch.Tensor, features: torch.Tensor) -> np.ndarray:
        """[T] uint8: more important tokens get a lower class, a finer step."""
        weights = torch.from_numpy(group.score)
        channels = len(group.mean)
        score = weights[:channels] @ centred + weights[channels:-1] @ features + weights[-1]
        low, high = (float(v) for v in group.score_range)
        finer = torch.round(score.clamp(low, high)).to(torch.int64)
        if self.recent:
            for tokens, classes in RECENT:
                finer[-tokens:] += classes
        return (adaptive.MIDDLE - finer).clamp(0, adaptive.CLASSES - 1).to(torch.uint8).numpy()


@dataclass(frozen=True)
class Rate:
    """What a codec object has coded so far. tokens; bits: per element, measured; expected: on the fitted text."""

    tokens: int
    bits: float
    expected: float

    @property
    def mismatch(self) -> bool:
        """Whether the text needs far more bits than the one of the fit: fit a profile on text like it."""
        return self.tokens >= ALARM_TOKENS and self.bits > ALARM_RATIO * self.expected


class FisherCodec(PipelineCodec):
    """What fisher_klt and fisher_diagonal share.

    With a profile, the step comes from `step` or from `budget`, by what was measured at the fit. Without one the codec
    is self-contained: sinks, mean and uniform steps with built-in tables, at a worse rate. An object of this class
    watches its rate (`rate`) and warns once where the text does not fit the profile.
    """

    profile: str | None = None
    """File of `lmcache-blend codec fit`; null codes without anything fitted."""
    step: float | None = pydantic.Field(default=None, gt=0)
    """Step of the quantiser, in the profile's unit; without a profile, relative to the root mean square of a plane."""
    budget: dict[str, float] | None = None
    """{"kl": nats} or {"bits": per element}: picks the step by the fit's measurements (default {"kl": 0.005})."""
    sinks: int = pydantic.Field(default=4, ge=0)
    """First tokens kept in float16."""
    recent: bool = False
    """Finer steps for the last 128 and 32 tokens of a chunk that ends a prompt."""

    _seen: dict[str, float] = pydantic.PrivateAttr(default_factory=lambda: {"tokens": 0, "bits": 0, "expected": 0})
    _lock: Any = pydantic.PrivateAttr(default_factory=threading.Lock)

    def model_post_init(self, context: Any) -> None:
        if self.budget is not None and (len(self.budget) != 1 or not {"kl", "bits"} & set(self.budget)):
            raise ConfigError(f'budget = {self.budget!r}: give {{"kl": nats}} or {{"bits": per element}}')
        if self.budget is not None and self.step is not None:
            raise ConfigError("give a step or a budget, not both")
        if self.profile is None and self.budget is not None:
            raise ConfigError("a budget needs a profile, which holds the measurements; make one with codec fit")
        if self.fitted is not None:
            self.base_step  # noqa: B018  # a budget out of reach is an error now, not at the first chunk

    def __eq__(self, other: object) -> bool:
        # By settings: what an object has seen so far is no part of what it is.
        return type(other) is type(self) and other.model_dump() == self.model_dump()

    def __hash__(self) -> int:
        return hash(str(self.model_dump()))

    @property
    def fitted(self) -> Fitted | None:
        if self.profile is None:
            return None
        profile = Profile.load(self.profile)
        wanted = codec_id(type(self))
        if profile.codec != wanted:
            raise ConfigError(f"profile {self.profile!r} was fitted for {profile.codec!r}, not for {wanted!r}")
        return _fitted(self.profile, profile.digest)

    def profile_for(self, shapes: tuple[Shape, ...]) -> Fitted | None:
        fitted = self.fitted
        if fitted is not None:
            fitted.profile.check_shapes(shapes)
        return fitted

    def layers_per_segment(self, num_layers: int) -> int:
        return self.fitted.size if self.fitted is not None else 1

    def slots(self) -> tuple[str, ...]:
        return ("k", "v") if self.profile is None else ("kv",)

    def stages(self, plane: Plane) -> Sequence[Stage]:
        sinks = Sinks(tokens=self.sinks)
        if plane.profile is None:
            return (sinks, Mean(), Uniform(step=self.step or 0.35), Rans())
        return (sinks, Coded(skip=min(self.sinks, plane.tokens), step=self.base_step, recent=self.recent))

    @staticmethod
    def decode_together(
        chunks: Sequence[CodedChunk], group: int, room: Allocate = fresh
    ) -> list[list[Pair] | CorruptChunkError]:
        out: list[list[Pair] | CorruptChunkError | None] = [None] * len(chunks)
        fused: list[tuple[int, np.ndarray, Symbols, Plane]] = []
        for i, chunk in enumerate(chunks):
            try:
                found = _coded(chunk, group)
            except CorruptChunkError as error:
                out[i] = error
                continue
            if found is not None and (not fused or _alike(chunk, chunks[fused[0][0]], group)):
                fused.append((i, *found))
        if fused:
            rows = _matrix(room, sum(plane.tokens for *_, plane in fused), fused[0][3].channels)
            synthesise([(symbols, plane) for *_, symbols, plane in fused], rows, sinks=True, room=room)
            at = 0
            for _, sinks, _, plane in fused:
                rows[at : at + sinks.shape[1]] = sinks.T
                at += plane.tokens
            for i, pairs in zip((i for i, *_ in fused), _apart(rows, fused, chunks[fused[0][0]].header), strict=True):
                out[i] = pairs
        return [layers_or_error(chunks[i], group) if pairs is None else pairs for i, pairs in enumerate(out)]

    @property
    def base_step(self) -> int:
        """The step in 1/64 octaves. Raises ConfigError where the budget was not reached at the fit."""
        if self.step is not None:
            step = self.step
        else:
            assert self.fitted is not None
            step = step_for(self.fitted.profile.settings.get("curve", []), self.budget or {"kl": 0.005})
        return int(np.clip(np.rint(np.log2(step) * adaptive.UNITS), -32768, 32767))

    def encode(self, chunk: KVChunk) -> bytes:
        data = super().encode(chunk)
        if self.fitted is not None and len(chunk) > self.sinks and "curve" in self.fitted.profile.settings:
            self._watch(chunk, data)
        return data

    @property
    def rate(self) -> Rate:
        """Bits per element of what this object coded, next to what the fit expects at this step."""
        with self._lock:
            n = max(self._seen["tokens"], 1)
            return Rate(int(self._seen["tokens"]), self._seen["bits"] / n, self._seen["expected"] / n)

    def _watch(self, chunk: KVChunk, data: bytes) -> None:
        assert self.fitted is not None
        curve = self.fitted.profile.settings["curve"]
        # Only the segments of layers: short chunks pay more for sinks and token ids on any text.
        sizes = Container(data).sizes[1:]
        elements = sum(k.numel() + v.numel() for k, v in chunk.layers)
        fixed = self.sinks * 16 * elements / len(chunk)
        before = self.rate.mismatch
        with self._lock:
            self._seen["tokens"] += len(chunk)
            self._seen["bits"] += (sum(sizes) * 8 - fixed) / elements * len(chunk)
            self._seen["expected"] += _at(curve, np.exp2(self.base_step / adaptive.UNITS), "bits") * len(chunk)
        rate = self.rate
        if rate.mismatch and not before:
            log.warning(
                "%s needs %.2f bits per element where its fit expects %.2f: the text is unlike that of the profile %s; "
                "fit one on text like yours (lmcache-blend codec fit --data)",
                codec_id(type(self)), rate.bits, rate.expected, self.profile,
            )  # fmt: skip


@codecs.register("fisher_klt")
class FisherKLT(FisherCodec):
    """Fisher-metric KLT over K and V of a group of layers, token table, adaptive steps, rANS: the smallest."""


@codecs.register("fisher_diagonal")
class FisherDiagonal(FisherCodec):
    """The same without matrices: a step per channel from the Fisher diagonal, adaptive steps, rANS; faster, larger."""


def step_for(curve: list[Mapping[str, float]], budget: Mapping[str, float]) -> float:
    """The step that meets a budget, by log-linear interpolation between the points measured at the fit.

    curve: {"step", "bits", "kl"} each. Raises ConfigError where the budget lies outside of what was measured.
    """
    if not curve:
        raise ConfigError("the profile holds no measurements, so that no budget can pick a step; give a step")
    (name, value), steps = next(iter(budget.items())), np.array([p["step"] for p in curve])
    seen = np.array([p[name] for p in curve])
    if not seen.min() <= value <= seen.max():
        raise ConfigError(
            f"budget {name} = {value:g} is outside of what the fit measured, {seen.min():.3g} to {seen.max():.3g}; "
            "choose one inside, or a step"
        )
    scale = np.log if name == "kl" else np.asarray
    order = np.argsort(seen, kind="stable")
    return float(np.exp(np.interp(scale(value), scale(seen[order]), np.log(steps[order]))))


def _at(curve: list[Mapping[str, float]], step: float, name: str) -> float:
    points = sorted(curve, key=lambda p: p["step"])
    return float(np.interp(np.log(step), [np.log(p["step"]) for p in points], [p[name] for p in points]))


def synthesise(
    chunks: Sequence[tuple[Symbols, Plane]], out: np.ndarray, sinks: bool = False, room: Allocate = fresh
) -> None:
    """The tokens of one group of layers, of several chunks one after another, into out [T, D] float32.

    Coefficients that are mostly 0 are added one by one, the others by one product for all chunks. sinks: out has rows
    for the tokens before each chunk's first symbol too, which are left to the caller. room: memory to work in.
    """
    plane = chunks[0][1]
    group, fitted = _group(plane), plane.profile
    steps = [adaptive.class_steps(s.step) for s, _ in chunks]
    starts, ids, at = [], [], 0
    for symbols, own in chunks:
        lead = symbols.skip if sinks else 0
        starts.append(at + lead)
        at += lead + len(symbols.where.order)
        ids.append(own.token_ids[symbols.skip - lead :])
    if group.inverse.ndim == 1:
        out[:] = group.mean
        for (symbols, _), step, first in zip(chunks, steps, starts, strict=True):
            where, used = symbols.where, symbols.used
            parts = np.empty((len(where.offsets), len(where.order)), np.float32)
            adaptive.scatter(symbols.values, where.order, where.bounds, where.offsets, step, parts, 0)
            out[first : first + len(where.order), used] += (parts * group.inverse[used, None]).T
        return
    dense = [int((group.levels[: len(s.where.offsets)] - s.step >= DENSE).sum()) for s, _ in chunks]
    parts = _matrix(room, max(dense), len(out))
    parts.fill(0)
    for (symbols, _), step, first, cut in zip(chunks, steps, starts, dense, strict=True):
        where = symbols.where
        adaptive.scatter(symbols.values, where.order, where.bounds, where.offsets[:cut], step, parts, first)
    features, places = fitted.distinct(np.concatenate(ids).tobytes())
    result, mean, predict, inverse = map(torch.from_numpy, (out, group.mean, group.predict, group.inverse))
    torch.index_select(product(features, predict).add_(mean), 0, places, out=result)
    result.add_(product(torch.from_numpy(parts).T, inverse[: len(parts)]))
    for (symbols, _), step, first, cut in zip(chunks, steps, starts, dense, strict=True):
        where, rest = symbols.where, group.inverse[cut:]
        adaptive.add(symbols.values, where.order, where.bounds, where.offsets[cut:], step, rest, out, first)


def _symbols(side: memoryview, plane: Plane, skip: int) -> Symbols:
    """Decode the symbols of a plane, whose first `skip` tokens have none. Raises CorruptChunkError."""
    fitted: Fitted = plane.profile
    length = max(0, plane.tokens - skip)
    if plane.channels != len(_group(plane).mean):
        raise CorruptChunkError(f"{plane.channels} channels in a group of {len(_group(plane).mean)}")
    head, packed, stream = split(side, 3)
    step = int(array(head, "<i2", ()))
    classes = array(inflate(packed, length), "u1", (length,))
    if length and classes.max() >= adaptive.CLASSES:
        raise CorruptChunkError(f"class {classes.max()} of {adaptive.CLASSES} does not exist")
    ids, used = fitted.used(_number(plane), step)
    where = adaptive.layout(classes, ids)
    return Symbols(rans.decode_rows(stream, where.lengths, where.tables, fitted.tables), where, used, step, skip)


def _coded(chunk: CodedChunk, group: int) -> tuple[np.ndarray, Symbols, Plane] | None:
    """Sinks [C, n] and symbols of a group; None where it is not coded with a profile. Raises CorruptChunkError."""
    (plane, *others) = chunk.planes[group]
    if others or plane.profile is None:
        return None
    (part,) = split(chunk.container.segment(1 + group), 1)
    if bytes(part[:1]) != CODED or not plane.channels * plane.tokens:
        return None
    head, side = split(part[1:], 2)
    assert isinstance(chunk.codec, FisherCodec)
    skip = min(chunk.codec.sinks, plane.tokens)
    return array(head, "<f2", (plane.channels, skip)), _symbols(side, plane, skip), plane


def _apart(
    rows: np.ndarray, fused: Sequence[tuple[int, np.ndarray, Symbols, Plane]], header: Header
) -> list[list[Pair]]:
    """Rows of tokens of several chunks, one after another, as the layers of each."""
    plane, sizes = fused[0][3], [plane.tokens for *_, plane in fused]
    found = unstack(torch.from_numpy(rows), plane, header)
    parts = {place: x.split(sizes, 1) for place, x in found.items()}
    layers = range(plane.first, plane.first + len(plane.shapes))
    return [[(parts[n, 0][c], parts[n, 1][c]) for n in layers] for c in range(len(fused))]


def _matrix(room: Allocate, rows: int, columns: int) -> np.ndarray:
    """[rows, columns] float32 of undefined content."""
    return room(4 * rows * columns).view(np.float32).reshape(rows, columns)


def _alike(chunk: CodedChunk, other: CodedChunk, group: int) -> bool:
    """Whether a group of both has the same layers, types and profile."""
    a, b = chunk.planes[group][0], other.planes[group][0]
    same = a.first == b.first and a.shapes == b.shapes and a.profile is b.profile
    return same and chunk.header.dtypes == other.header.dtypes


def _group(plane: Plane) -> Group:
    return plane.profile.groups[_number(plane)]


def _number(plane: Plane) -> int:
    return plane.first // plane.profile.size


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32) if x.dtype == np.float16 else x


@lru_cache(maxsize=8)
def _fitted(path: str, digest: str) -> Fitted:
    return Fitted(Profile.load(path))
