"""The format of stored values: round trips whole and group by group; damage is CorruptChunkError and nothing else."""

import json
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmcache_blend.codecs import get_codec
from lmcache_blend.engine import values
from lmcache_blend.errors import ConfigError, CorruptChunkError
from lmcache_blend.testing import CodecConformance
from lmcache_blend.testing import same_bits as same

KEY = bytes(range(32))
SHAPES = {
    "heads": ((2, 8, 2, 8),) * 3,
    "layers that differ": ((3, 4, 3, 6), (1, 8, 1, 8)),
    "latent": ((1, 6, 0, 0),) * 2,
}
CODECS = [None, "raw", "lossless", "int8", "cachegen", "zstd"]


def chunk(shapes="heads", tokens=37, dtype=torch.bfloat16):
    return CodecConformance().chunk(SHAPES[shapes], tokens, dtype)


def stored(item, codec=None):
    coder = None if codec is None else get_codec(codec)
    return b"".join(values.encode(KEY, item, coder)), coder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("codec", CODECS)
def test_chunks_come_back_whole_and_group_by_group(codec, shapes, dtype):
    for tokens in (1, 37):
        item = chunk(shapes, tokens, dtype)
        data, coder = stored(item, codec)
        view = memoryview(data)
        assert values.head_bytes(view[:56]) <= len(data)
        head = values.parse(view, KEY, len(data))
        out = head.chunk(view, coder)
        wanted = item if coder is None else coder.decode(coder.encode(item))
        assert torch.equal(out.tokens, item.tokens)
        assert out.exact_after == item.exact_after
        assert same(out, wanted)
        # Layer by layer: only what was read is there.
        partial = bytearray(b"\xaa" * len(data))
        partial[: head.first_bytes] = data[: head.first_bytes]
        layers = []
        for g in range(len(head.meta.groups)):
            start, end = head.span(g)
            partial[start:end] = data[start:end]
            if g == 0:
                partial[head.span(len(head.meta.groups) - 1)[0] :] = data[head.span(len(head.meta.groups) - 1)[0] :]
            layers += head.group(memoryview(partial), g, coder)
        assert same(replace(item, layers=tuple(layers)), wanted)


def test_raw_layers_are_views_and_aligned():
    data, _ = stored(chunk())
    head = values.parse(memoryview(data), KEY, len(data))
    assert all(start % values.ALIGN == 0 for start, *_ in head.table[1:])
    buffer = np.frombuffer(bytearray(data), np.uint8)
    out = head.chunk(memoryview(buffer), None)
    base = buffer.ctypes.data
    assert all(base <= x.data_ptr() < base + len(data) for pair in out.layers for x in pair)


@pytest.mark.parametrize("strided", [False, True])
def test_a_value_filled_in_place(strided):
    item = chunk()
    if strided:
        item = replace(item, layers=tuple((k.mT.contiguous().mT, v) for k, v in item.layers))
    blank = values.Blank.of(KEY, item)
    slot = np.full(blank.nbytes, 0xAA, np.uint8)
    blank.fill(slot, item.layers)
    head = values.parse(memoryview(slot), KEY, blank.nbytes)
    assert not head.meta.checked
    assert same(head.chunk(memoryview(slot), None), item)


def arrive(data, step):
    """The head of a value that is read as far as step(what is asked for) each time."""
    arriving, there = values.Incoming(KEY, memoryview(data)), 0
    while there < len(data):
        wanted = arriving.reached(there)
        assert there < wanted <= len(data)
        there = min(max(step(wanted), there + 1), len(data))
    return arriving.whole()


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(CODECS), st.integers(1, 60_000), st.randoms())
def test_a_value_is_checked_however_it_arrives(codec, most, random):
    item = chunk(tokens=300)
    data, coder = stored(item, codec)
    wanted = item if coder is None else coder.decode(coder.encode(item))
    for step in (lambda wanted: wanted, lambda wanted: wanted - random.randrange(most)):
        assert same(arrive(data, step).chunk(memoryview(data), coder), wanted)
        bad = bytearray(data)
        bad[-2] ^= 1
        with pytest.raises(CorruptChunkError):
            arrive(bad, step)
    # Begun anew, as after a fault of the tier: nothing of the first time counts.
    buffer = bytearray(data)
    arriving = values.Incoming(KEY, memoryview(buffer))
    arriving.reached(len(data))
    buffer[-2] ^= 1
    arriving.reached(0)
    with pytest.raises(CorruptChunkError):
        arriving.whole()


