"""The format of what a tier stores of a chunk: a checked head, the token ids, and K and V, raw or coded.

    magic "LMCBVAL1" | key 32 | bytes of all u64 | bytes of the meta u32 | segments u32 | table | meta (JSON) | XXH3-128
    of all before | token ids | K and V

The table has a row per segment, offset u64, bytes u64, XXH3-128: token ids (uint32), then each group of layers, then,
for coded chunks, the container's own head. Raw, a group is one layer, K [H, T, Dk] before V [H, T, Dv], each group
at a multiple of 64 bytes; coded, the container lies in one piece and its groups are the
segments. So groups can be read, checked and decoded one by one. Little endian; nothing is executed or unpickled; all
sizes are checked against each other and against the size of the whole before anything is allocated. The key inside
makes a value that got under another's name a miss. The checksum tells damage, not malice: who can write to a tier can
write valid values to it. Values in this process's own memory go without checksums ("checked": false).
"""

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, overload

import numpy as np
import torch
import xxhash
from torch import Tensor

from lmcache_blend.codecs import Codec, PipelineCodec
from lmcache_blend.codecs.container import DTYPES, MAX_LAYERS, Shape, parse_header, runs
from lmcache_blend.errors import ConfigError, CorruptChunkError
from lmcache_blend.types import KVChunk, Pair

MAGIC = b"LMCBVAL1"
PREFIX = struct.Struct("<8s32sQII")
ROW = struct.Struct("<QQ16s")
DIGEST, ALIGN, MAX_META = 16, 64, 1 << 20
Names = tuple[str, str]
"""Of the types of K and V."""


@dataclass(frozen=True)
class Meta:
    """tokens: T. shapes, dtypes: per layer. groups: layers per group. codec: its config, None for raw."""

    tokens: int
    shapes: tuple[Shape, ...]
    dtypes: tuple[Names, ...]
    groups: tuple[int, ...]
    codec: dict[str, Any] | None
    exact_after: bytes | None
    checked: bool

    def layer_bytes(self, layer: int) -> tuple[int, int]:
        """Of K and of V, raw."""
        (h, d, h2, d2), (k, v) = self.shapes[layer], self.dtypes[layer]
        return h * d * self.tokens * DTYPES[k].itemsize, h2 * d2 * self.tokens * DTYPES[v].itemsize

    @cached_property
    def raw_bytes(self) -> list[int]:
        """Of each layer."""
        return [sum(self.layer_bytes(i)) for i in range(len(self.shapes))]

    @cached_property
    def alike(self) -> bool:
        """Whether all layers, and K and V, have one shape and type, and are not empty."""
        if not self.shapes or len({*self.shapes}) > 1 or len({*self.dtypes}) > 1:
            return False
        (h, d, h2, d2), (k, v) = self.shapes[0], self.dtypes[0]
        return (h, d, k) == (h2, d2, v) and h * self.tokens * d > 0


