"""PipelineCodec: what every codec made of stages shares, and `pipeline`, which takes its stages from its JSON
config."""

import json
from abc import abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal, Self

import numpy as np
import pydantic
import torch

from lmcache_blend.codecs.base import codecs
from lmcache_blend.codecs.container import DTYPES, Container, Header, Shape, join, pack, split
from lmcache_blend.codecs.profile import Profile
from lmcache_blend.codecs.stages import NotCodable, Plane, Stage, stages
from lmcache_blend.codecs.threads import one_thread
from lmcache_blend.config import Config
from lmcache_blend.errors import ConfigError, CorruptChunkError, ForeignChunkError, LMCacheBlendError, UnknownNameError
from lmcache_blend.types import KVChunk, Pair

NAMES = {dtype: name for name, dtype in DTYPES.items()}
CODED, PLAIN = b"\0", b"\1"
Allocate = Callable[[int], np.ndarray]
"""[n] uint8 of undefined content."""


def fresh(nbytes: int) -> np.ndarray:
    """Memory that was not used before."""
    return np.empty(nbytes, np.uint8)


class PipelineCodec(Config):
    """Codes a chunk plane by plane: each group of layers is one segment, each plane of it goes through a list of
    stages.

    A plane that holds NaN, infinities or numbers outside a codec's range is kept as it is, bit for bit; so is one
    without elements. Segments are coded in parallel on torch's number of threads.
    """

    keys: ClassVar[Literal["pre_rope", "post_rope"]] = "pre_rope"
    """What the codec's source compresses; `codec bench` measures it that way."""

    @abstractmethod
    def stages(self, plane: Plane) -> Sequence[Stage]:
        """The stages of one plane, in encoding order; the last one gives bytes."""

    def layers_per_segment(self, num_layers: int) -> int:
        """How many layers one segment holds."""
        return 1

    def slots(self) -> tuple[str, ...]:
        """Planes of a segment: K and V apart, or both as one."""
        return ("k", "v")

    def profile_for(self, shapes: tuple[Shape, ...]) -> Any:
        """What was fitted to the model, None without; raises ConfigError where it does not fit the shapes."""
        return None

    @property
    def profile_digest(self) -> str | None:
        return None if self._path is None else Profile.load(self._path).digest

    def check_model(self, fingerprint: str, name: str) -> None:
        """Raises ConfigError where the codec's profile belongs to another model."""
        if self._path is not None:
            Profile.load(self._path).check_model(fingerprint, name)

    @property
    def _path(self) -> str | None:
        """Of the profile; most codecs have none."""
        return getattr(self, "profile", None)

    def get_config(self) -> dict[str, Any]:
        return {"id": codec_id(type(self)), **self.model_dump(mode="json")}

    def encode(self, chunk: KVChunk) -> bytes:
        """Raises ConfigError where the chunk's shapes or types are none that this codec takes."""
        shapes = chunk.shapes
        for i, pair in enumerate(chunk.layers):
            for x in pair:
                if x.dtype not in NAMES:
                    raise ConfigError(f"layer {i} is {x.dtype}; codecs take {', '.join(DTYPES)}")
        size = max(1, self.layers_per_segment(len(shapes)))
        groups = tuple(min(size, len(shapes) - i) for i in range(0, len(shapes), size))
        config = {k: v for k, v in self.get_config().items() if k != "profile"}
        dtypes = tuple((NAMES[k.dtype], NAMES[v.dtype]) for k, v in chunk.layers)
        header = Header(config, len(chunk), shapes, dtypes, groups, chunk.exact_after, self.profile_digest)
        planes = self._planes(header, chunk.tokens.cpu().numpy())
        layers = chunk.layers

        def segment(group: list[Plane]) -> bytes:
            return join([self._encode_plane(plane, layers) for plane in group])

        return pack(header, chunk.tokens, _parallel(segment, planes))

    def decode(self, data: bytes) -> KVChunk:
        coded = self.open(data)
        groups = range(len(coded.header.groups))
        layers = [pair for part in _parallel(coded.layers, list(groups)) for pair in part]
        return KVChunk(coded.tokens, tuple(layers), coded.header.exact_after)

    def decode_layers(self, data: bytes, group: int) -> list[Pair]:
        """The layers of one segment alone: (k [H, T, Dk], v [H, T, Dv]) each. Raises CorruptChunkError."""
        return self.open(data).layers(group)

    def open(self, data: bytes | memoryview) -> "CodedChunk":
        """A coded chunk with its head read, whose segments need no second look at it. Raises CorruptChunkError."""
        container = Container(data)
        tokens = container.tokens()
        codec = self._of(container.header)
        try:
            planes = codec._planes(container.header, tokens.numpy())
        except (ConfigError, UnknownNameError) as error:
            raise _not_ours(error) from None
        return CodedChunk(codec, container, tokens, planes)

    @staticmethod
    def decode_together(
        chunks: "Sequence[CodedChunk]", group: int, room: Allocate = fresh
    ) -> "list[list[Pair] | CorruptChunkError]":
        """The layers of one segment of each chunk, as `CodedChunk.layers` gives them, or why there are none.

        The chunks were opened by codecs of this class. room: gives memory for the layers. Subclasses share work among
        chunks, and use that memory, here.
        """
        return [layers_or_error(chunk, group) for chunk in chunks]

    def _decode_group(self, segment: memoryview, planes: list[Plane], header: Header) -> list[Pair]:
        found: dict[tuple[int, int], torch.Tensor] = {}
        for part, plane in zip(split(segment, len(planes)), planes, strict=True):
            self._decode_plane(part, plane, header, found)
        first = planes[0].first
        return [(found[i, 0], found[i, 1]) for i in range(first, first + len(planes[0].shapes))]

    def _of(self, header: Header) -> Self:
        """This codec with the settings that the chunk was coded with; its profile is never taken from the chunk."""
        if header.codec["id"] != codec_id(type(self)):
            raise CorruptChunkError(f"the chunk is coded with {header.codec['id']!r}, not {codec_id(type(self))!r}")
        mine = {"profile": self._path} if "profile" in type(self).model_fields else {}
        try:
            codec = _configured(type(self), json.dumps({**header.codec, **mine}))
            digest = codec.profile_digest
        except LMCacheBlendError as error:
            raise ForeignChunkError(f"the chunk's codec config is none of ours: {error}") from None
        if digest != header.profile:
            raise ForeignChunkError(
                f"the chunk was coded with profile {str(header.profile)[:12]}, this codec has {str(digest)[:12]}"
            )
        return codec

    def _planes(self, header: Header, ids: np.ndarray) -> list[list[Plane]]:
        profile, out, first = self.profile_for(header.shapes), [], 0
        for size in header.groups:
            shapes = header.shapes[first : first + size]
            out.append(
                [Plane(slot, first, shapes, len(header.shapes), header.tokens, ids, profile) for slot in self.slots()]
            )
            first += size
        return out

    def _encode_plane(self, plane: Plane, layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> bytes:
        parts = [layers[i][slot] for i, slot in members(plane)]
        if plane.channels * plane.tokens:
            try:
                x, sides = stack(parts), []
                if not np.isfinite(x).all():
                    raise NotCodable
                for stage in self.stages(plane):
                    x, side = stage.encode(x, plane)
                    sides.append(side)
                return CODED + join(sides)
            except NotCodable:
                pass
        return PLAIN + b"".join(_raw_bytes(p) for p in parts)

    def _decode_plane(
        self, data: memoryview, plane: Plane, header: Header, found: dict[tuple[int, int], torch.Tensor]
    ) -> None:
        kind, body = bytes(data[:1]), data[1:]
        if kind == PLAIN:
            for i, slot in members(plane):
                h, d = header.shapes[i][2 * slot : 2 * slot + 2]
                dtype = DTYPES[header.dtypes[i][slot]]
                size = h * d * header.tokens * dtype.itemsize
                if size > len(body):
                    raise CorruptChunkError(f"a plain plane of layer {i} is shorter than its {size} bytes")
                raw = torch.frombuffer(bytearray(body[:size]), dtype=dtype) if size else torch.empty(0, dtype=dtype)
                found[i, slot] = raw.reshape(h, header.tokens, d)
                body = body[size:]
            if len(body):
                raise CorruptChunkError(f"{len(body)} bytes are left behind a plain plane")
            return
        if kind != CODED or not plane.channels * plane.tokens:
            raise CorruptChunkError(f"a plane of {plane.channels * plane.tokens} elements starts with {kind!r}")
        steps = self.stages(plane)
        x: np.ndarray = np.zeros((0, 0), np.int16)
        for stage, side in zip(reversed(steps), reversed(split(body, len(steps))), strict=True):
            x = stage.decode(x, side, plane)
        if x.shape != (plane.channels, plane.tokens):
            raise CorruptChunkError(f"a plane of {list(x.shape)} is not {plane.channels} x {plane.tokens}")
        found.update(unstack(torch.from_numpy(np.ascontiguousarray(x.T, np.float32)), plane, header))


@dataclass(frozen=True)
class CodedChunk:
    """A coded chunk whose head was read. codec: with the chunk's own settings. planes: of every group of layers."""

    codec: PipelineCodec
    container: Container
    tokens: torch.Tensor
    planes: list[list[Plane]]

    @property
    def header(self) -> Header:
        return self.container.header

    def layers(self, group: int) -> list[Pair]:
        """The layers of one group: (k [H, T, Dk], v [H, T, Dv]) each. Raises CorruptChunkError."""
        if not 0 <= group < len(self.planes):
            raise ConfigError(f"group {group} of {len(self.planes)} does not exist")
        try:
            return self.codec._decode_group(self.container.segment(1 + group), self.planes[group], self.header)
        except (ConfigError, UnknownNameError) as error:
            raise _not_ours(error) from None


def layers_or_error(chunk: CodedChunk, group: int) -> list[Pair] | CorruptChunkError:
    """`CodedChunk.layers`, or what it raised."""
    try:
        return chunk.layers(group)
    except CorruptChunkError as error:
        return error


def _not_ours(error: Exception) -> CorruptChunkError:
    return CorruptChunkError(f"the chunk's header asks for what this codec is not: {error}")


@codecs.register("pipeline")
class Pipeline(PipelineCodec):
    """Any stages, from JSON: {"id": "pipeline", "k": [{"id": "mean"}, ...], "v": [...]}; without v, as k."""

    k: tuple[dict[str, Any], ...] = pydantic.Field(max_length=16)
    """Stages of the keys, in encoding order."""
    v: tuple[dict[str, Any], ...] | None = pydantic.Field(default=None, max_length=16)
    """Stages of the values; null takes those of the keys."""

    def stages(self, plane: Plane) -> Sequence[Stage]:
        chosen = self.v if plane.slot == "v" and self.v is not None else self.k
        return tuple(make_stage(item) for item in chosen)


def make_stage(config: dict[str, Any]) -> Stage:
    """A stage from its JSON config. Raises UnknownNameError, ConfigError."""
    if not isinstance(config.get("id"), str):
        raise ConfigError(f'stage {config!r} has no "id"; known ids: {", ".join(stages)}')
    return stages.get(config["id"])(**{k: v for k, v in config.items() if k != "id"})


def codec_id(cls: type) -> str:
    """The name that a codec class is registered under."""
    return next(name for name in codecs if codecs.get(name) is cls)


def members(plane: Plane) -> list[tuple[int, int]]:
    """(layer, slot) of the tensors in a plane, in the order of its rows."""
    slots = {"k": (0,), "v": (1,), "kv": (0, 1)}[plane.slot]
    return [(plane.first + i, slot) for i in range(len(plane.shapes)) for slot in slots]


def stack(parts: Sequence[torch.Tensor]) -> np.ndarray:
    """[H, T, D] tensors -> one float32 matrix [C, T]."""
    flat = [p.detach().to("cpu", torch.float32).transpose(1, 2).flatten(0, 1) for p in parts]
    return (torch.cat(flat) if len(flat) > 1 else flat[0]).contiguous().numpy()


def unstack(x: torch.Tensor, plane: Plane, header: Header) -> dict[tuple[int, int], torch.Tensor]:
    """Rows of tokens [T, C] float32 -> [H, T, D] by (layer, slot): views of x where the chunk is float32."""
    found, at = {}, 0
    for i, slot in members(plane):
        h, d = header.shapes[i][2 * slot : 2 * slot + 2]
        part = x[:, at : at + h * d].unflatten(1, (h, d)).transpose(0, 1)
        found[i, slot] = part.to(DTYPES[header.dtypes[i][slot]])
        at += h * d
    return found


def _raw_bytes(x: torch.Tensor) -> bytes:
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@lru_cache(maxsize=64)
def _configured(cls: type[Any], config: str) -> Any:
    return cls(**{k: v for k, v in json.loads(config).items() if k != "id"})


def _parallel(work: Any, items: list[Any]) -> list[Any]:
    threads = min(torch.get_num_threads(), len(items))
    if threads <= 1:
        return [work(item) for item in items]
    # Each worker keeps to one thread inside torch, or the two levels of threads fight over the cores.
    with ThreadPoolExecutor(threads, initializer=one_thread) as pool:
        return list(pool.map(work, items))
