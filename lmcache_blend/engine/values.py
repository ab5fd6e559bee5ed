"""What a tier stores of a chunk: made from one, filled in place, checked while it is read. Its format: heads.py."""

import ctypes
import itertools
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import overload

import numpy as np
import torch
import xxhash
from torch import Tensor

from lmcache_blend.codecs import Codec, PipelineCodec
from lmcache_blend.codecs.container import DTYPES, Container, Shape
from lmcache_blend.codecs.pipeline import NAMES
from lmcache_blend.engine import checked_io
from lmcache_blend.engine.copying import Piece, copy_all
from lmcache_blend.engine.heads import (
    ALIGN,
    DIGEST,
    MAGIC,
    PREFIX,
    ROW,
    Head,
    Meta,
    Names,
    head_bytes,
    packed,
    parse,
    spans_of,
    text_of,
)
from lmcache_blend.engine.tiers.base import Part, Value
from lmcache_blend.errors import ConfigError, CorruptChunkError
from lmcache_blend.types import KVChunk, Pair

__all__ = [
    "ALIGN",
    "DIGEST",
    "HEAD_GUESS",
    "MAGIC",
    "MAX_VALUE",
    "PREFIX",
    "ROW",
    "STEP",
    "Blank",
    "Head",
    "Incoming",
    "RawValue",
    "encode",
    "head_bytes",
    "parse",
]

MAX_VALUE = 1 << 32
"""Bytes of a value at most: what a tier claims to hold is allocated before it can be checked."""
STEP = 1 << 18
"""Bytes that a reader is asked for at a time, at least."""
HEAD_GUESS = 1 << 14
"""Bytes that hold the head and the token ids of most values, so that one read gets them."""


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
        self._head = lambda digests: packed(key, nbytes, text, spans, digests)
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
    sizes, text = [sum(map(len, p)) for p in parts], text_of(meta)
    spans, total = spans_of(meta, len(text), len(ids), sizes, len(lead), len(tail))
    pieces = [[ids], *parts, [lead]]
    out: list[Part] = [packed(key, total, text, spans, [_digest(p) for p in pieces])]
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
        self._first = packed(key, self.nbytes, text, self._spans, [bytes(DIGEST)] * len(self._spans)) + ids

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
    text, sizes = text_of(meta), [sum(meta.layer_bytes(i)) for i in range(len(shapes))]
    return meta, text, *spans_of(meta, len(text), 4 * tokens, sizes)


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