@dataclass(frozen=True)
class Head:
    """The parsed head of a value. table: (offset, bytes, checksum) per segment. nbytes: of the whole value.

    trusted: the bytes were checked before.
    """

    key: bytes
    meta: Meta
    table: tuple[tuple[int, int, bytes], ...]
    nbytes: int
    trusted: bool = False

    @property
    def first_bytes(self) -> int:
        """Bytes up to the first group: what is read before any layer."""
        return self.table[1][0] if self.meta.groups else self.nbytes

    def span(self, group: int) -> tuple[int, int]:
        """First byte and end of a group; the last one's takes what lies behind it along."""
        start, size, _ = self.table[1 + group]
        return start, self.nbytes if group == len(self.meta.groups) - 1 else start + size

    def check(self, data: memoryview, segment: int) -> memoryview:
        """A segment of the value `data`, checked. Raises CorruptChunkError."""
        start, size, digest = self.table[segment]
        part = data[start : start + size]
        if self.meta.checked and not self.trusted and xxhash.xxh3_128_digest(part) != digest:
            raise CorruptChunkError(f"segment {segment} of {len(self.table)} does not match its checksum")
        return part

    def tokens(self, data: memoryview) -> Tensor:
        """Token ids [T] int64. Raises CorruptChunkError."""
        return torch.from_numpy(np.frombuffer(self.check(data, 0), "<u4").astype(np.int64))

    def group(self, data: memoryview, group: int, codec: Codec | None) -> list[Pair]:
        """The layers of one group of `data`, whose first bytes and this group are there. Raises CorruptChunkError.

        Raw ones are views of `data`. codec: what coded values were coded with.
        """
        if self.meta.codec is None:
            return [self._raw(self.check(data, 1 + group), group)]
        self.check(data, 1 + group)
        container = self.container(data)
        if isinstance(codec, PipelineCodec):
            layers = codec.decode_layers(container, group)  # pyright: ignore[reportArgumentType]
        else:
            layers = list(self._coder(codec).decode(bytes(container)).layers)
        self.fits(layers, sum(self.meta.groups[:group]))
        return layers

    def container(self, data: memoryview) -> memoryview:
        """A coded value's container."""
        return data[self.table[-1][0] :]

    def chunk(self, data: memoryview, codec: Codec | None) -> KVChunk:
        """The whole chunk; raw K and V are views of `data`. Raises CorruptChunkError."""
        tokens = self.tokens(data)
        if self.meta.codec is None:
            layers = self._all_raw(data)
        else:
            for segment in range(1, len(self.table)):
                self.check(data, segment)
            layers = tuple(self._coder(codec).decode(bytes(data[self.table[-1][0] :])).layers)
            self.fits(layers, 0)
        return KVChunk(tokens, layers, self.meta.exact_after)

    def _all_raw(self, data: memoryview) -> Sequence[Pair]:
        meta, count = self.meta, len(self.meta.groups)
        starts = [start for start, *_ in self.table[1:]]
        step = starts[1] - starts[0] if count > 1 else 0
        if not meta.alike or starts != list(range(starts[0], starts[-1] + 1, step or 1)):
            return tuple(self._raw(self.check(data, 1 + i), i) for i in range(count))
        if meta.checked and not self.trusted:
            for i in range(count):
                self.check(data, 1 + i)
        return _Alike(self, data[starts[0] : starts[-1] + self.table[-1][1]], step)

    def _raw(self, part: memoryview, layer: int) -> Pair:
        (h, d, h2, d2), (k, v) = self.meta.shapes[layer], self.meta.dtypes[layer]
        cut, tokens = self.meta.layer_bytes(layer)[0], self.meta.tokens
        return _tensor(part[:cut], DTYPES[k]).view(h, tokens, d), _tensor(part[cut:], DTYPES[v]).view(h2, tokens, d2)

    def _coder(self, codec: Codec | None) -> Codec:
        if codec is None:
            raise CorruptChunkError(f"the value is coded with {self.meta.codec}, and no such codec is at hand")
        return codec

    def fits(self, layers: Sequence[Pair], first: int) -> None:
        """Raises CorruptChunkError unless layers, from `first` on, have the shapes that the head names."""
        for i, pair in enumerate(layers, first):
            (h, d, h2, d2), t = self.meta.shapes[i], self.meta.tokens
            if [tuple(x.shape) for x in pair] != [(h, t, d), (h2, t, d2)]:
                raise CorruptChunkError(f"layer {i} does not decode to the shapes that the value's head names")


class _Alike(Sequence[Pair]):
    """Raw layers of one shape and type: views of `data`, `step` bytes apart, made at once when the first is asked for.

    Single views cost more than checking what they show, and each waits for the interpreter while others read.
    """

    def __init__(self, head: Head, data: memoryview, step: int):
        self._head, self._data, self._step = head, data, step

    @cached_property
    def _pairs(self) -> tuple[Pair, ...]:
        meta = self._head.meta
        (h, d, *_), dtype, t = meta.shapes[0], DTYPES[meta.dtypes[0][0]], meta.tokens
        flat = _tensor(self._data, dtype)
        shape, strides = (len(self), h, t, d), (self._step // dtype.itemsize, t * d, d, 1)
        both = (flat.as_strided(shape, strides, at).unbind(0) for at in (0, h * t * d))
        return tuple(zip(*both, strict=True))

    def __len__(self) -> int:
        return len(self._head.meta.groups)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Pair, ...]: ...
    def __getitem__(self, index: int | slice) -> Pair | tuple[Pair, ...]:
        return self._pairs[index]

    def __iter__(self) -> Iterator[Pair]:
        return iter(self._pairs)

    def __reduce__(self) -> tuple[type, tuple[tuple[Pair, ...]]]:
        return tuple, (self._pairs,)  # a chunk that is saved does not know where it came from


def head_bytes(data: memoryview) -> int:
    """Bytes that `parse` needs, told from the first 56 of a value. Raises CorruptChunkError."""
    if len(data) < PREFIX.size:
        raise CorruptChunkError(f"{len(data)} bytes are too short for a value")
    magic, _, _, meta, segments = PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise CorruptChunkError("these bytes are no value: the magic number does not fit")
    if meta > MAX_META or segments > MAX_LAYERS + 2:
        raise CorruptChunkError(f"a head of {meta} bytes and {segments} segments is over the limits")
    return PREFIX.size + segments * ROW.size + meta + DIGEST


