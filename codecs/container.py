"""The container of every coded chunk: a checksummed header, then one checksummed segment per group of layers.

    magic "LMCB" | version u16 | reserved u16 | header bytes u32 | header (JSON) | SHA-256 of all before | segments

The header holds the codec's JSON config, the chunk's shapes and types, the digest of the profile it was coded with, and
bytes and checksum of every segment, so that a segment can be fetched, checked and decoded alone. Segment 0 is the token
ids (uint32); segment 1 + i belongs to group i of layers. Little endian throughout; nothing is ever executed or
unpickled; sizes are checked before anything is allocated.
"""

import hashlib
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from lmcache_blend.errors import ConfigError, CorruptChunkError

MAGIC, VERSION = b"LMCB", 1
PREFIX = struct.Struct("<4sHHI")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_HEADER_BYTES, MAX_LAYERS, MAX_DIM, MAX_DEPTH = 1 << 20, 1 << 12, 1 << 24, 16
MAX_TOKEN_ID = (1 << 32) - 1
# A container that claims more is refused, so that a small file cannot ask for much memory. Writers pad.
MAX_ELEMENTS_PER_BYTE, FREE_ELEMENTS = 1024, 1 << 20

Shape = tuple[int, int, int, int]  # heads and dim of the first, heads and dim of the second tensor of one layer


@dataclass(frozen=True)
class Header:
    """What a container says of its chunk.

    codec: JSON config without the profile's path. tokens: T. shapes: per layer (H, Dk, H', Dv). dtypes: per layer the
    float types of the two tensors. groups: per segment the number of layers in it. profile: digest, None without one.
    """

    codec: dict[str, Any]
    tokens: int
    shapes: tuple[Shape, ...]
    dtypes: tuple[tuple[str, str], ...]
    groups: tuple[int, ...]
    exact_after: bytes | None = None
    profile: str | None = None

    @property
    def elements(self) -> int:
        """Elements of K and V."""
        return self.tokens * sum(h * d + h2 * d2 for h, d, h2, d2 in self.shapes)


class Container:
    """A parsed container. Parsing checks the header only; `segment` checks the segment that it hands out.

    sizes: bytes per segment, token ids first; start: where the first one begins. Raises CorruptChunkError.
    """

    def __init__(self, data: bytes | memoryview):
        self._data = memoryview(data)
        if len(data) < PREFIX.size:
            raise CorruptChunkError(f"{len(data)} bytes are too short for a container")
        magic, version, reserved, size = PREFIX.unpack_from(data)
        if magic != MAGIC or reserved:
            raise CorruptChunkError("these bytes are no container: the magic number does not fit")
        if version != VERSION:
            raise CorruptChunkError(f"container version {version} is unknown, this release reads version {VERSION}")
        end = PREFIX.size + size
        if size > MAX_HEADER_BYTES or end + 32 > len(data):
            raise CorruptChunkError(f"a header of {size} bytes does not fit into a container of {len(data)}")
        if hashlib.sha256(self._data[:end]).digest() != self._data[end : end + 32]:
            raise CorruptChunkError("the container's header does not match its checksum")
        try:
            raw = json.loads(bytes(self._data[PREFIX.size : end]))
            self.header, self._table = parse_header(raw), [(int(n), bytes.fromhex(h)) for n, h in raw["segments"]]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
            raise CorruptChunkError(f"container header with a valid checksum is malformed: {error}") from None
        self.start, self.sizes = end + 32, [n for n, _ in self._table]
        if min(self.sizes, default=-1) < 0 or len(self.sizes) != len(self.header.groups) + 1:
            raise CorruptChunkError(f"{len(self.sizes)} segments do not fit {len(self.header.groups)} layer groups")
        if sum(self.sizes) > len(data) - self.start:
            raise CorruptChunkError(f"segments of {sum(self.sizes)} bytes do not fit into a container of {len(data)}")
        end = self.start + sum(self.sizes)
        padding = _padding(self.header, end)
        if len(data) - end < padding:
            raise CorruptChunkError(f"{len(data)} bytes claim {self.header.elements} elements, more than they can hold")
        if len(data) - end > padding or bytes(self._data[end:]).strip(b"\0"):
            raise CorruptChunkError("the container does not end after its last segment")

    def segment(self, index: int) -> memoryview:
        """Bytes of a segment, checked. index 0: token ids; 1 + i: group i."""
        at = self.start + sum(self.sizes[:index])
        part = self._data[at : at + self.sizes[index]]
        if hashlib.sha256(part).digest()[:16] != self._table[index][1]:
            raise CorruptChunkError(f"segment {index} of {len(self.sizes)} does not match its checksum")
        return part

    def tokens(self) -> torch.Tensor:
        """Token ids [T] int64."""
        return torch.from_numpy(array(self.segment(0), "<u4", (self.header.tokens,)).astype(np.int64))


