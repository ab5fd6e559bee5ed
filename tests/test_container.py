"""The container: what was packed comes out, and no header, however sealed, gets past its checks or asks for much."""

import contextlib
import hashlib
import json
import struct
import tracemalloc
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fuzz_codecs import leaves, nested, opened, sealed
from hypothesis import given
from hypothesis import strategies as st
from test_codec_conformance import MEAN, SINKS, UNIFORM, pipeline

from lmcache_blend.codecs import get_codec, rans
from lmcache_blend.codecs.container import (
    FREE_ELEMENTS,
    MAX_DEPTH,
    MAX_DIM,
    MAX_ELEMENTS_PER_BYTE,
    MAX_HEADER_BYTES,
    MAX_LAYERS,
    PREFIX,
    Container,
    Header,
    array,
    join,
    pack,
    split,
)
from lmcache_blend.codecs.tables import exact
from lmcache_blend.errors import ConfigError, CorruptChunkError
from lmcache_blend.testing import CodecConformance

MIB = 1 << 20
TYPES = ("float32", "bfloat16", "float16")
SHAPES = ((2, 4, 2, 4),) * 2
CODEC = get_codec(pipeline(SINKS, MEAN, UNIFORM, {"id": "rans"}))
GOOD = CODEC.encode(CodecConformance().chunk(SHAPES, 7, torch.float32))
PLAIN = Header({"id": "pipeline", "k": [], "v": None}, 3, ((1, 2, 1, 2),), (("float32", "float32"),), (1,))


def shape():
    return st.tuples(*[st.integers(1, 40)] * 2, *[st.integers(0, 40)] * 2)


@st.composite
def packed(draw) -> tuple[Header, torch.Tensor, list[bytes]]:
    kinds = st.tuples(shape(), st.tuples(st.sampled_from(TYPES), st.sampled_from(TYPES)))
    layers = draw(st.lists(kinds, max_size=6))
    layers = [layer for layer in layers for _ in range(draw(st.sampled_from((1, 1, 3))))]
    groups, left = [], len(layers)
    while left:
        groups.append(draw(st.integers(1, left)))
        left -= groups[-1]
    ids = draw(st.lists(st.integers(0, (1 << 32) - 1), max_size=20))
    header = Header(
        {"id": draw(st.text(max_size=9)), "step": draw(st.floats(allow_nan=False, allow_infinity=False))},
        len(ids),
        tuple(s for s, _ in layers),
        tuple(d for _, d in layers),
        tuple(groups),
        draw(st.none() | st.binary(max_size=40)),
        draw(st.none() | st.text("0123456789abcdef", min_size=64, max_size=64)),
    )
    return header, torch.tensor(ids, dtype=torch.long), [draw(st.binary(max_size=60)) for _ in groups]


@given(packed())
def test_what_was_packed_comes_out(made):
    header, tokens, segments = made
    container = Container(pack(header, tokens, segments))
    assert container.header == header
    assert torch.equal(container.tokens(), tokens)
    assert [bytes(container.segment(1 + i)) for i in range(len(segments))] == segments


@given(packed(), st.data())
def test_damage_is_found_by_whoever_reads_it(made, data):
    header, tokens, segments = made
    good = pack(header, tokens, segments)
    at = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CorruptChunkError):
        read_all(bytes(bad))


def read_all(data: bytes) -> None:
    container = Container(data)
    container.tokens()
    for i in range(len(container.header.groups)):
        container.segment(1 + i)


@given(st.lists(st.binary(max_size=30), max_size=6), st.data())
def test_split_undoes_join_and_nothing_else(parts, data):
    joined = join(parts)
    assert [bytes(p) for p in split(joined, len(parts))] == parts
    for bad in (joined + b"\0", joined[:-1]):
        if bad or parts:
            with pytest.raises(CorruptChunkError):
                split(bad, len(parts))
    with pytest.raises(CorruptChunkError):
        split(joined, len(parts) + 1)
    noise = data.draw(st.binary(max_size=30))
    with contextlib.suppress(CorruptChunkError):
        assert join(split(noise, 2)) == noise


@pytest.mark.parametrize("shape", [(3,), (2, 2), (1 << 40, 1 << 40), (0, 5)])
def test_an_array_of_another_size_is_corrupt(shape):
    with pytest.raises(CorruptChunkError):
        array(bytes(20), "<f4", shape)


# Hostile headers. Each is sealed again, so that only the header's own checks can tell.


