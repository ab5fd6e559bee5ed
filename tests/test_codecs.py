"""Codecs: ids and JSON configs find them; the raw codec gives back what it got or refuses the bytes."""

import contextlib
import hashlib
import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from lmcache_blend.codecs import Codec, codecs, get_codec, register_codec
from lmcache_blend.codecs.raw import HEADER_BYTES, MAGIC
from lmcache_blend.codecs.threads import one_thread, one_thread_meanwhile
from lmcache_blend.errors import ConfigError, CorruptChunkError, DuplicateNameError, UnknownNameError
from lmcache_blend.types import KVChunk

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make_chunk(layers=2, heads=3, tokens=5, k_dim=4, v_dim=6, dtype=torch.float32, exact_after=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 50_000, (tokens,), generator=g)
    k = torch.randn(layers, heads, tokens, k_dim, generator=g).to(dtype)
    v = torch.randn(layers, heads, tokens, v_dim, generator=g).to(dtype)
    return KVChunk(ids, tuple(zip(k, v, strict=True)), exact_after)


def assert_same(a: KVChunk, b: KVChunk) -> None:
    assert torch.equal(a.tokens, b.tokens)
    assert a.exact_after == b.exact_after
    assert len(a.layers) == len(b.layers)
    for (ka, va), (kb, vb) in zip(a.layers, b.layers, strict=True):
        assert ka.dtype == kb.dtype
        assert va.dtype == vb.dtype
        assert torch.equal(ka, kb)
        assert torch.equal(va, vb)


@given(
    layers=st.integers(0, 4),
    heads=st.integers(1, 4),
    tokens=st.integers(1, 33),
    k_dim=st.integers(1, 9),
    v_dim=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    exact_after=st.none() | st.binary(max_size=40),
    seed=st.integers(0, 99),
)
def test_raw_round_trip_is_exact(layers, heads, tokens, k_dim, v_dim, dtype, exact_after, seed):
    chunk = make_chunk(layers, heads, tokens, k_dim, v_dim, dtype, exact_after, seed)
    assert_same(chunk, get_codec("raw").decode(get_codec("raw").encode(chunk)))


def test_raw_takes_views_of_one_allocation_and_special_values():
    both = torch.randn(5, 2, 8).transpose(0, 1)
    both[0, 0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    chunk = KVChunk(torch.arange(5), ((both[..., :4], both[..., 4:]), (both, both)))
    out = get_codec("raw").decode(get_codec("raw").encode(chunk))
    for mine, theirs in zip(chunk.layers, out.layers, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a.contiguous().view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_raw_dtype_casts_and_costs_what_it_says(dtype):
    chunk = make_chunk(layers=2, tokens=64, k_dim=64, v_dim=64)
    codec = get_codec({"id": "raw", "dtype": str(dtype).removeprefix("torch.")})
    data = codec.encode(chunk)
    expected = KVChunk(chunk.tokens, tuple((k.to(dtype), v.to(dtype)) for k, v in chunk.layers))
    assert_same(expected, codec.decode(data))
    assert expected.nbytes < len(data) < expected.nbytes + 2_000


def test_float16_refuses_values_that_it_cannot_hold():
    chunk = KVChunk(torch.arange(1), ((torch.full((1, 1, 1), 7e4), torch.zeros(1, 1, 1)),))
    with pytest.raises(ConfigError, match=r"7e\+04.*65504.*bfloat16"):
        get_codec({"id": "raw", "dtype": "float16"}).encode(chunk)
    get_codec({"id": "raw", "dtype": "bfloat16"}).encode(chunk)


@given(data=st.data())
def test_changed_bytes_are_corrupt(data):
    good = get_codec("raw").encode(make_chunk())
    at = data.draw(st.integers(0, len(good) - 1))
    flip = data.draw(st.integers(1, 255))
    bad = good[:at] + bytes([good[at] ^ flip]) + good[at + 1 :]
    with pytest.raises(CorruptChunkError):
        get_codec("raw").decode(bad)


@given(data=st.data())
def test_truncated_extended_and_random_bytes_are_corrupt(data):
    good = get_codec("raw").encode(make_chunk())
    bad = data.draw(
        st.integers(0, len(good) - 1).map(lambda n: good[:n])
        | st.binary(min_size=1, max_size=9).map(lambda more: good + more)
        | st.binary(max_size=99)
        | st.binary(max_size=99).map(lambda tail: MAGIC + tail)
    )
    with pytest.raises(CorruptChunkError):
        get_codec("raw").decode(bad)


def sealed(body: bytes) -> bytes:
    """A body under a checksum that holds, as a hostile writer would make it."""
    return MAGIC + hashlib.sha256(body).digest() + body


@given(data=st.data())
def test_a_valid_checksum_does_not_make_a_valid_chunk(data):
    body = get_codec("raw").encode(make_chunk())[HEADER_BYTES:]
    at = data.draw(st.integers(0, 600))
    changed = body[:at] + data.draw(st.binary(min_size=1, max_size=8)) + body[at + 4 :]
    # A change that hits nothing but numbers decodes; every other one must be refused in this way.
    with contextlib.suppress(CorruptChunkError):
        get_codec("raw").decode(sealed(changed))


T = torch.zeros(2, dtype=torch.long)
X = torch.zeros(1, 2, 3)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"k0": X, "v0": X},
        {"tokens": T.float(), "k0": X, "v0": X},
        {"tokens": T[None], "k0": X, "v0": X},
        {"tokens": T, "k0": X},
        {"tokens": T, "k0": X, "v1": X},
        {"tokens": T, "k1": X, "v1": X},
        {"tokens": T, "k0": X, "v0": X, "extra": X},
        {"tokens": T, "k0": X, "v0": X[0]},
        {"tokens": T, "k0": X, "v0": X.long()},
        {"tokens": T, "k0": X, "v0": X[:, :1]},
        {"tokens": T, "k0": X, "v0": X, "exact_after": X},
    ],
    ids=lambda tensors: ",".join(f"{name}{list(x.shape)}" for name, x in tensors.items()) or "nothing",
)
def test_tensors_that_are_no_chunk_are_corrupt(tensors):
    body = save({name: x.clone() for name, x in tensors.items()})
    with pytest.raises(CorruptChunkError, match="malformed"):
        get_codec("raw").decode(sealed(body))


