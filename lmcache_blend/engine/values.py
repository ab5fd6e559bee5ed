"""What a tier stores of a chunk: a checked head, the token ids, and K and V, raw or in a codec's container.

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

import ctypes
import itertools
import json
import os
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
from lmcache_blend.codecs.container import DTYPES, MAX_LAYERS, Container, Shape, parse_header, runs
from lmcache_blend.codecs.pipeline import NAMES
from lmcache_blend.engine import checked_io
from lmcache_blend.engine.copying import Piece, copy_all
from lmcache_blend.engine.tiers.base import Part, Value
from lmcache_blend.errors import ConfigError, CorruptChunkError
from lmcache_blend.types import KVChunk, Pair

MAGIC = b"LMCBVAL1"
PREFIX = struct.Struct("<8s32sQII")
ROW = struct.Struct("<QQ16s")
DIGEST, ALIGN, MAX_META = 16, 64, 1 << 20
MAX_VALUE = 1 << 32
"""Bytes of a value at most: what a tier claims to hold is allocated before it can be checked."""
STEP = 1 << 18
"""Bytes that a reader is asked for at a time, at least."""
HEAD_GUESS = 1 << 14
"""Bytes that hold the head and the token ids of most values, so that one read gets them."""


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
            layers = list(self._coder(codec).decode(bytes(data[self.table[-1][0] :])).layers)
            self.fits(layers, 0)
        return KVChunk(tokens, tuple(layers), self.meta.exact_after)

    def _all_raw(self, data: memoryview) -> list[Pair]:
        """Layers that are all alike are made at once: single views cost more than checking what they show."""
        meta, count = self.meta, len(self.meta.groups)
        starts = [start for start, *_ in self.table[1:]]
        step = starts[1] - starts[0] if count > 1 else 0
        if not meta.alike or starts != list(range(starts[0], starts[-1] + 1, step or 1)):
            return [self._raw(self.check(data, 1 + i), i) for i in range(count)]
        if meta.checked and not self.trusted:
            for i in range(count):
                self.check(data, 1 + i)
        (h, d, *_), dtype, t = meta.shapes[0], DTYPES[meta.dtypes[0][0]], meta.tokens
        flat = _tensor(data[starts[0] : starts[-1] + self.table[-1][1]], dtype)
        shape, strides = (count, h, t, d), (step // dtype.itemsize, t * d, d, 1)
        both = (flat.as_strided(shape, strides, at).unbind(0) for at in (0, h * t * d))
        return list(zip(*both, strict=True))

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


class Incoming:
    """The value of a key while it is read into `data`: each segment is checked as soon as it is whole.

    So a reader that says how far it has come has its bytes checked while they are in the processor's cache.
    trusted: as in `parse`.
    """

    def __init__(self, key: bytes, data: memoryview, trusted: bool = False):
        self._key, self._data, self._trusted = key, data, trusted
        self.reached(0)

    def reached(self, there: int) -> int:
        """The first `there` bytes are read, 0: reading begins, perhaps anew; how far to read next. Never raises."""
        if there == 0:
            self._head: Head | None = None
            self._error: CorruptChunkError | None = None
            self._done = 0
            return min(HEAD_GUESS, len(self._data))
        if self._error is None:
            try:
                return self._check(there)
            except CorruptChunkError as error:
                self._error = error
        return len(self._data)

    __call__ = reached

    def pull(self, fd: int, there: int) -> int:
        """After `reached(there)`: read on from a file that is this value; how many bytes are there then.

        They are checked; fewer than all where something failed or cannot be done in one call. So a reader of files goes
        on with `reached` as if it had read them.
        """
        head = self._head
        if head is None or self._error or self._trusted or not head.meta.checked or not checked_io.AVAILABLE:
            return there
        ends = [(start, start + size) for start, size, _ in head.table[self._done :]]
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._data))
        now, digests = checked_io.read(fd, base, there, np.array(ends, np.int64).reshape(-1, 2))
        if now < max((end for _, end in ends), default=0):
            return now  # those segments that are whole are checked by `reached`
        for digest in digests:
            if head.table[self._done][2] != digest:
                self._error = CorruptChunkError(f"segment {self._done} does not match its checksum")
                break
            self._done += 1
        return now

    def _check(self, there: int) -> int:
        head = self._head
        if head is None:
            need = PREFIX.size if there < PREFIX.size else head_bytes(self._data[:there])
            if there < need <= len(self._data):
                return need
            self._head = head = parse(self._data, self._key, len(self._data), self._trusted)
        ends = [start + size for start, size, _ in head.table]
        while self._done < len(ends) and ends[self._done] <= there:
            head.check(self._data, self._done)
            self._done += 1
        # As much as is worth a call, up to the end of a segment: then it is checked from the cache.
        return next((end for end in ends[self._done :] if end >= there + STEP), head.nbytes)

    def whole(self) -> Head:
        """The head, after everything is read and was checked. Raises CorruptChunkError."""
        self.reached(len(self._data))
        if self._error or self._head is None or self._done < len(self._head.table):
            raise self._error or CorruptChunkError("the value ends within a segment")
        head = self._head
        return Head(head.key, head.meta, head.table, head.nbytes, trusted=True)


class RawValue(Sequence[Part]):
    """The pieces of a raw value, checked when they are asked for: the first one, the head, needs all the others.

    Whoever writes at any offset takes `scattered`, or `push` for a file, and reads K and V from memory once: each
    group right before it is written is in the processor's cache. nbytes: of the whole.
    """

    def __init__(
        self, key: bytes, text: bytes, spans: list[tuple[int, int]], nbytes: int, ids: bytes, layers: Sequence[Pair]
    ):
        self.nbytes = nbytes
        self._head = lambda digests: _head(key, nbytes, text, spans, digests)
        self._spans, self._ids, self._layers = spans, ids, [tuple(map(_in_one_piece, pair)) for pair in layers]
        self._whole: list[Part] = []

    def scattered(self) -> Iterator[tuple[int, Sequence[Part]]]:
        """(offset, pieces) of everything but zeros between segments."""
        digests = []
        segments = itertools.chain([[self._ids]], ([_bytes(k), _bytes(v)] for k, v in self._layers))
        for (start, _), pieces in zip(self._spans, segments, strict=True):
            digests.append(_digest(pieces))
            yield start, pieces
        yield 0, [self._head(digests)]

    def push(self, fd: int) -> bool:
        """Write everything into an empty file, with one call for all but the head; whether that went well."""
        if not checked_io.AVAILABLE:
            return False
        ids, zeros = np.frombuffer(self._ids, np.uint8), np.zeros(max(self._spans[0][0], ALIGN), np.uint8)
        nothing, at = zeros.ctypes.data, sum(self._spans[0])
        pieces = [(-1, nothing, self._spans[0][0]), (0, ids.ctypes.data, len(ids))]  # the head comes last
        for i, ((k, v), (start, size)) in enumerate(zip(self._layers, self._spans[1:], strict=True), 1):
            pieces += (-1, nothing, start - at), (i, k.data_ptr(), k.nbytes), (i, v.data_ptr(), v.nbytes)
            at = start + size
        pieces.append((-1, nothing, self.nbytes - at))
        digests = checked_io.write(fd, len(self._spans), np.array(pieces, np.int64))
        if digests is None:
            return False
        head = self._head(digests)
        return os.pwrite(fd, head, 0) == len(head)

    def _pieces(self) -> list[Part]:
        if not self._whole:
            *segments, (_, (head,)) = self.scattered()
            whole: list[Part] = [head]
            at = len(head)
            for start, pieces in segments:
                whole += [bytes(start - at), *pieces]
                at = start + sum(map(len, pieces))
            self._whole = [*whole, bytes(self.nbytes - at)]
        return self._whole

    def __len__(self) -> int:
        return len(self._pieces())

    @overload
    def __getitem__(self, index: int) -> Part: ...
    @overload
    def __getitem__(self, index: slice) -> list[Part]: ...
    def __getitem__(self, index: int | slice) -> Part | list[Part]:
        return self._pieces()[index]


def encode(key: bytes, chunk: KVChunk, codec: Codec | None = None) -> Value:
    """A value in pieces; raw K and V are not copied, so the chunk must not change until the pieces are written.

    Raises ConfigError for what cannot be stored.
    """
    if codec is None:
        shapes, names = _described(chunk)
        _, text, spans, total = _plan(len(chunk), shapes, names, chunk.exact_after, True)
        return RawValue(key, text, spans, total, _ids(chunk.tokens), chunk.layers)
    lead, tail = memoryview(b""), memoryview(b"")
    data, config = memoryview(codec.encode(chunk)), {k: v for k, v in codec.get_config().items() if k != "profile"}
    groups, parts = (len(chunk.layers),), [[data]]
    if isinstance(codec, PipelineCodec):
        container = Container(data)
        groups, at = container.header.groups, container.start + container.sizes[0]
        lead, parts = data[:at], []
        for size in container.sizes[1:]:
            parts.append([data[at : at + size]])
            at += size
        tail = data[at:]
    ids, meta = _ids(chunk.tokens), Meta(len(chunk), *_described(chunk), groups, config, chunk.exact_after, True)
    sizes, text = [sum(map(len, p)) for p in parts], _dump(meta)
    spans, total = _spans(meta, len(text), len(ids), sizes, len(lead), len(tail))
    pieces = [[ids], *parts, [lead]]
    out: list[Part] = [_head(key, total, text, spans, [_digest(p) for p in pieces])]
    at = len(out[0])
    for i in (0, len(pieces) - 1, *range(1, len(pieces) - 1)):
        out += [bytes(spans[i][0] - at), *pieces[i]]
        at = sum(spans[i])
    return [*out, tail]


class Blank:
    """A raw value without checksums, to be filled in place: take `nbytes` of memory, then `fill`, or layer by layer.

    shapes, dtypes: per layer (H, Dk, H', Dv) and the float types of K and V.
    """

    def __init__(
        self,
        key: bytes,
        tokens: Tensor,
        shapes: Sequence[Shape],
        dtypes: Sequence[tuple[torch.dtype, torch.dtype]],
        exact_after: bytes | None = None,
    ):
        for i, types in enumerate(dtypes):
            if types[0] not in NAMES or types[1] not in NAMES:
                raise ConfigError(f"layer {i} is {types[0]}, {types[1]}; a value holds {', '.join(DTYPES)}")
        names, ids = tuple((NAMES[k], NAMES[v]) for k, v in dtypes), _ids(tokens)
        self.meta, text, self._spans, self.nbytes = _plan(len(tokens), tuple(shapes), names, exact_after, False)
        self._first = _head(key, self.nbytes, text, self._spans, [bytes(DIGEST)] * len(self._spans)) + ids

    @classmethod
    def of(cls, key: bytes, chunk: KVChunk) -> "Blank":
        """For a whole chunk. Raises ConfigError for what cannot be stored."""
        shapes, names = _described(chunk)
        return cls(key, chunk.tokens, shapes, [(DTYPES[k], DTYPES[v]) for k, v in names], chunk.exact_after)

    def fill(self, slot: np.ndarray, layers: Sequence[Pair]) -> None:
        """Copy all layers into slot [nbytes] uint8; from CUDA through its current stream, finished on return."""
        self.begin(slot)
        pieces: list[Piece] = []
        layers, base = list(layers), slot.ctypes.data  # a list keeps them until they are copied
        waits = [self._put(slot, base, i, *pair, pieces) for i, pair in enumerate(layers)]
        copy_all(pieces)
        if any(waits):
            torch.cuda.current_stream().synchronize()

    def begin(self, slot: np.ndarray) -> None:
        """Write the head and the token ids."""
        if slot.nbytes < self.nbytes:
            raise ConfigError(f"{slot.nbytes} bytes are too few for a value of {self.nbytes}")
        slot[: len(self._first)] = np.frombuffer(self._first, np.uint8)

    def put(self, slot: np.ndarray, layer: int, k: Tensor, v: Tensor) -> bool:
        """Copy one layer; whether a copy from CUDA may still run. Raises ConfigError where its shape is another."""
        pieces: list[Piece] = []
        waits = self._put(slot, slot.ctypes.data, layer, k, v, pieces)
        copy_all(pieces)
        return waits

    def _put(self, slot: np.ndarray, base: int, layer: int, k: Tensor, v: Tensor, pieces: list[Piece]) -> bool:
        """As put, but what lies on the CPU in one piece is left to the caller. base: address of the slot."""
        (h, d, h2, d2), types, t = self.meta.shapes[layer], self.meta.dtypes[layer], self.meta.tokens
        at, waits = self._spans[1 + layer][0], False
        for x, shape, dtype in ((k, (h, t, d), types[0]), (v, (h2, t, d2), types[1])):
            if x.shape != shape or NAMES.get(x.dtype) != dtype:
                raise ConfigError(f"layer {layer} is {x.dtype} {list(x.shape)}, not {dtype} {list(shape)}")
            size = x.nbytes
            if x.is_cpu and x.is_contiguous():
                pieces.append((base + at, x.data_ptr(), size))
            elif size:
                piece = torch.from_numpy(slot[at : at + size]).view(x.dtype).view(x.shape)
                piece.copy_(x.detach(), non_blocking=True)
                waits = waits or x.is_cuda
            at += size
        return waits


@lru_cache(maxsize=256)
def _plan(
    tokens: int, shapes: tuple[Shape, ...], dtypes: tuple[Names, ...], exact_after: bytes | None, checked: bool
) -> tuple[Meta, bytes, list[tuple[int, int]], int]:
    """Meta, its text, spans and size of a raw value."""
    meta = Meta(tokens, shapes, dtypes, (1,) * len(shapes), None, exact_after, checked)
    text, sizes = _dump(meta), [sum(meta.layer_bytes(i)) for i in range(len(shapes))]
    return meta, text, *_spans(meta, len(text), 4 * tokens, sizes)


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
    spans, last = _spans(meta, meta_bytes, 4 * meta.tokens, sizes, lead)
    if [row[:2] for row in table] != spans or last > total or (meta.codec is None and last != total):
        raise CorruptChunkError("the segments do not lie where they must")
    return Head(key, meta, table, total, trusted)


def _spans(
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


def _head(key: bytes, total: int, meta: bytes, spans: Sequence[tuple[int, int]], digests: Sequence[bytes]) -> bytes:
    rows = b"".join(ROW.pack(*span, digest) for span, digest in zip(spans, digests, strict=True))
    start = PREFIX.pack(MAGIC, key, total, len(meta), len(spans)) + rows + meta
    return start + xxhash.xxh3_128_digest(start)


def _digest(parts: Sequence[Part]) -> bytes:
    running = xxhash.xxh3_128()
    for part in parts:
        running.update(part)
    return running.digest()


def _ids(tokens: Tensor) -> bytes:
    ids = tokens.cpu().numpy()
    if len(ids) and (ids.min() < 0 or ids.max() >= 1 << 32):
        raise ConfigError(f"token ids reach from {ids.min()} to {ids.max()}; a value holds 0 to {(1 << 32) - 1}")
    return ids.astype("<u4").tobytes()


def _in_one_piece(x: Tensor) -> Tensor:
    """Copied only where it is not one piece on the CPU."""
    return x if x.is_cpu and x.is_contiguous() else x.detach().cpu().contiguous()


def _bytes(x: Tensor) -> memoryview:
    """The memory of a tensor that is one piece on the CPU."""
    # Each operation of torch, views too, lets go of the interpreter, and waits for it where other threads write.
    memory = (ctypes.c_ubyte * x.nbytes).from_address(x.data_ptr())
    memory.owner = x  # pyright: ignore[reportAttributeAccessIssue]
    return memoryview(memory).cast("B")


def _tensor(data: memoryview, dtype: torch.dtype) -> Tensor:
    if not len(data):
        return torch.empty(0, dtype=dtype)
    # torch has no tensors of read-only memory.
    return torch.frombuffer(bytearray(data) if data.readonly else data, dtype=dtype)


def _described(chunk: KVChunk) -> tuple[tuple[Shape, ...], tuple[Names, ...]]:
    """Shapes and types of each layer. Raises ConfigError for what cannot be stored."""
    shapes, dtypes, tokens, last = [], [], len(chunk), None
    for i, (k, v) in enumerate(chunk.layers):
        if (this := (k.shape, v.shape, k.dtype, v.dtype)) != last:
            last = this
            (*_, t, d), (*_, t2, d2) = k.shape, v.shape
            known = k.dtype in NAMES and v.dtype in NAMES
            if not known or k.dim() != 3 or v.dim() != 3 or t != tokens or t2 != tokens:
                found, wanted = f"{k.dtype} {list(k.shape)}, {v.dtype} {list(v.shape)}", f"[H, {tokens}, D]"
                raise ConfigError(f"layer {i} is {found}; a value holds {wanted} of {', '.join(DTYPES)}")
            shape, names = (k.shape[0], d, v.shape[0], d2), (NAMES[k.dtype], NAMES[v.dtype])
        shapes.append(shape)
        dtypes.append(names)
    return tuple(shapes), tuple(dtypes)


def _dump(meta: Meta) -> bytes:
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
