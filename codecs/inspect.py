"""What a coded chunk says of itself: sizes of every part, read from headers alone. No symbol is decoded."""

import json
from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from itertools import groupby
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from lmcache_blend.codecs import rans, raw
from lmcache_blend.codecs.base import get_codec
from lmcache_blend.codecs.container import PREFIX, VERSION, Container, Header, split
from lmcache_blend.codecs.entropy import SIZE, inflate
from lmcache_blend.codecs.pipeline import CODED, PLAIN, PipelineCodec
from lmcache_blend.codecs.smallest import BANK, ROW
from lmcache_blend.codecs.stages import Plane, stages
from lmcache_blend.errors import CorruptChunkError, LMCacheBlendError

DIGEST_BYTES = 32
OVERHEAD = ("header", "token_id", "padding")
SLOTS: dict[int, tuple[str, ...]] = {1: ("kv",), 2: ("k", "v")}


def describe(data: bytes, codec: PipelineCodec | None = None) -> dict[str, Any]:
    """A coded chunk as JSON-able facts: codec, shapes as runs, bytes and bits per element of every plane and stage.

    data: a container, or a raw chunk, of which less is told. codec: gives the ids of the stages where they depend on a
    profile; without it, and without a profile, they follow from the chunk's own config, else they are None. rANS
    parts tell words, escapes and, where the stream says it, rows and [table, rows that use it], or "own" where each row
    brings its table. Raises CorruptChunkError.
    """
    if data[: len(raw.MAGIC)] == raw.MAGIC:
        return _raw(data)
    container = Container(data)
    header, sizes = container.header, container.sizes
    start = PREFIX.size + PREFIX.unpack_from(data)[3] + DIGEST_BYTES
    container.tokens()
    first, segments, known = 0, [], _known(header, codec)
    for index, layers in enumerate(header.groups):
        body = container.segment(1 + index)
        planes = _planes(body, header, first, layers, known)
        elements = header.tokens * sum(h * d + h2 * d2 for h, d, h2, d2 in header.shapes[first : first + layers])
        segments.append({"layers": [first, first + layers - 1], **_size(len(body), elements), "planes": planes})
        first += layers
    return {
        "format": "LMCB",
        "version": VERSION,
        "codec": header.codec,
        "profile": header.profile,
        **_chunk(header.tokens, header.shapes, header.dtypes, header.exact_after),
        **_size(len(data), header.elements),
        "header_bytes": start,
        "token_id_bytes": sizes[0],
        "padding_bytes": len(data) - start - sum(sizes),
        "segments": segments,
    }


def render(description: dict[str, Any]) -> str:
    """`describe`'s facts as lines and one table for a terminal."""
    d = description
    layers = [f"{n} x {shape}" for n, shape in d["shapes"]]
    types = [f"{n} x {'/'.join(pair)}" for n, pair in d["dtypes"]]
    facts = {
        "format": f"{d['format']} version {d['version']}" if "version" in d else d["format"],
        "codec": json.dumps(d["codec"]),
        "profile": json.dumps(d["profile"]) if d.get("profile") else None,
        "tokens": f"{d['tokens']:,}" + (", exact prefix known" if d["exact_after"] else ""),
        "layers": f"[heads, dim, heads, dim] {', '.join(layers)}; {', '.join(types)}",
        "bytes": f"{d['bytes']:,} for {d['elements']:,} elements, {_bits(d)} bits each",
        "of these": ", ".join(f"{name} {d[f'{name}_bytes']:,}" for name in OVERHEAD if f"{name}_bytes" in d),
    }
    lines = [f"{name:<9}{value}" for name, value in facts.items() if value]
    if d.get("segments"):
        out = StringIO()
        Console(file=out, width=120, markup=False, highlight=False).print(_table(d["segments"]))
        lines += [line.rstrip() for line in out.getvalue().splitlines()]
    return "\n".join(lines) + "\n"