@pytest.mark.parametrize("codec", CODECS)
def test_every_flipped_bit_and_every_cut_is_found(codec):
    item = chunk(tokens=5)
    data, coder = stored(item, codec)
    wanted = values.parse(memoryview(data), KEY, len(data)).chunk(memoryview(data), coder)

    def read(bad):
        return arrive(bad, lambda wanted: wanted).chunk(memoryview(bad), coder)

    for at in range(0, len(data), max(1, len(data) // 400)):
        bad = bytearray(data)
        bad[at] ^= 1 << at % 8
        with suppress(CorruptChunkError):
            assert same(read(bytes(bad)), wanted), "only padding may change without notice"
    for size in range(0, len(data), max(1, len(data) // 100)):
        with pytest.raises(CorruptChunkError):
            read(data[:size])
    for more in (b"\0", data):
        with pytest.raises(CorruptChunkError):
            read(data + more)


def test_another_keys_value_is_corrupt():
    data, _ = stored(chunk())
    with pytest.raises(CorruptChunkError, match="another key"):
        values.parse(memoryview(data), bytes(32), len(data))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.binary(max_size=400))
def test_any_bytes_are_corrupt(data):
    for start in (b"", values.MAGIC + KEY, values.PREFIX.pack(values.MAGIC, KEY, len(data), 40, 2)):
        with pytest.raises(CorruptChunkError):
            values.parse(memoryview(start + data), KEY, len(start + data))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = ["tokens", "layers", "groups", "codec", "exact_after", "checked"]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FIELDS), JSON, st.sampled_from([None, "int8"]))
def test_hostile_heads_with_valid_checksums(field, value, codec):
    """Whoever can write to a tier can also compute a checksum."""
    data, coder = stored(chunk(tokens=3), codec)
    _, _, total, meta_bytes, rows = values.PREFIX.unpack_from(data)
    end = values.head_bytes(memoryview(data))
    meta = json.loads(data[end - values.DIGEST - meta_bytes : end - values.DIGEST])
    meta[field] = value
    text = json.dumps(meta).encode()
    table = data[values.PREFIX.size : values.PREFIX.size + rows * values.ROW.size]
    start = values.PREFIX.pack(values.MAGIC, KEY, total, len(text), rows) + table + text
    bad = (start + xxhash.xxh3_128_digest(start) + data[end:])[:total].ljust(total, b"\0")
    with suppress(CorruptChunkError):
        values.parse(memoryview(bad), KEY, len(bad)).chunk(memoryview(bad), coder)


def test_what_cannot_be_stored_is_refused():
    item = chunk()
    k, v = item.layers[0]
    for bad in (
        replace(item, layers=((k.double(), v),)),
        replace(item, layers=((k[:, :-1], v),)),
        replace(item, tokens=item.tokens - 60_000),
    ):
        with pytest.raises(ConfigError):
            values.encode(KEY, bad)


def test_a_chunk_of_raw_views_can_be_saved_and_loaded(tmp_path):
    item = chunk()
    data, _ = stored(item)
    out = values.parse(memoryview(data), KEY, len(data)).chunk(memoryview(bytearray(data)), None)
    torch.save(out, tmp_path / "chunk.pt")
    again = torch.load(tmp_path / "chunk.pt", weights_only=False)
    assert type(again.layers) is tuple
    assert same(again, item)
    assert same(replace(out, layers=out.layers[:]), item)
