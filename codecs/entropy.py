"""Stages from symbols to bytes: rANS with shared or in-stream tables, DEFLATE and zstd."""

import struct
import zlib
from typing import Literal

import numpy as np
import pydantic

from lmcache_blend.codecs import rans
from lmcache_blend.codecs.container import array, join, split
from lmcache_blend.codecs.stages import EMPTY, NotCodable, Plane, Stage, register_stage
from lmcache_blend.codecs.tables import byte_frequencies, exact, histogram, laplace_bank
from lmcache_blend.errors import CorruptChunkError

SIZE = struct.Struct("<II")


@register_stage("rans")
class Rans(Stage):
    """32-lane interleaved rANS over rows of symbols [R, T] int16."""

    tables: Literal["bank", "row"] = "bank"
    """bank: 96 built-in Laplace tables, a byte a row names one. row: an exact 8-bit table of every row in the stream
    (all symbols from 0 to 254), which costs more on short chunks."""

    def encode(self, x: np.ndarray, plane: Plane) -> tuple[np.ndarray, bytes]:
        if self.tables == "bank":
            tables = laplace_bank()
            ids = tables.choose(x)
            table_bytes = zlib.compress(ids.tobytes(), 9)
        else:
            if x.size and (x.min() < 0 or x.max() > 254):
                raise NotCodable
            counts = histogram(x - 127, 127)[:, : int(x.max(initial=0)) + 1]
            tables, ids = exact(counts, 8), np.arange(len(x))
            table_bytes = zlib.compress(byte_frequencies(tables.freq[:, : counts.shape[1]]).tobytes(), 9)
        return EMPTY, join([SIZE.pack(*x.shape), table_bytes, rans.encode(x, ids, tables)])

    def decode(self, y: np.ndarray, side: memoryview, plane: Plane) -> np.ndarray:
        size, table_bytes, stream = split(side, 3)
        rows, length = checked_size(size, plane)
        if self.tables == "bank":
            return rans.decode(stream, array(inflate(table_bytes, rows), "u1", (rows,)), length, laplace_bank())
        raw = np.frombuffer(inflate(table_bytes, 255 * rows), np.uint8)
        if not rows <= len(raw) or len(raw) % max(rows, 1):
            raise CorruptChunkError(f"tables of {len(raw)} bytes are not the same size for {rows} rows")
        return rans.decode_exact(stream, raw.reshape(rows, -1) if rows else raw.reshape(0, 1), length)


@register_stage("deflate")
class Deflate(Stage):
    """DEFLATE (zlib) over the symbols' bytes."""

    level: int = pydantic.Field(default=9, ge=0, le=9)

    def encode(self, x: np.ndarray, plane: Plane) -> tuple[np.ndarray, bytes]:
        narrow = x.astype(np.int8) if x.size and x.min() >= -128 and x.max() <= 127 else x.astype("<i2")
        return EMPTY, join([SIZE.pack(*x.shape), zlib.compress(narrow.tobytes(), self.level)])

    def decode(self, y: np.ndarray, side: memoryview, plane: Plane) -> np.ndarray:
        size, body = split(side, 2)
        rows, length = checked_size(size, plane)
        raw = inflate(body, 2 * rows * length)
        return array(raw, "i1" if len(raw) == rows * length else "<i2", (rows, length)).astype(np.int16)


def checked_size(size: memoryview, plane: Plane) -> tuple[int, int]:
    """(R, T) of coded symbols; raises CorruptChunkError where they are more than the plane has."""
    if len(size) != SIZE.size:
        raise CorruptChunkError(f"{len(size)} bytes are no size of a matrix")
    rows, length = SIZE.unpack(size)
    if rows > plane.channels or length > plane.tokens:
        raise CorruptChunkError(f"{rows} x {length} symbols for {plane.channels} channels, {plane.tokens} tokens")
    return rows, length


def inflate(data: memoryview, limit: int) -> bytes:
    """zlib.decompress that stops at `limit` bytes; raises CorruptChunkError."""
    try:
        stream = zlib.decompressobj()
        out = stream.decompress(bytes(data), limit + 1)
    except zlib.error as error:
        raise CorruptChunkError(f"a compressed part is damaged: {error}") from None
    if len(out) > limit or not stream.eof or stream.unused_data:
        raise CorruptChunkError(f"a compressed part is not the at most {limit} bytes that it should be")
    return out