LAYER = [[2, 4, 2, 4], ["float32", "float32"]]
HOSTILE: dict[str, dict[str, Any]] = {
    "2^40 tokens": {"tokens": 1 << 40},
    "2^24 tokens": {"tokens": 1 << 24},
    "-1 tokens": {"tokens": -1},
    "7.0 tokens": {"tokens": 7.0},
    "'7' tokens": {"tokens": "7"},
    "true tokens": {"tokens": True},
    "8 tokens": {"tokens": 8},
    "6 tokens": {"tokens": 6},
    "no layers key": {"layers": None},
    "layers of a dict": {"layers": {"2": LAYER}},
    "layers of a text": {"layers": "22"},
    "2^40 layers": {"layers": [[1 << 40, LAYER]]},
    "many layers": {"layers": [[MAX_LAYERS, LAYER], [1, LAYER]], "groups": [[MAX_LAYERS + 1, 1]]},
    "-2 layers": {"layers": [[-2, LAYER]]},
    "0 layers": {"layers": [[0, LAYER]]},
    "2^40 heads": {"layers": [[2, [[1 << 40, 4, 2, 4], LAYER[1]]]]},
    "2^70 dim": {"layers": [[2, [[2, 1 << 70, 2, 4], LAYER[1]]]]},
    "2^24 dim": {"layers": [[2, [[2, MAX_DIM, 2, 4], LAYER[1]]]]},
    "-4 dim": {"layers": [[2, [[2, -4, 2, 4], LAYER[1]]]]},
    "no first tensor": {"layers": [[2, [[0, 4, 2, 4], LAYER[1]]]]},
    "half a shape": {"layers": [[2, [[2, 4], LAYER[1]]]]},
    "a type of one": {"layers": [[2, [LAYER[0], ["float32"]]]]},
    "float64": {"layers": [[2, [LAYER[0], ["float64", "float32"]]]]},
    "a list for a type": {"layers": [[2, [LAYER[0], [[], "float32"]]]]},
    "other widths": {"layers": [[2, [[2, 5, 2, 4], LAYER[1]]]]},
    "groups of 3": {"groups": [[1, 1], [1, 2]]},
    "groups of 1": {"groups": [[1, 1]]},
    "groups of one whole": {"groups": [[1, 2]]},
    "groups of -1": {"groups": [[1, 3], [1, -1]]},
    "a group of 0": {"groups": [[2, 1], [1, 0]]},
    "2^40 groups": {"groups": [[1 << 40, 1]]},
    "no codec": {"codec": None},
    "codec without id": {"codec": {"k": []}},
    "codec id 3": {"codec": {"id": 3}},
    "codec of a list": {"codec": ["pipeline"]},
    "unknown codec": {"codec": {"id": "nothing"}},
    "unknown setting": {"codec": {"id": "pipeline", "k": [], "x": 1}},
    "setting self": {"codec": {"id": "pipeline", "k": [], "self": 1}},
    "unknown stage": {"codec": {"id": "pipeline", "k": [{"id": "nothing"}]}},
    "stage setting self": {"codec": {"id": "pipeline", "k": [{"id": "mean", "self": 1}]}},
    "stage without id": {"codec": {"id": "pipeline", "k": [{}]}},
    "no stages": {"codec": {"id": "pipeline", "k": []}},
    "1,000 stages": {"codec": {"id": "pipeline", "k": [MEAN] * 1000}},
    "deep codec": {"codec": {"id": "pipeline", "k": [{"id": "mean", "x": nested(MAX_DEPTH)}]}},
    "deeper codec": {"codec": {"id": "pipeline", "k": [{"id": "mean", "x": nested(900)}]}},
    "deep tokens": {"tokens": nested(900)},
    "profile 1": {"profile": 1},
    "profile of a list": {"profile": ["0" * 64]},
    "a profile": {"profile": "0" * 64},
    "no profile, but text": {"profile": ""},
    "digest of no hex": {"exact_after": "xy"},
    "digest 5": {"exact_after": 5},
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_is_corrupt_and_costs_little(change):
    raw, parts = opened(GOOD)
    bad = sealed({**raw, **change}, parts)
    assert len(bad) < 40_000
    refused(bad)


def refused(bad: bytes, limit: int = 64 * MIB) -> None:
    """CorruptChunkError from every way to decode, at less than `limit` bytes of memory."""
    tracemalloc.start()
    try:
        for read in (CODEC.decode, lambda data: CODEC.decode_layers(data, 0)):
            with pytest.raises(CorruptChunkError) as caught:
                read(bad)
            assert "\n" not in str(caught.value)
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("missing", ["codec", "tokens", "layers", "groups", "exact_after", "profile"])
def test_a_header_without_a_field_is_corrupt(missing):
    raw, parts = opened(GOOD)
    del raw[missing]
    refused(sealed(raw, parts))


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"1", b"null", b"{", b"\xff\xfe", b"[" * 9000, b'{"a":' * 9000, b'{"tokens": 1e999}', b"9" * 9000],
    ids=lambda text: repr(text[:12]),
)
def test_text_that_is_no_header_is_corrupt(text):
    refused(sealed(text, []))