def _table(segments: Sequence[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("layers", "plane", "bytes", "bits/el.", "parts (bytes)", "rows", "words", "escapes", "tables"):
        table.add_column(name, justify="left" if name in ("layers", "plane", "parts (bytes)") else "right")
    for segment in segments:
        low, high = segment["layers"]
        for plane in segment["planes"]:
            coder = next((s for s in plane["stages"] if "words" in s), {})
            parts = ", ".join(f"{s['id'] or '?'} {s['bytes']:,}" for s in plane["stages"]) or plane["kind"]
            tables = coder.get("tables", "")
            table.add_row(
                str(low) if low == high else f"{low}-{high}",
                plane["slot"],
                f"{plane['bytes']:,}",
                _bits(plane),
                parts,
                *(f"{coder[name]:,}" if name in coder else "" for name in ("rows", "words", "escapes")),
                str(len(tables)) if isinstance(tables, list) else tables,
            )
    return table


def _planes(
    body: memoryview, header: Header, first: int, layers: int, known: tuple[PipelineCodec, Any] | None
) -> list[dict[str, Any]]:
    parts = _parts(body)
    if len(parts) not in SLOTS:
        raise CorruptChunkError(f"{len(parts)} planes in the segment of layer {first}; there are one or two")
    out = []
    for slot, part in zip(SLOTS[len(parts)], parts, strict=True):
        plane = Plane(
            slot, first, header.shapes[first : first + layers], len(header.shapes), header.tokens, np.zeros(0, np.int64)
        )
        kind, steps = bytes(part[:1]), []
        if kind == CODED:
            try:
                sides = _parts(part[1:])
            except CorruptChunkError:  # a codec that lays its planes out in its own way
                sides = []
            names = _names(plane, known, len(sides))
            steps = [{"id": name, "bytes": len(s), **_rans(s)} for name, s in zip(names, sides, strict=True)]
        elif kind != PLAIN:
            raise CorruptChunkError(f"a plane starts with {kind!r}, neither coded nor plain")
        out.append(
            {
                "slot": slot,
                "kind": "coded" if kind == CODED else "plain",
                **_size(len(part), plane.channels * plane.tokens),
                "stages": steps,
            }
        )
    return out


def _known(header: Header, codec: PipelineCodec | None) -> tuple[PipelineCodec, Any] | None:
    """The codec and what it was fitted with, where stages can be asked for; else None."""
    if codec is None and header.profile is not None:
        return None
    try:
        made = codec or get_codec(header.codec)
        return (made, made.profile_for(header.shapes)) if isinstance(made, PipelineCodec) else None
    except LMCacheBlendError:  # a codec that is not registered here, or settings of another release
        return None


def _names(plane: Plane, known: tuple[PipelineCodec, Any] | None, count: int) -> list[str | None]:
    """Ids of the stages of a plane, None each where they cannot be known."""
    unknown: list[str | None] = [None] * count
    if known is None:
        return unknown
    try:
        steps = known[0].stages(replace(plane, profile=known[1]))
    except LMCacheBlendError:
        return unknown
    names = {cls: name for name, cls in ((name, stages.get(name)) for name in stages)}
    ids: list[str | None] = [names.get(type(step), type(step).__name__.lower()) for step in steps]
    return ids if len(ids) == count else unknown


def _rans(side: memoryview, ids_from: int = 0) -> dict[str, Any]:
    """Facts of a part that ends with a rANS stream, empty for any other; rows and tables where it starts with a size.

    ids_from: where the rows' table ids start in the tables, in bytes per row.
    """
    try:
        size, packed, stream = split(side, 3)
    except CorruptChunkError:
        return _rans(side[1:], int(side[:1] == BANK)) if side[:1] in (BANK, ROW) else {}
    if len(stream) < rans.HEAD.size:
        return {}
    words, escapes = rans.HEAD.unpack_from(stream)
    if len(stream) != rans.HEAD.size + 4 * rans.LANES + 2 * (words + escapes):
        return {}
    facts: dict[str, Any] = {"words": words, "escapes": escapes, "table_bytes": len(packed)}
    if len(size) == SIZE.size:
        rows, length = SIZE.unpack(size)
        ids = np.frombuffer(inflate(packed, 255 * rows), np.uint8)[ids_from * rows :]
        facts |= {"rows": rows, "length": length, "tables": _tables(ids) if len(ids) == rows else "own"}
    return facts


def _tables(ids: np.ndarray) -> list[list[int]]:
    """[table, rows that use it], in order of the tables."""
    return [[int(i), int(n)] for i, n in zip(*np.unique(ids, return_counts=True), strict=True)]


def _parts(data: memoryview) -> list[memoryview]:
    """What `container.join` put together, however many; raises CorruptChunkError."""
    count, at = 0, 0
    while at + 4 <= len(data):
        at += 4 + int.from_bytes(data[at : at + 4], "little")
        count += 1
    return split(data, count)


def _raw(data: bytes) -> dict[str, Any]:
    chunk = raw.Raw().decode(data)
    dtypes = [tuple(str(x.dtype).removeprefix("torch.") for x in pair) for pair in chunk.layers]
    return {
        "format": raw.MAGIC.decode(),
        "codec": raw.Raw().get_config(),
        **_chunk(len(chunk), chunk.shapes, dtypes, chunk.exact_after),
        **_size(len(data), sum(k.numel() + v.numel() for k, v in chunk.layers)),
        "header_bytes": len(data) - chunk.nbytes - chunk.tokens.nbytes,
        "token_id_bytes": chunk.tokens.nbytes,
    }


def _chunk(tokens: int, shapes: Sequence[Any], dtypes: Sequence[Any], exact_after: bytes | None) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "shapes": _runs(shapes),
        "dtypes": _runs(dtypes),
        "exact_after": None if exact_after is None else exact_after.hex(),
    }


def _size(size: int, elements: int) -> dict[str, Any]:
    return {"bytes": size, "elements": elements, "bits_per_element": 8 * size / elements if elements else None}


def _bits(facts: dict[str, Any]) -> str:
    return "-" if facts["bits_per_element"] is None else f"{facts['bits_per_element']:.2f}"


def _runs(items: Sequence[Any]) -> list[list[Any]]:
    return [[len(list(group)), list(item)] for item, group in groupby(items)]