def pack(header: Header, tokens: torch.Tensor, segments: Sequence[bytes]) -> bytes:
    """Header, token ids [T] and one byte string per group of layers to a container. Raises ConfigError."""
    ids = tokens.cpu().numpy()
    if len(ids) and (ids.min() < 0 or ids.max() > MAX_TOKEN_ID):
        raise ConfigError(f"token ids reach from {ids.min()} to {ids.max()}; a container holds 0 to {MAX_TOKEN_ID}")
    parts = [ids.astype("<u4").tobytes(), *segments]
    raw = {
        "codec": header.codec,
        "tokens": header.tokens,
        "layers": runs(list(zip(header.shapes, header.dtypes, strict=True))),
        "groups": runs(list(header.groups)),
        "exact_after": None if header.exact_after is None else header.exact_after.hex(),
        "profile": header.profile,
        "segments": [[len(p), hashlib.sha256(p).digest()[:16].hex()] for p in parts],
    }
    try:
        text = json.dumps(raw, separators=(",", ":"), allow_nan=False).encode()
        parse_header(raw)
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"a container cannot hold this chunk: {error}") from None
    if len(text) > MAX_HEADER_BYTES:
        raise ConfigError(f"a header of {len(text)} bytes is over the {MAX_HEADER_BYTES} of a container")
    start = PREFIX.pack(MAGIC, VERSION, 0, len(text)) + text
    out = b"".join((start, hashlib.sha256(start).digest(), *parts))
    return out + bytes(_padding(header, len(out)))


def _padding(header: Header, size: int) -> int:
    """Zeros behind a container of `size` bytes. A chunk without tokens counts as one token, for its shapes' sake."""
    elements = header.elements or replace(header, tokens=1).elements
    return max(0, (elements - FREE_ELEMENTS) // MAX_ELEMENTS_PER_BYTE + 1 - size)


def runs(items: list[Any]) -> list[list[Any]]:
    """[a, a, b] -> [[2, a], [1, b]]: models have few kinds of layer."""
    out: list[list[Any]] = []
    for item in items:
        if out and out[-1][1] == item:
            out[-1][0] += 1
        else:
            out.append([1, item])
    return out


def _expand(runs: list[Any], limit: int = MAX_LAYERS) -> list[Any]:
    if sum(_count(n) for n, _ in runs) > limit:
        raise ValueError(f"more than {limit} entries")
    return [item for n, item in runs for _ in range(n)]


def _count(value: Any, low: int = 1, high: int = MAX_DIM) -> int:
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{value!r} is no number from {low} to {high}")
    return value


def _check_depth(value: Any, left: int = MAX_DEPTH) -> None:
    """Deep nesting passes the JSON reader and then breaks whoever prints or copies it."""
    if not left:
        raise ValueError(f"the codec's config is nested deeper than {MAX_DEPTH}")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        _check_depth(item, left - 1)


def parse_header(raw: dict[str, Any]) -> Header:
    """The fields of a header, checked one by one; raises ValueError, KeyError, TypeError and AttributeError."""
    layers = _expand(raw["layers"])
    groups = tuple(_count(n) for n in _expand(raw["groups"]))
    shapes = tuple((_count(h), _count(d), _count(h2, 0), _count(d2, 0)) for (h, d, h2, d2), _ in layers)
    dtypes = tuple((k, v) for _, (k, v) in layers)
    if not all(k in DTYPES and v in DTYPES for k, v in dtypes):
        raise ValueError("a dtype is unknown")
    if sum(groups) != len(layers):
        raise ValueError(f"groups of {sum(groups)} layers for {len(layers)}")
    if not isinstance(raw["codec"], dict) or not isinstance(raw["codec"].get("id"), str):
        raise ValueError("the codec's config has no id")
    _check_depth(raw["codec"])
    exact, profile = raw["exact_after"], raw["profile"]
    if not (profile is None or isinstance(profile, str)):
        raise ValueError("the profile is no digest")
    return Header(
        raw["codec"],
        _count(raw["tokens"], 0),
        shapes,
        dtypes,
        groups,
        None if exact is None else bytes.fromhex(exact),
        profile,
    )


def join(parts: Sequence[bytes]) -> bytes:
    """Byte strings to one, each behind its length (u32)."""
    return b"".join(struct.pack("<I", len(p)) + p for p in parts)


def split(data: bytes | memoryview, count: int) -> list[memoryview]:
    """What `join` put together; raises CorruptChunkError unless it is exactly `count` parts."""
    data, parts = memoryview(data), []
    for _ in range(count):
        if len(data) < 4:
            raise CorruptChunkError("a segment ends before its last part")
        size = struct.unpack_from("<I", data)[0]
        if size > len(data) - 4:
            raise CorruptChunkError(f"a part of {size} bytes runs past the {len(data) - 4} that are left")
        parts.append(data[4 : 4 + size])
        data = data[4 + size :]
    if len(data):
        raise CorruptChunkError(f"{len(data)} bytes are left behind a segment's last part")
    return parts


def array(data: bytes | memoryview, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Bytes as an array of that shape; raises CorruptChunkError where the number of bytes differs."""
    wanted = math.prod(shape) * np.dtype(dtype).itemsize
    if len(data) != wanted:
        raise CorruptChunkError(f"{len(data)} bytes are not the {wanted} of {dtype} {list(shape)}")
    return np.frombuffer(data, dtype).reshape(shape)