SIZES = {
    "huge": lambda n: [1 << 40, n],
    "negative": lambda n: [-5, n + 5],
    "past the end": lambda n: [n + 1],
    "short": lambda n: [n - 1],
    "infinite": lambda n: [float("inf")],
    "not a number": lambda n: [float("nan")],
    "text": lambda n: [str(n) + "x"],
    "digits": lambda n: ["9" * 5000],
    "one more": lambda n: [n, 0],
    "none": lambda n: [],
}


@pytest.mark.parametrize("first", SIZES.values(), ids=SIZES)
def test_sizes_that_do_not_fit_the_data_are_corrupt(first):
    raw, parts = opened(GOOD)
    table = [[len(p), hashlib.sha256(p).hexdigest()[:32]] for p in parts]
    raw["segments"] = [[size, table[0][1]] for size in first(len(parts[0]))] + table[1:]
    refused(sealed(json.dumps(raw).encode(), parts))


@given(st.data())
def test_any_value_anywhere_in_a_header_is_read_or_refused(data):
    raw, parts = opened(GOOD)
    holder, key = data.draw(st.sampled_from([*leaves(raw)]))
    holder[key] = data.draw(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just([]) | st.just({})
    )
    with contextlib.suppress(CorruptChunkError):
        CODEC.decode(sealed(raw, parts))


def test_prefixes_of_another_kind_are_corrupt():
    for at, value in ((0, b"LMCX"), (4, b"\2\0"), (6, b"\1\0"), (8, struct.pack("<I", (1 << 32) - 1))):
        with pytest.raises(CorruptChunkError):
            Container(GOOD[:at] + value + GOOD[at + len(value) :])
    long = b" " * (MAX_HEADER_BYTES + 1)
    with pytest.raises(CorruptChunkError, match=f"header of {len(long)} bytes"):
        Container(sealed(long, []))


# Size against claim


def test_what_compresses_too_well_is_padded_to_the_byte():
    header = replace(PLAIN, shapes=((1, MAX_DIM, 1, 5),))
    tokens = torch.zeros(3, dtype=torch.long)
    data = pack(header, tokens, [b"x"])
    assert len(data) == (header.elements - FREE_ELEMENTS) // MAX_ELEMENTS_PER_BYTE + 1
    assert Container(data).header == header
    for bad in (data[:-1], data + b"\0", data[:-1] + b"x"):
        with pytest.raises(CorruptChunkError):
            Container(bad)


def test_a_chunk_without_tokens_claims_as_one_with_one():
    header = replace(PLAIN, tokens=0, shapes=((MAX_DIM, 1, 0, 0),))
    assert len(pack(header, torch.zeros(0, dtype=torch.long), [b""])) > (MAX_DIM - FREE_ELEMENTS) // 1024
    raw, parts = opened(GOOD)
    raw |= {"tokens": 0, "layers": [[2, [[MAX_DIM, MAX_DIM, 0, 0], LAYER[1]]]]}
    refused(sealed(raw, [b"", *parts[1:]]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shapes": ((0, 4, 1, 4),)}, "0 is no number from 1"),
        ({"shapes": ((MAX_DIM + 1, 1, 1, 1),)}, "is no number from"),
        ({"codec": {"id": "x", "y": float("nan")}}, "not JSON compliant"),
        ({"codec": {"id": "x", "y": nested(MAX_DEPTH)}}, "nested deeper"),
        ({"codec": {"id": "x", "y": "z" * MAX_HEADER_BYTES}}, "over the"),
    ],
    ids=["no heads", "many heads", "NaN", "deep", "long"],
)
def test_what_could_not_be_read_is_not_written(change, message):
    with pytest.raises(ConfigError, match=message):
        pack(replace(PLAIN, **change), torch.zeros(3, dtype=torch.long), [b""])


