"""Files that are read and written together with their checksums, in one call."""

import os

import numpy as np
import pytest
import torch
import xxhash

from lmcache_blend.engine import checked_io, values
from lmcache_blend.engine.tiers import make_tier
from lmcache_blend.types import KVChunk

KEY = b"k" * 32
NOISE = np.random.default_rng(0).integers(0, 256, 3 * checked_io.BLOCK + 77, np.uint8)


def test_it_works_on_this_machine():
    assert checked_io.AVAILABLE  # xxhash's own wheels give their C functions to others


@pytest.fixture
def file(tmp_path):
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


@pytest.mark.parametrize("sizes", [[0], [1], [NOISE.size], [5, 0, checked_io.BLOCK, 7, NOISE.size - 999], [1] * 2500])
def test_pieces_are_written_and_hashed(file, sizes):
    pieces, expected, parts = [], b"", []
    for i, size in enumerate(sizes):
        pieces += (-1, NOISE.ctypes.data, i % 3), (i, NOISE.ctypes.data + i % 100, size)
        expected += NOISE[: i % 3].tobytes() + NOISE[i % 100 : i % 100 + size].tobytes()
        parts.append(NOISE[i % 100 : i % 100 + size].tobytes())
    digests = checked_io.write(file, len(sizes), np.array(pieces, np.int64))
    assert digests == [xxhash.xxh3_128_digest(part) for part in parts]
    assert os.pread(file, len(expected) + 1, 0) == expected


def test_several_pieces_make_one_segment(file):
    at, cut = NOISE.ctypes.data, 300_001
    pieces = [(0, at, cut), (0, at + cut, NOISE.size - cut)]
    assert checked_io.write(file, 1, np.array(pieces, np.int64)) == [xxhash.xxh3_128_digest(NOISE.data)]


def test_a_full_disk_is_told():
    fd = os.open("/dev/full", os.O_WRONLY)
    try:
        assert checked_io.write(fd, 1, np.array([(0, NOISE.ctypes.data, 100)], np.int64)) is None
    finally:
        os.close(fd)


@pytest.mark.parametrize("there", [0, 10, 70_000, NOISE.size])
def test_spans_are_read_and_hashed(file, there):
    os.pwrite(file, NOISE.data, 0)
    spans = np.array([(0, 60_000), (60_000, 60_000), (60_017, NOISE.size)], np.int64)
    target = np.zeros(NOISE.size, np.uint8)
    target[:there] = NOISE[:there]
    end, digests = checked_io.read(file, target.ctypes.data, there, spans)
    assert end == NOISE.size
    assert (target == NOISE).all()
    assert digests == [xxhash.xxh3_128_digest(NOISE[a:b].data) for a, b in spans]


def test_a_short_file_ends_where_it_ends(file):
    os.pwrite(file, NOISE[:100_000].data, 0)
    target = np.zeros(NOISE.size, np.uint8)
    end, _ = checked_io.read(file, target.ctypes.data, 50, np.array([(50, NOISE.size)], np.int64))
    assert end == 100_000
    assert not target[100_000:].any()


def chunk(tokens: int, layers: int, widths: tuple[int, int]) -> KVChunk:
    pairs = tuple(tuple(torch.randn(2, tokens, w) for w in widths) for _ in range(layers))
    return KVChunk(torch.arange(tokens), pairs)  # pyright: ignore[reportArgumentType]


CHUNKS = [chunk(256, 3, (64, 64)), chunk(5, 3, (7, 3)), chunk(4, 0, (1, 1)), chunk(40_000, 2, (4, 4))]


@pytest.mark.parametrize("available", [True, False])
@pytest.mark.parametrize("item", CHUNKS)
def test_a_file_is_the_same_however_it_is_written(tmp_path, monkeypatch, item, available):
    expected = b"".join(bytes(part) for part in values.encode(KEY, item))
    monkeypatch.setattr(checked_io, "AVAILABLE", available)
    tier = make_tier("disk", path=tmp_path)
    assert tier.put([KEY], [values.encode(KEY, item)]) == [len(expected)]
    buffer = memoryview(bytearray(len(expected)))
    assert tier.get([KEY], [buffer]) == [len(expected)]
    assert bytes(buffer) == expected


@pytest.mark.parametrize("available", [True, False])
def test_damage_anywhere_is_found_and_a_cut_file_too(tmp_path, monkeypatch, available):
    monkeypatch.setattr(checked_io, "AVAILABLE", available)
    tier, item = make_tier("disk", path=tmp_path), CHUNKS[0]
    (size,) = tier.put([KEY], [values.encode(KEY, item)])
    (path,) = tmp_path.glob(f"chunks/*/{KEY.hex()}")
    good = path.read_bytes()
    assert isinstance(size, int)

    def read() -> KVChunk:
        buffer = memoryview(bytearray(size))
        arriving = values.Incoming(KEY, buffer)
        (out,) = tier.get_stepwise([KEY], [buffer], [arriving])  # pyright: ignore[reportAttributeAccessIssue]
        if out != size:
            raise values.CorruptChunkError(str(out))
        return arriving.whole().chunk(buffer, None)

    for (k, v), (k2, v2) in zip(read().layers, item.layers, strict=True):
        assert torch.equal(k, k2)
        assert torch.equal(v, v2)
    head = values.parse(memoryview(good), KEY, size)
    inside = [at for start, nbytes, _ in head.table for at in (start, start + nbytes // 2, start + nbytes - 1)]
    for at in [0, 20, 60, *inside]:
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises(values.CorruptChunkError):
            read()
    for end in (0, 100, inside[4], size - 1):
        path.write_bytes(good[:end])
        with pytest.raises(values.CorruptChunkError):
            read()
