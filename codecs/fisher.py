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
from lmcache_blend.codecs.container import Container, Shape, array, join, split
from lmcache_blend.codecs.entropy import Rans, inflate
from lmcache_blend.codecs.pipeline import PipelineCodec, codec_id
from lmcache_blend.codecs.profile import Profile
from lmcache_blend.codecs.quantise import Uniform
from lmcache_blend.codecs.stages import EMPTY, NotCodable, Plane, Stage
from lmcache_blend.codecs.tables import Tables
from lmcache_blend.codecs.transforms import Mean, Sinks
from lmcache_blend.errors import ConfigError, CorruptChunkError
from lmcache_blend.types import KVChunk

FEATURE_SCALE = np.float32(1 / 16)
"""Token features are int8 in units of this."""
ALARM_RATIO, ALARM_TOKENS = 1.3, 4096
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


class Coded(Stage):
    """x [D, T] -> bytes, by the fitted group of the plane. skip: tokens in front that went to an earlier stage."""

    skip: int
    step: int = 0
    """Base step in 1/64 octaves of the profile's unit."""
    recent: bool = False

    def encode(self, x: np.ndarray, plane: Plane) -> tuple[np.ndarray, bytes]:
        fitted: Fitted = plane.profile
        group = _group(plane)
        features = self._features(plane, x.shape[1])
        centred = torch.from_numpy(x - group.mean[:, None])
        classes = self._classes(group, centred, features)
        ids = adaptive.table_ids(group.levels, self.step, len(fitted.tables))
        used = _used(ids, group)
        if group.forward.ndim == 1:
            y = centred.numpy()[used] * group.forward[used, None]
        else:
            rest = centred - torch.from_numpy(group.predict).T @ features
            y = (torch.from_numpy(group.forward[:, used]).T @ rest).numpy()
        where = adaptive.layout(classes, ids[used])
        symbols = np.zeros(int(rans.row_starts(where.lengths)[-1]), np.int16)
        steps = adaptive.class_steps(self.step)
        if not adaptive.gather(y, where.order, where.bounds, where.offsets, steps, symbols) < 32767:
            raise NotCodable
        stream = rans.encode_rows(symbols, where.lengths, where.tables, fitted.tables)
        return EMPTY, join([np.int16(self.step).tobytes(), zlib.compress(classes.tobytes(), 9), stream])

    def decode(self, y: np.ndarray, side: memoryview, plane: Plane) -> np.ndarray:
        fitted: Fitted = plane.profile
        group, length = _group(plane), max(0, plane.tokens - self.skip)
        head, packed, stream = split(side, 3)
        step = int(array(head, "<i2", ()))
        classes = array(inflate(packed, length), "u1", (length,))
        if length and classes.max() >= adaptive.CLASSES:
            raise CorruptChunkError(f"class {classes.max()} of {adaptive.CLASSES} does not exist")
        ids = adaptive.table_ids(group.levels, step, len(fitted.tables))
        used = _used(ids, group)
        where = adaptive.layout(classes, ids[used])
        symbols = rans.decode_rows(stream, where.lengths, where.tables, fitted.tables)
        parts = np.empty((len(where.offsets), length), np.float32)
        steps = adaptive.class_steps(step)
        adaptive.scatter(symbols, where.order, where.bounds, where.offsets, steps, parts)
        if group.inverse.ndim == 1:
            out = np.repeat(group.mean[:, None], length, 1)
            out[used] += parts * group.inverse[used, None]
            return out
        foretold = torch.addmm(
            torch.from_numpy(group.mean), self._features(plane, length).T, torch.from_numpy(group.predict)
        )
        return foretold.addmm_(torch.from_numpy(parts).T, torch.from_numpy(group.inverse[: len(parts)])).numpy().T

    def _features(self, plane: Plane, length: int) -> torch.Tensor:
        """[F, T] float32 features of the tokens behind the first `skip`; ids beyond the table have none."""
        table: np.ndarray = plane.profile.features
        ids = plane.token_ids[self.skip :][:length]
        known = np.where((ids >= 0) & (ids < len(table)), ids, 0)
        found = table[known].astype(np.float32) * FEATURE_SCALE
        found[known != ids] = 0
        return torch.from_numpy(np.ascontiguousarray(found.T))

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


def _used(ids: np.ndarray, group: Group) -> Any:
    """Index of the coefficients that some class codes; those of a basis stand in front, since their levels fall."""
    live = (ids > 0).any(1)
    return np.flatnonzero(live) if group.forward.ndim == 1 else slice(0, int(live.sum()))


def _group(plane: Plane) -> Group:
    return plane.profile.groups[plane.first // plane.profile.size]


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32) if x.dtype == np.float16 else x


@lru_cache(maxsize=8)
def _fitted(path: str, digest: str) -> Fitted:
    return Fitted(Profile.load(path))