def parse(data: memoryview, key: bytes, nbytes: int, trusted: bool = False) -> Head:
    """The head of the value of `key`, nbytes long; `data` holds at least the head. Raises CorruptChunkError.

    trusted: the bytes were checked before and lie in this process's memory; their checksums are not looked at again.
    """
    end = head_bytes(data)
    if end > len(data):
        raise CorruptChunkError(f"a head of {end} bytes does not fit into {len(data)}")
    _, named, total, meta_bytes, segments = PREFIX.unpack_from(data)
    if xxhash.xxh3_128_digest(data[: end - DIGEST]) != data[end - DIGEST : end]:
        raise CorruptChunkError("the value's head does not match its checksum")
    if named != key:
        raise CorruptChunkError("the value belongs to another key")
    if total != nbytes:
        raise CorruptChunkError(f"a value of {total} bytes has become {nbytes}")
    meta = _load(bytes(data[end - DIGEST - meta_bytes : end - DIGEST]))
    table = tuple(ROW.iter_unpack(data[PREFIX.size : PREFIX.size + segments * ROW.size]))
    count = 1 + len(meta.groups)
    if len(table) != count + (meta.codec is not None):
        raise CorruptChunkError(f"{len(table)} segments do not fit {len(meta.groups)} groups of layers")
    sizes = [size for _, size, _ in table[1:count]]
    if meta.codec is None and sizes != meta.raw_bytes:
        raise CorruptChunkError("the segments do not have the sizes of the layers")
    lead = table[-1][1] if meta.codec is not None else 0
    spans, last = spans_of(meta, meta_bytes, 4 * meta.tokens, sizes, lead)
    if [row[:2] for row in table] != spans or last > total or (meta.codec is None and last != total):
        raise CorruptChunkError("the segments do not lie where they must")
    return Head(key, meta, table, total, trusted)


def spans_of(
    meta: Meta, meta_bytes: int, ids: int, sizes: Sequence[int], lead: int = 0, tail: int = 0
) -> tuple[list[tuple[int, int]], int]:
    """(offset, bytes) of each segment in the table's order, and the size of the whole."""
    coded = meta.codec is not None
    head = PREFIX.size + (1 + len(sizes) + coded) * ROW.size + meta_bytes + DIGEST
    container = at = _aligned(head + ids)
    at += lead
    out = [(head, ids)]
    for size in sizes:
        at = at if coded else _aligned(at)
        out.append((at, size))
        at += size
    return [*out, *([(container, lead)] if coded else [])], at + tail


def _aligned(at: int) -> int:
    return -(-at // ALIGN) * ALIGN


def packed(key: bytes, total: int, meta: bytes, spans: Sequence[tuple[int, int]], digests: Sequence[bytes]) -> bytes:
    rows = b"".join(ROW.pack(*span, digest) for span, digest in zip(spans, digests, strict=True))
    start = PREFIX.pack(MAGIC, key, total, len(meta), len(spans)) + rows + meta
    return start + xxhash.xxh3_128_digest(start)


def _tensor(data: memoryview, dtype: torch.dtype) -> Tensor:
    if not len(data):
        return torch.empty(0, dtype=dtype)
    # torch has no tensors of read-only memory.
    return torch.frombuffer(bytearray(data) if data.readonly else data, dtype=dtype)


def text_of(meta: Meta) -> bytes:
    raw = {
        "tokens": meta.tokens,
        "layers": runs(list(zip(meta.shapes, meta.dtypes, strict=True))),
        "groups": runs(list(meta.groups)),
        "codec": meta.codec,
        "exact_after": None if meta.exact_after is None else meta.exact_after.hex(),
        "checked": meta.checked,
    }
    text = json.dumps(raw, separators=(",", ":")).encode()
    if len(text) > MAX_META or len(meta.shapes) > MAX_LAYERS:
        raise ConfigError(f"{len(meta.shapes)} layers, {len(text)} bytes of description: over the limits of a value")
    return text


@lru_cache(maxsize=1024)
def _load(text: bytes) -> Meta:
    try:
        raw = json.loads(text)
        header = parse_header({**raw, "codec": raw["codec"] or {"id": "raw"}, "profile": None})
        if type(raw["checked"]) is not bool:
            raise ValueError("checked is no truth value")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise CorruptChunkError(f"value with a valid checksum is malformed: {error}") from None
    codec = None if raw["codec"] is None else header.codec
    if codec is None and set(header.groups) - {1}:
        raise CorruptChunkError("raw layers come in groups of one")
    return Meta(header.tokens, header.shapes, header.dtypes, header.groups, codec, header.exact_after, raw["checked"])