def test_config_round_trips_through_json():
    for spec in ("raw", {"id": "raw"}, '{"id": "raw", "dtype": "float16"}'):
        codec = get_codec(spec)
        assert isinstance(codec, Codec)
        assert get_codec(codec.get_config()) == codec


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("rww", UnknownNameError, "unknown codec 'rww': did you mean 'raw'"),
        ({"id": "raw", "dtpe": "float16"}, ConfigError, "unknown setting 'dtpe': did you mean 'dtype'"),
        ({"id": "raw", "dtype": "int8"}, ConfigError, "dtype = 'int8'.*float32"),
        ({"dtype": "float16"}, ConfigError, 'no "id"; known ids:.*raw'),
        ({"id": 3}, ConfigError, 'no "id"'),
        ('{"id": "raw"', ConfigError, "is not JSON"),
        ('["raw"]', ConfigError, "not a JSON object"),
    ],
)
def test_bad_specs_name_the_value_and_the_remedy(spec, error, message):
    with pytest.raises(error, match=message) as caught:
        get_codec(spec)
    assert "\n" not in str(caught.value)


def test_a_third_party_codec_is_found_by_its_config(monkeypatch):
    monkeypatch.setattr(codecs, "_items", dict(codecs._items))

    @register_codec("half")
    @dataclass(frozen=True)
    class Half:
        scale: float = 1.0

        def encode(self, chunk: KVChunk) -> bytes:
            return get_codec({"id": "raw", "dtype": "float16"}).encode(chunk)

        def decode(self, data: bytes) -> KVChunk:
            return get_codec("raw").decode(data)

        def get_config(self) -> dict[str, Any]:
            return {"id": "half", "scale": self.scale}

    assert get_codec({"id": "half", "scale": 2.0}) == Half(2.0)
    assert "half" in codecs
    with pytest.raises(ConfigError, match=r"'half' refuses.*sclae"):
        get_codec({"id": "half", "sclae": 2.0})
    with pytest.raises(DuplicateNameError, match="'raw' is already registered"):
        register_codec("raw")(Half)


def test_a_worker_with_one_thread_leaves_later_threads_theirs(monkeypatch):
    before, seen = torch.get_num_threads(), []

    def see():
        seen.append(torch.get_num_threads())

    def work():
        with one_thread_meanwhile():
            see()
        see()
        one_thread()
        see()

    torch.set_num_threads(3)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)  # as vLLM does on CPU
    try:
        for target in (work, see):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
        assert [*seen, torch.get_num_threads()] == [1, 3, 1, 3, 3]
    finally:
        monkeypatch.undo()
        torch.set_num_threads(before)
