"""Baseline codecs: scalar formats, KIVI, Hadamard, KVTC, zstd, lossless; bounds, naive forms, hostile bytes."""

import contextlib
import itertools
import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_blend.codecs import get_codec, kvtc
from lmcache_blend.codecs.allocation import COSTS, OPTIONS, allocate, group_errors
from lmcache_blend.codecs.calibration import FitTarget
from lmcache_blend.codecs.container import Container, pack
from lmcache_blend.codecs.grouped import pack as pack_bits
from lmcache_blend.codecs.grouped import unpack as unpack_bits
from lmcache_blend.codecs.hadamard import rotation
from lmcache_blend.codecs.profile import Profile
from lmcache_blend.errors import ConfigError, CorruptChunkError
from lmcache_blend.types import KVChunk

EPS = {torch.float32: 2e-7, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SHAPES = {"one head": (1, 64, 1, 64), "dim 80": (3, 80, 2, 80), "mla": (1, 96, 1, 64), "no second": (1, 64, 0, 0)}
# Root mean square of the error over that of K or V, where a group holds at least 37 normal values.
LOSSY = {
    "fp8": 0.03,
    "fp8 e5m2": 0.06,
    "int8": 0.01,
    "int4": 0.14,
    "int4 symmetric": 0.2,
    "kivi": 0.12,
    "hadamard": 0.13,
}
EXACT = ("zstd", "lossless")
SPECS = {"fp8 e5m2": {"id": "fp8", "format": "e5m2"}, "int4 symmetric": {"id": "int4", "symmetric": True}}


@cache
def _mix(shape, layers):
    """Per layer and slot, how a few hidden variables become K and V: strongly correlated dimensions."""
    g = torch.Generator().manual_seed(7)
    h, d, h2, d2 = shape
    fade = torch.exp(-torch.arange(24) / 4.0)[:, None]
    return [[torch.randn(24, n, generator=g) * fade for n in (h * d, h2 * d2)] for _ in range(layers)]


def kv(shape, layers, tokens, seed):
    """[T, H D] float32 of every layer and slot."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, 24, generator=g)
    out = [
        [hidden @ m + 0.3 + 0.02 * torch.randn(tokens, m.shape[1], generator=g) for m in p] for p in _mix(shape, layers)
    ]
    return [tuple(x) for x in out]


def make_chunk(shape=(3, 64, 3, 64), layers=2, tokens=37, dtype=torch.float32, seed=1):
    heads = (shape[0], shape[2])
    dims = (shape[1], shape[3])
    pairs = [
        [x.reshape(tokens, h, d).transpose(0, 1).to(dtype) for x, h, d in zip(p, heads, dims, strict=True)]
        for p in kv(shape, layers, tokens, seed)
    ]
    return KVChunk(torch.arange(tokens), tuple((k, v) for k, v in pairs), b"\7")


class Correlated:
    """Calibration data that look like `make_chunk`."""

    texts = frozenset({"a"})
    ids: Sequence[torch.Tensor] = ()

    def __init__(self, shape=(3, 64, 3, 64), layers=2, tokens=400):
        self.target = FitTarget("tiny", "f" * 64, (shape,) * layers)
        self.lengths: Sequence[int] = [tokens]
        self._kv = kv(shape, layers, tokens, seed=0)

    def kv(self, layer):
        return self._kv[layer]

    def fisher(self, layer):
        raise NotImplementedError


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """Path of a profile of the shape, by shape."""
    folder = tmp_path_factory.mktemp("profiles")

    def path(shape, **options):
        file = folder / f"{shape}{options}.safetensors"
        if not file.exists():
            kvtc.fit(Correlated(shape), **options).save(file)
        return str(file)

    return path


def codec_of(name, fitted, shape=(3, 64, 3, 64)) -> Any:
    if name == "kvtc":
        return get_codec({"id": "kvtc", "profile": fitted(shape), "bits": 3, "recent": 8})
    return get_codec(SPECS.get(name, name))


def planes(chunk):
    return [x for pair in chunk.layers for x in pair]


def relative_error(a, b):
    a, b = a.float(), b.float()
    return float((a - b).square().mean().sqrt() / a.square().mean().sqrt().clamp(min=1e-9))


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("tokens", [1, 37])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("name", [*LOSSY, *EXACT, "kvtc"])
def test_round_trip_of_every_shape_and_dtype(name, shape, tokens, dtype, fitted):
    chunk = make_chunk(shape, tokens=tokens, dtype=dtype)
    codec = codec_of(name, fitted, shape)
    data = codec.encode(chunk)
    out = codec.decode(data)
    assert torch.equal(out.tokens, chunk.tokens)
    assert out.exact_after == chunk.exact_after
    assert data == codec.encode(chunk)
    for a, b in zip(planes(chunk), planes(out), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if name in EXACT or a.numel() == 0:
            assert same_bits(a, b)
        else:
            assert relative_error(a, b) < {**LOSSY, "kvtc": 0.03}[name] + EPS[dtype]


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize(
    ("spec", "bits"), [({"id": "int8"}, 8), ({"id": "int4"}, 4), ({"id": "int4", "symmetric": True}, 4)], ids=str
)
def test_integers_are_off_by_half_a_step_of_their_own_row(spec, bits, axis):
    chunk = make_chunk()
    chunk.layers[0][0][1, :, 5] *= 1000.0
    chunk.layers[0][1][0, 3] *= 1000.0
    out = get_codec({**spec, "axis": axis}).decode(get_codec({**spec, "axis": axis}).encode(chunk))
    along = (1,) if axis == "channel" else (0, 2)
    for a, b in zip(planes(chunk), planes(out), strict=True):
        low, high = a.amin(along, keepdim=True), a.amax(along, keepdim=True)
        peak = a.abs().amax(along, keepdim=True)
        step = 2 * peak / (2**bits - 2) if spec.get("symmetric") else (high - low) / (2**bits - 1)
        assert ((a - b).abs() <= 0.501 * step + 2.0**-10 * peak).all()


@pytest.mark.parametrize(("form", "half", "smallest"), [("e4m3", 2**-4, 2**-10 / 448), ("e5m2", 2**-3, 2**-17 / 57344)])
def test_fp8_is_off_by_half_a_unit_in_the_last_place(form, half, smallest):
    chunk = make_chunk()
    chunk.layers[0][0][1, :, 5] *= 1000.0
    codec: Any = get_codec({"id": "fp8", "format": form, "axis": "channel"})
    for a, b in zip(planes(chunk), planes(codec.decode(codec.encode(chunk))), strict=True):
        peak = a.abs().amax(1, keepdim=True)
        assert ((a - b).abs() <= a.abs() * half + peak * (smallest + 2.0**-10)).all()


def naive_kivi(x, bits, group):
    """x [R, N], one group after another."""
    out = torch.empty_like(x)
    for row, start in itertools.product(range(x.shape[0]), range(0, x.shape[1], group)):
        part = x[row, start : start + group]
        zero = part.min().half().float()
        step = ((part.max() - part.min()) / (2**bits - 1)).half().float()
        q = ((part - zero) / step).round().clamp(0, 2**bits - 1)
        out[row, start : start + group] = q * step + zero
    return out


@pytest.mark.parametrize(("bits_k", "bits_v", "group"), [(2, 3, 8), (4, 8, 32), (3, 2, 100)])
def test_kivi_is_the_naive_one(bits_k, bits_v, group):
    chunk = make_chunk((2, 16, 2, 24), layers=1)
    codec: Any = get_codec({"id": "kivi", "bits_k": bits_k, "bits_v": bits_v, "group": group})
    ((k, v),), ((k2, v2),) = chunk.layers, codec.decode(codec.encode(chunk)).layers
    channels, tokens = k.transpose(1, 2).flatten(0, 1), v.transpose(0, 1).flatten(1)
    torch.testing.assert_close(k2.transpose(1, 2).flatten(0, 1), naive_kivi(channels, bits_k, group))
    torch.testing.assert_close(v2.transpose(0, 1).flatten(1), naive_kivi(tokens, bits_v, group))


def test_kivi_compresses_rotated_keys_and_keeps_first_and_recent_tokens():
    chunk = make_chunk(tokens=40, dtype=torch.float16)
    codec: Any = get_codec({"id": "kivi", "bits_k": 2, "bits_v": 2, "sinks": 4, "residual": 10})
    assert codec.keys == "post_rope"
    for a, b in zip(planes(chunk), planes(codec.decode(codec.encode(chunk))), strict=True):
        assert torch.equal(a[:, :4], b[:, :4])
        assert torch.equal(a[:, -10:], b[:, -10:])
        assert not torch.equal(a[:, 4:-10], b[:, 4:-10])


@pytest.mark.parametrize("name", [*LOSSY, *EXACT, "kvtc"])
@pytest.mark.parametrize("tokens", [1, 37])
def test_zeros_stay_zeros_and_a_plane_with_nan_or_infinity_is_exact(name, tokens, fitted):
    chunk = make_chunk(tokens=tokens)
    (k0, v0), (k1, v1) = chunk.layers
    k0[0, :, 3], v1[:] = 0.0, 0.0
    v0[1, 0, :3] = torch.tensor([float("nan"), float("inf"), -0.0])
    k1.view(torch.int32)[2, -1, 5] = 0x7FC12345
    codec = codec_of(name, fitted)
    (k0b, v0b), (k1b, v1b) = codec.decode(codec.encode(chunk)).layers
    assert same_bits(v0, v0b)
    assert same_bits(k1, k1b)
    if name not in ("hadamard", "kvtc"):  # transforms spread the error of other channels
        assert (k0b[0, :, 3] == 0).all()
    if name != "kvtc":
        assert (v1b == 0).all()
    assert relative_error(k0, k0b) < 0.2


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
@pytest.mark.parametrize("scale", [1e6, 1e37])
@pytest.mark.parametrize("name", [*LOSSY, *EXACT, "kvtc"])
def test_values_too_large_for_float16_are_kept_or_still_coded_well(name, scale, fitted):
    chunk = make_chunk()
    k = chunk.layers[0][0]
    k[:, 10:20] *= scale
    out = codec_of(name, fitted).decode(codec_of(name, fitted).encode(chunk))
    assert relative_error(k / scale, out.layers[0][0] / scale) < 0.2


def bits_per_element(codec, chunk):
    return len(codec.encode(chunk)) * 8 / sum(x.numel() for x in planes(chunk))


@pytest.mark.parametrize(
    ("spec", "nominal"),
    [
        ({"id": "fp8"}, 8 + 8 / 512 + 8 / 192),
        ({"id": "int8"}, 8 + 16 / 512 + 16 / 192),
        ({"id": "int8", "symmetric": True}, 8 + 8 / 512 + 8 / 192),
        ({"id": "int4"}, 4 + 16 / 512 + 16 / 192),
        ({"id": "kivi"}, 4.5),
        ({"id": "kivi", "bits_k": 2, "bits_v": 3, "group": 32}, 3.5),
        ({"id": "kivi", "sinks": 8, "residual": 64, "group": 16}, 6 + 10 * 72 / 512),
        ({"id": "hadamard", "step": 0.35, "sinks": 0}, 3.58 + 16 / 512),
        ({"id": "hadamard", "step": 0.7, "sinks": 0}, 2.58 + 16 / 512),
    ],
    ids=str,
)
def test_size_is_the_nominal_one(spec, nominal):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 2, 3, 512, 64, generator=g)
    chunk = KVChunk(torch.arange(512), tuple((k, v) for k, v in x))
    assert bits_per_element(get_codec(spec), chunk) == pytest.approx(nominal, abs=0.12)


@pytest.mark.parametrize(
    "spec",
    [
        *({"id": i} for i in ("fp8", "int8", "int4", "kivi", "hadamard", "zstd", "lossless", "kvtc")),
        {"id": "fp8", "format": "e5m2", "axis": "token"},
        {"id": "int4", "symmetric": True, "axis": "channel"},
        {"id": "kivi", "bits_k": 2, "bits_v": 8, "group": 32, "sinks": 4, "residual": 16},
        {"id": "zstd", "level": 9, "dtype": "float16"},
        {"id": "kvtc", "profile": "p.safetensors", "bits": 1.5, "recent": 0},
    ],
    ids=str,
)
def test_config_round_trips_through_json(spec):
    codec = get_codec(spec)
    assert get_codec(json.dumps(codec.get_config())) == codec
    assert spec.items() <= codec.get_config().items()


@pytest.mark.parametrize(
    "spec", [{"id": "kivi", "bits_k": 5}, {"id": "int4", "axis": "head"}, {"id": "kvtc", "bits": 0}]
)
def test_settings_out_of_range_are_refused(spec):
    with pytest.raises(ConfigError, match=f"{list(spec)[1]} = "):
        get_codec(spec)


@given(bits=st.integers(1, 24), rows=st.integers(0, 5), columns=st.integers(0, 40), seed=st.integers(0, 99))
def test_packed_integers_come_back(bits, rows, columns, seed):
    q = np.random.default_rng(seed).integers(0, 1 << bits, (rows, columns))
    data = pack_bits(q, bits)
    assert len(data) == -(-rows * columns * bits // 8)
    assert (unpack_bits(memoryview(data), bits, (rows, columns)) == q).all()


@pytest.mark.parametrize("dim", [1, 12, 64, 80, 128])
def test_the_rotation_is_orthonormal_and_reaches_every_coordinate(dim):
    matrix = rotation(dim, 0).astype(np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(dim), atol=1e-5)
    assert (np.abs(matrix).max(0) <= 2.01 * np.sqrt(1 / dim)).all()  # a channel's largest share of one coordinate
    signs = np.packbits(matrix[0, :12] < 0).tobytes().hex()
    assert dim < 12 or signs == "dbc0"  # part of the format


@settings(max_examples=40)
@given(
    dtype=st.sampled_from(list(EPS)),
    kind=st.sampled_from(["bits", "normal", "positive", "constant", "mixed"]),
    tokens=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_lossless_keeps_every_bit_pattern(dtype, kind, tokens, seed):
    g = torch.Generator().manual_seed(seed)
    word = torch.int32 if dtype.itemsize == 4 else torch.int16
    noise = torch.randint(torch.iinfo(word).min, torch.iinfo(word).max, (2, 3, tokens, 16), generator=g).to(word)
    x = torch.randn(2, 3, tokens, 16, generator=g).to(dtype)
    if kind == "bits":
        x = noise.view(dtype)
    elif kind == "positive":
        x = x.abs()
    elif kind == "constant":
        x = torch.full_like(x, -0.0)
    elif kind == "mixed":
        x[..., ::5] = noise.view(dtype)[..., ::5]
    chunk = KVChunk(torch.arange(tokens), ((x[0], x[1]),))
    for spec in EXACT:
        codec = get_codec(spec)
        data = codec.encode(chunk)
        assert len(data) < chunk.nbytes + 1000
        assert all(same_bits(a, b) for a, b in zip(planes(chunk), planes(codec.decode(data)), strict=True))


def test_lossless_saves_what_exponents_and_usual_signs_hold_no_information_in():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 512, 64, generator=g) * torch.exp(torch.randn(2, 4, 1, 64, generator=g))
    shifted = x + 3 * x.std(2, keepdim=True) * torch.sign(torch.randn(2, 4, 1, 64, generator=g))
    size = lambda x: bits_per_element(get_codec("lossless"), KVChunk(torch.arange(512), ((x[0], x[1]),)))  # noqa: E731
    assert size(x.bfloat16()) < 10.7
    assert size(x.half()) < 13.7
    assert size(x) < 26.7
    assert size(shifted.bfloat16()) < 9.2
    assert size(x.bfloat16().float()) == pytest.approx(size(x.bfloat16()), abs=0.01)


def test_zstd_casts_where_asked_and_not_beyond_float16():
    chunk = make_chunk(tokens=200)
    chunk.layers[1][0][0, 0, 0] = 1e6
    codec: Any = get_codec({"id": "zstd", "dtype": "float16"})
    out = planes(codec.decode(codec.encode(chunk)))
    assert bits_per_element(codec, chunk) < 0.8 * bits_per_element(get_codec("zstd"), chunk)
    for i, (a, b) in enumerate(zip(planes(chunk), out, strict=True)):
        assert torch.equal(a if i == 2 else a.half().float(), b)


@pytest.mark.parametrize("name", ["fp8", "int4", "int4 symmetric", "kivi", "hadamard", "kvtc", *EXACT])
def test_bytes_behind_a_valid_checksum_are_not_trusted(name, fitted):
    codec = codec_of(name, fitted)
    container = Container(codec.encode(make_chunk(tokens=20, dtype=torch.bfloat16)))
    segments = [bytes(container.segment(i)) for i in range(1, len(container.sizes))]
    rng = np.random.default_rng(0)
    for _ in range(150):
        bad = bytearray(segments[0])
        for _ in range(rng.integers(1, 4)):
            # Lengths and heads of parts are at the front: half of the changes go there.
            bad[rng.integers(0, rng.choice([40, len(bad)]))] = rng.integers(0, 256)
        if rng.random() < 0.2:
            del bad[rng.integers(0, len(bad)) :]
        with contextlib.suppress(CorruptChunkError):
            codec.decode(pack(container.header, container.tokens(), [bytes(bad), *segments[1:]]))


def test_allocation_is_the_best_of_all():
    sizes, costs = np.array([1, 1, 2, 2, 3]), np.array([0, 2, 1, 3, 2])
    rng = np.random.default_rng(0)
    for components, budget in itertools.product((1, 4, 7), (0, 1, 3, 5, 9, 30)):
        errors = rng.exponential(size=(5, components)) * sizes[:, None]
        errors[0] += 1
        for k, size in enumerate(sizes):
            errors[k, components - size + 1 :] = np.inf

        def value(options, errors=errors):
            starts = np.cumsum([0, *sizes[options][:-1]]) if len(options) else []
            return sum(errors[k, at] for k, at in zip(options, starts, strict=True))

        def mixes(left, budget):
            if left == 0:
                yield []
                return
            for k in range(5):
                if sizes[k] <= left and costs[k] <= budget:
                    yield from ([k, *more] for more in mixes(left - sizes[k], budget - costs[k]))

        found = allocate(errors, sizes, costs, budget)
        full = [*found, *[0] * (components - int(sizes[found].sum()))]
        assert costs[full].sum() <= budget
        assert value(full) == pytest.approx(min(value(m) for m in mixes(components, budget)))


def test_group_errors_are_those_of_the_quantiser():
    y = np.random.default_rng(0).standard_normal((20, 70)).astype(np.float32) * np.geomspace(
        9, 0.1, 70, dtype=np.float32
    )
    errors = group_errors(y)
    assert errors.shape == (len(OPTIONS), 70)
    for k, (size, bits) in enumerate(OPTIONS):
        assert np.isinf(errors[k, max(0, 71 - size) :]).all()
        if size in (16, 64):
            part = y[:, 3 : 3 + size]
            low, step = part.min(1)[:, None], (np.ptp(part, 1) / (2**bits - 1))[:, None]
            off = part - (np.rint((part - low) / step) * step + low)
            assert errors[k, 3] == pytest.approx(np.square(off).sum() / 20, rel=1e-3)


def test_kvtc_spends_fewer_bits_and_loses_more_as_its_budget_falls(fitted):
    chunk = make_chunk(tokens=164)
    rates, errors = [], []
    for bits in (0.25, 0.5, 1, 2, 4):
        codec: Any = get_codec({"id": "kvtc", "profile": fitted((3, 64, 3, 64)), "bits": bits, "recent": 32})
        out = codec.decode(codec.encode(chunk))
        for a, b in zip(planes(chunk), planes(out), strict=True):
            torch.testing.assert_close(a[:, :4], b[:, :4], atol=0, rtol=1e-3)
            torch.testing.assert_close(a[:, -32:], b[:, -32:], atol=0, rtol=1e-3)
        kept, segment = 16 * 36 * 384, len(Container(codec.encode(chunk)).segment(1)) * 8
        rates.append((segment - kept * 2) / (2 * 384 * 128))
        errors.append(np.mean([relative_error(a, b) for a, b in zip(planes(chunk), planes(out), strict=True)]))
        assert rates[-1] < bits + 0.05
    assert rates == sorted(rates)
    assert errors == sorted(errors, reverse=True)
    assert errors[2] < 0.05


def test_kvtc_says_how_to_get_a_profile_and_refuses_others(fitted, tmp_path):
    with pytest.raises(ConfigError, match="lmcache-blend codec fit --codec kvtc"):
        get_codec("kvtc").encode(make_chunk())
    path = fitted((3, 64, 3, 64))
    codec: Any = get_codec({"id": "kvtc", "profile": path})
    with pytest.raises(ConfigError, match="fit one for this model"):
        codec.encode(make_chunk((2, 64, 2, 64)))
    other = get_codec({"id": "kvtc", "profile": fitted((3, 64, 3, 64), rank=9)})
    with pytest.raises(CorruptChunkError, match="was coded with profile"):
        other.decode(codec.encode(make_chunk()))
    Profile("fisher", "m", "f", ((1, 1, 1, 1),), {}).save(tmp_path / "f")
    with pytest.raises(ConfigError, match="fitted for codec 'fisher'"):
        get_codec({"id": "kvtc", "profile": str(tmp_path / "f")}).encode(make_chunk())


def test_kvtc_fits_runs_of_layers(fitted):
    assert kvtc.fit(Correlated()).tensors["k0.basis"].shape == (200, 384)
    seen = []
    profile = kvtc.fit(Correlated(layers=3), layers=2, rank=10, progress=lambda *done: seen.append(done))
    assert seen == [(2, 3), (3, 3)]
    assert {n: x.shape for n, x in profile.tensors.items() if "basis" in n} == {
        "k0.basis": (10, 384),
        "k1.basis": (10, 192),
        "v0.basis": (10, 384),
        "v1.basis": (10, 192),
    }
    basis = profile.tensors["k0.basis"].astype(np.float32)
    np.testing.assert_allclose(basis @ basis.T, np.eye(10), atol=2e-3)
    with pytest.raises(ConfigError, match="layers = 4 of 3"):
        kvtc.fit(Correlated(layers=3), layers=4)
    codec: Any = get_codec({"id": "kvtc", "profile": fitted((3, 64, 3, 64), layers=1), "recent": 0})
    chunk = make_chunk()
    data = codec.encode(chunk)
    assert Container(data).header.groups == (1, 1)
    assert torch.equal(codec.decode_layers(data, 1)[0][0], codec.decode(data).layers[1][0])


@pytest.mark.parametrize(("layers", "heads", "run"), [(30, 3, 30), (32, 8, 4), (7, 8, 1), (24, 2, 24), (2, 64, 1)])
def test_kvtc_default_run_of_layers(layers, heads, run):
    assert kvtc._default_layers(((heads, 128 if heads == 8 else 64, heads, 64),) * layers) == run


def test_kvtc_groups_cost_what_they_take():
    for (size, bits), cost in zip(OPTIONS[2:], COSTS[2:], strict=True):
        assert cost * 16 == size * bits + 32