@pytest.mark.parametrize("ids", [[-1, 2, 3], [1, 2, 1 << 32]])
def test_token_ids_that_no_uint32_holds_are_a_config_error(ids):
    with pytest.raises(ConfigError, match="0 to 4294967295"):
        pack(PLAIN, torch.tensor(ids), [b""])


# Bombs: few bytes, sealed, that ask a stage for much


def stream(rows: int) -> bytes:
    """rANS of rows in which one symbol is certain: no words."""
    return rans.HEAD.pack(0, 0) + np.full(rans.LANES, rans.LOW, "<u4").tobytes()


def bomb(stages: list[dict[str, Any]], sides: list[bytes], channels: int = FREE_ELEMENTS) -> bytes:
    header = {
        "codec": {"id": "pipeline", "k": stages, "v": None},
        "tokens": 1,
        "layers": [[1, [[1, channels, 0, 0], ["float16", "float16"]]]],
        "groups": [[1, 1]],
        "exact_after": None,
        "profile": None,
    }
    return sealed(header, [bytes(4), join([b"\0" + join(sides), b"\1"])])


SIZE = struct.pack("<II", FREE_ELEMENTS, 1)
BOMBS = {
    "a table for a million rows": ["row", zlib.compress(b"\xff" * FREE_ELEMENTS, 9)],
    "no table for a million rows": ["row", zlib.compress(b"", 9)],
    "tables that inflate": ["row", zlib.compress(bytes(16 * MIB), 9)],
    "ids that inflate": ["bank", zlib.compress(bytes(16 * MIB), 9)],
}


@pytest.mark.parametrize(("tables", "packed"), BOMBS.values(), ids=BOMBS)
def test_small_chunks_stay_small(tables, packed):
    data = bomb([UNIFORM, {"id": "rans", "tables": tables}], [bytes(4), join([SIZE, packed, stream(FREE_ELEMENTS)])])
    assert len(data) < 80_000
    tracemalloc.start()
    try:
        with contextlib.suppress(CorruptChunkError):
            assert CODEC.decode(data).layers[0][0].shape == (1, 1, FREE_ELEMENTS)
        assert tracemalloc.get_traced_memory()[1] < 80 * MIB
    finally:
        tracemalloc.stop()


def test_a_rotation_of_a_huge_head_is_not_made():
    dim = 1 << 14
    size = join([struct.pack("<II", dim, 0), zlib.compress(bytes(dim), 9), stream(dim)])
    refused(bomb([SINKS, {"id": "hadamard"}, UNIFORM, {"id": "rans"}], [bytes(2 * dim), b"", bytes(4), size], dim))


def test_a_plane_without_elements_is_never_coded():
    raw, parts = opened(bomb([{"id": "recent"}, UNIFORM, {"id": "rans"}], [b"", bytes(4), b""], 1))
    empty = b"\0" + join([b"", bytes(4), join([bytes(8), zlib.compress(b""), stream(0)])])
    refused(sealed(raw, [parts[0], join([b"\1" + bytes(2), empty])]))


def test_a_table_per_row_needs_no_table_in_memory():
    """The first bomb is a true chunk: the same bytes come from the encoder where there are fewer rows."""
    zeros = np.zeros((3, 1), np.int16)
    assert rans.encode(zeros, np.arange(3), exact(np.ones((3, 1)), 8)) == stream(3)


def test_stages_in_an_order_that_makes_no_sense_are_corrupt():
    raw, parts = opened(GOOD)
    stages = raw["codec"]["k"]
    for order in ((3, 0, 1, 2), (0, 2, 3, 1), (1, 3, 2, 0), (3, 3, 3, 3)):
        planes = [[bytes(s) for s in split(p[1:], 4)] for p in split(parts[1], 2)]
        moved = join([b"\0" + join([sides[i] for i in order]) for sides in planes])
        config = {**raw["codec"], "k": [stages[i] for i in order]}
        with contextlib.suppress(CorruptChunkError):
            CODEC.decode(sealed({**raw, "codec": config}, [parts[0], moved, moved]))


def test_the_header_is_json_in_the_open():
    assert json.loads(GOOD[PREFIX.size : PREFIX.size + PREFIX.unpack_from(GOOD)[3]])["codec"]["id"] == "pipeline"
