"""CacheGen: the symbols of LMCache, the anchors and deltas of the paper, and bytes that nobody should trust."""

import contextlib
import json
import random

import numpy as np
import pytest
import torch
from fuzz_codecs import hostile_part, hostile_segment
from test_codecs import assert_same, make_chunk

from lmcache_blend.codecs import get_codec
from lmcache_blend.codecs.cachegen import CacheGen, fit
from lmcache_blend.codecs.cachegen_lmcache import TokenAbsmax, from_scales, to_scales
from lmcache_blend.codecs.cachegen_paper import LEVELS, THIRDS, AnchorDelta
from lmcache_blend.codecs.calibration import FitTarget
from lmcache_blend.codecs.pipeline import stack
from lmcache_blend.codecs.profile import Profile
from lmcache_blend.codecs.smallest import RansSmallest
from lmcache_blend.codecs.stages import EMPTY, NotCodable, Plane
from lmcache_blend.errors import ConfigError, CorruptChunkError
from lmcache_blend.types import KVChunk

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("lmcache", "paper")
# torch_quant_vectorized of LMCache 0.5.6 on golden_input() at 32 and 16 bins: symbols, and scales as float32.
GOLDEN = {
    torch.float32: (
        "0018110b051d16100a041b150f08011b140d07001a130c051e18110b051d16100a031b150f08011b140d070019130c05"
        "0e0b0805020d0a0704010d0a0704010c090603000c0905020e0b0805020d0a0704010d0a000000000000000000000000",
        "407ba0401f0e95404808a23bce86974067c39b407dff99408cf89c3b00000000",
    ),
    torch.bfloat16: (
        "0018110b051d16100a041b150f08011b140d07001a130c051e18110b051d16100a031b150f08011a140d070019130c05"
        "0e0b0805020d0a0704010d0a0704010c090603000c0905020e0b0805020d0a0704010d0a000000000000000000000000",
        "0000a040000095400000a23b0000984000009c4000009a4000009d3b00000000",
    ),
}


def golden_input() -> torch.Tensor:
    """[2, 4, 12] layers, tokens, channels: a small token in both layers, an empty one in the second."""
    x = ((torch.arange(96) * 7919 % 10007 - 5000) / 997).view(2, 4, 12)
    x[:, 2] *= 1e-3
    x[1, 3] = 0
    return x


def plane_of(channels: int, tokens: int, slot: str = "k", first: int = 0, layers: int = 3, profile=None) -> Plane:
    return Plane(slot, first, ((1, channels, 1, channels),), layers, tokens, np.arange(tokens), profile)


def naive_lmcache(x: torch.Tensor, bins: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[H, T, D] of any type -> symbols [T, H D], scales [T], decoded [H, T, D], one number after the other."""
    heads, tokens, dim = x.shape
    m = torch.tensor(float(bins // 2 - 1))
    q, scales, out = torch.zeros(tokens, heads * dim, dtype=torch.int64), torch.zeros(tokens), torch.zeros(x.shape)
    for t in range(tokens):
        scale = x[:, t].abs().max().float()
        scales[t] = scale
        factor = m / scale
        for c in range(heads * dim):
            value = torch.round(x[c // dim, t, c % dim].float() * factor + m)
            q[t, c] = 0 if value.isnan() else int(value)
            out[c // dim, t, c % dim] = (q[t, c] - m) / m * scale
    return q, scales, out.to(x.dtype)


def quantised(x: torch.Tensor, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """[H, T, D] -> our symbols [T, C] and scales [T]."""
    matrix = stack([x])
    q, side = TokenAbsmax(bins=bins).encode(matrix, plane_of(*matrix.shape))
    return q.T, from_scales(memoryview(side), x.shape[1])


def relative_error(a: KVChunk, b: KVChunk) -> float:
    pairs = [(x.float(), y.float()) for p, q in zip(a.layers, b.layers, strict=True) for x, y in zip(p, q, strict=True)]
    return float((sum((x - y).square().sum() for x, y in pairs) / sum(x.square().sum() for x, _ in pairs)) ** 0.5)


def drifting(layers=3, heads=2, tokens=300, dim=16, dtype=torch.bfloat16, seed=0) -> KVChunk:
    """Channels of different mean and size that change slowly from token to token, as K and V do."""
    g = torch.Generator().manual_seed(seed)

    def one() -> torch.Tensor:
        noise = torch.randn(heads, tokens, dim, generator=g)
        walk = torch.stack([noise[:, max(0, t - 7) : t + 1].sum(1) for t in range(tokens)], 1) / 3
        mean, size = torch.randn(heads, 1, dim, generator=g), torch.exp(torch.randn(heads, 1, dim, generator=g) / 2)
        return ((walk + mean) * size).to(dtype)

    return KVChunk(torch.arange(tokens), tuple((one(), one()) for _ in range(layers)))


class Calibrated:
    """Calibration of documents that are chunks."""

    def __init__(self, chunks: list[KVChunk]):
        self.chunks, self.lengths, self.ids = chunks, [len(c) for c in chunks], [c.tokens for c in chunks]
        shapes = tuple((k.shape[0], k.shape[2], v.shape[0], v.shape[2]) for k, v in chunks[0].layers)
        self.target, self.texts = FitTarget("toy", "f" * 64, shapes), frozenset({"a"})

    def kv(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = (
            torch.cat([c.layers[layer][slot].float().transpose(0, 1).flatten(1) for c in self.chunks])
            for slot in (0, 1)
        )
        return k, v

    def fisher(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError


# Mode lmcache


@pytest.mark.parametrize("dtype", GOLDEN, ids=str)
def test_symbols_and_scales_are_those_that_lmcache_gave(dtype):
    symbols, scales = GOLDEN[dtype]
    found = [quantised(x[None], bins) for x, bins in zip(golden_input().to(dtype), (32, 16), strict=True)]
    assert b"".join(q.astype("u1").tobytes() for q, _ in found).hex() == symbols
    assert b"".join(s.astype("<f4").tobytes() for _, s in found).hex() == scales


@pytest.mark.parametrize("bins", [4, 12, 16, 17, 32, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantiser_and_decoded_values_are_the_naive_formula_bit_for_bit(dtype, bins):
    g = torch.Generator().manual_seed(bins)
    x = torch.randn(2, 9, 5, generator=g)
    x[0, 1], x[:, 2], x[:, 3], x[1, 4, 0] = 0, 0, x[:, 3] * 1e-6, 1000
    x[:, 5] = 2.0 ** torch.randint(-5, 5, (2, 5), generator=g)
    x = x.to(dtype)
    q, scales, decoded = naive_lmcache(x, bins)
    mine, my_scales = quantised(x, bins)
    assert np.array_equal(mine, q.numpy())
    assert np.array_equal(my_scales, scales.numpy())
    codec = CacheGen(k_bins=bins, v_bins=bins)
    out = codec.decode(codec.encode(KVChunk(torch.arange(9), ((x, x),)))).layers[0]
    for y in out:
        assert torch.equal(y.contiguous().view(torch.uint8), decoded.contiguous().view(torch.uint8))


def test_a_scale_so_small_that_its_inverse_overflows_gives_symbol_0_as_in_lmcache():
    q, scales = quantised(torch.full((1, 1, 3), 1e-39), 32)
    assert (q == 0).all()
    assert scales[0] == np.float32(1e-39)


@pytest.mark.parametrize(
    ("settings", "layers", "k", "v"),
    [
        ({}, 30, [32] * 10 + [16] * 20, [32] * 2 + [16] * 28),
        ({}, 10, [32] * 10, [32] * 2 + [16] * 8),
        ({}, 9, [32] * 9, [32] * 9),
        ({"level": 1}, 32, [16] * 20 + [12] * 12, [16] * 2 + [12] * 30),
        ({"level": 3}, 32, [32] * 32, [32] * 32),
        ({"k_bins": 64, "v_bins": [[1, 128], [2, 64]]}, 3, [64] * 3, [128, 64, 64]),
        ({"k_bins": [8, 10, 12]}, 3, [8, 10, 12], [32] * 3),
    ],
)
def test_bins_per_layer(settings, layers, k, v):
    codec = CacheGen(**settings)
    assert codec.bins("k", layers) == tuple(k)
    assert codec.bins("v", layers) == tuple(v)


def test_scales_keep_every_bit_in_the_fewest_bytes():
    for values, size in (([1.5, 3e38, 0.0], 2), ([1 / 1024 + 1, 65504.0, 6e-8], 2), ([0.1, 1e30, 1.0], 4)):
        x = np.array(values, np.float16).astype(np.float32) if values[1] == 65504.0 else np.array(values, np.float32)
        x = torch.from_numpy(x).to(torch.bfloat16).float().numpy() if values[1] == 3e38 else x
        data = to_scales(x)
        assert len(data) == 1 + 3 * size
        assert np.array_equal(from_scales(memoryview(data), 3), x)


# Symbols to bytes


@pytest.mark.parametrize("tokens", [0, 1, 11, 300])
@pytest.mark.parametrize("top", [1, 3, 31, 255])
def test_rans_smallest_is_exact(tokens, top):
    rng = np.random.default_rng(top)
    x = rng.integers(0, top, (7, tokens)).astype(np.int16)
    x[0] = min(3, top - 1)
    _, data = RansSmallest().encode(x, plane_of(7, tokens))
    assert np.array_equal(RansSmallest().decode(EMPTY, memoryview(data), plane_of(7, tokens)), x)


def test_rans_smallest_takes_the_shorter_tables():
    rng = np.random.default_rng(0)
    peaked = np.rint(rng.laplace(100, 1.5, (20, 64))).astype(np.int16)
    two_peaks = rng.choice([0, 30], (20, 2000)).astype(np.int16)
    for x, kind in ((peaked, 0), (two_peaks, 1)):
        plane = plane_of(*x.shape)
        data = RansSmallest().encode(x, plane)[1]
        assert data[0] == kind
        assert np.array_equal(RansSmallest().decode(EMPTY, memoryview(data), plane), x)
    with pytest.raises(NotCodable):
        RansSmallest().encode(np.full((1, 1), 255, np.int16), plane_of(1, 1))


# Mode paper


def naive_paper(x: np.ndarray, group: int, factor: np.float32, deviation: np.ndarray) -> np.ndarray:
    """[C, T] -> decoded [C, T], one number after the other, all in float32."""
    out, f = np.zeros_like(x), np.float32
    for t in range(x.shape[1]):
        first = t - t % group
        scale = np.abs(x[:, first]).max()
        for c in range(len(x)):
            anchor = np.rint(x[c, first] * (f(127) / scale)) * (scale / f(127)) if scale else f(0)
            step = max(deviation[c] * factor, f(2.0**-100))
            out[c, t] = anchor if t == first else anchor + np.rint((x[c, t] - anchor) / step) * step
    return out


@pytest.mark.parametrize(("tokens", "group"), [(1, 10), (10, 10), (11, 10), (37, 4)])
@pytest.mark.parametrize(("layer", "level"), [(0, 1), (1, 2), (2, 3)])
def test_anchors_and_deltas_are_the_naive_formula(tokens, group, layer, level):
    x = stack([drifting(1, tokens=tokens, dim=6, dtype=torch.float32, seed=layer).layers[0][0]])
    x[:, :1] *= layer  # a zero anchor in the first layer
    stage, plane = AnchorDelta(level=level, group=group), plane_of(len(x), tokens, first=layer)
    _, side = stage.encode(x, plane)
    anchor = np.repeat(naive_paper(x, group, np.float32(1), np.ones(len(x), np.float32))[:, ::group], group, 1)
    deltas = (x - anchor[:, :tokens])[:, np.arange(tokens) % group != 0]
    deviation = np.sqrt(np.square(deltas, dtype=np.float64).mean(1)) if deltas.size else np.zeros(len(x))
    deviation = (deviation.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    wanted = naive_paper(x, group, np.float32(THIRDS[layer] * LEVELS[level]), deviation)
    assert np.abs(stage.decode(EMPTY, memoryview(side), plane) - wanted).max() <= 1e-5 * np.abs(x).max()


def test_error_of_a_delta_is_at_most_half_a_step():
    chunk = drifting(tokens=300, dtype=torch.float32)
    for level, factor in LEVELS.items():
        codec = CacheGen(mode="paper", level=level)
        out = codec.decode(codec.encode(chunk))
        for i, (k, _) in enumerate(chunk.layers):
            x, y = stack([k]), stack([out.layers[i][0]])
            rest = np.arange(300) % 10 != 0
            deltas = x[:, rest] - np.repeat(y[:, ::10], 10, 1)[:, rest]
            step = THIRDS[i] * factor * np.sqrt(np.square(deltas).mean(1, keepdims=True))
            assert (np.abs(x - y)[:, rest] <= 0.501 * step + 1e-6).all()
            assert (np.abs(x - y)[:, ::10] <= 0.501 / 127 * np.abs(x[:, ::10]).max(0)).all()


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    seen = []
    calibration = Calibrated([drifting(tokens=n, seed=9) for n in (700, 95, 1, 600)])
    profile = fit(calibration, progress=lambda done, of: seen.append((done, of)))
    path = tmp_path_factory.mktemp("profile") / "cachegen.safetensors"
    profile.save(path)
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert profile.texts == calibration.texts
    return str(path)


def test_a_profile_gives_integer_tables_that_make_chunks_of_its_kind_shorter(fitted):
    profile = Profile.load(fitted)
    for name, x in profile.tensors.items():
        if not name.endswith("deviation"):
            assert x.dtype == np.uint16
            assert (x.sum(1, dtype=np.int64) == 4096).all()
    chunk = drifting(tokens=64, seed=9)
    for level in LEVELS:
        alone, with_it = CacheGen(mode="paper", level=level), CacheGen(mode="paper", level=level, profile=fitted)
        data = with_it.encode(chunk)
        assert len(data) < len(alone.encode(chunk))
        assert relative_error(chunk, with_it.decode(data)) < 0.5


@pytest.mark.parametrize("tokens", [1, 2, 11, 300])
def test_a_profile_codes_chunks_of_any_length_and_size(fitted, tokens):
    codec = CacheGen(mode="paper", level=3, profile=fitted)
    chunk = drifting(tokens=tokens, seed=4)
    assert relative_error(chunk, codec.decode(codec.encode(chunk))) < 0.3
    large = KVChunk(chunk.tokens, tuple((k * 50, v * 50) for k, v in chunk.layers))  # all of it escapes
    assert relative_error(large, codec.decode(codec.encode(large))) < 0.3


def test_a_profile_of_layers_without_a_second_tensor(tmp_path):
    chunk = drifting(heads=1, tokens=60)
    chunk = KVChunk(chunk.tokens, tuple((k, v[:0, :, :0]) for k, v in chunk.layers))
    fit(Calibrated([chunk])).save(tmp_path / "profile")
    codec = CacheGen(mode="paper", level=3, profile=str(tmp_path / "profile"))
    assert relative_error(chunk, codec.decode(codec.encode(chunk))) < 0.3


def test_a_profile_of_something_else_is_refused(fitted, tmp_path):
    with pytest.raises(ConfigError, match=r"fitted at step = 1.0, not 0.5"):
        CacheGen(mode="paper", step=0.5, profile=fitted).encode(drifting())
    with pytest.raises(ConfigError, match="3 layers"):
        CacheGen(mode="paper", profile=fitted).encode(drifting(2))
    with pytest.raises(CorruptChunkError, match="profile"):
        CacheGen(mode="paper").decode(CacheGen(mode="paper", profile=fitted).encode(drifting(tokens=20)))
    profile = Profile.load(fitted)
    broken = {name: x + 1 if name == "k.1.anchor" else x for name, x in profile.tensors.items()}
    for codec, tensors, message in (("cachegen", broken, "k.1 are damaged"), ("kvtc", profile.tensors, "'kvtc'")):
        other = Profile(codec, "toy", profile.fingerprint, profile.shapes, tensors, profile.settings)
        other.save(tmp_path / codec)
        with pytest.raises(ConfigError, match=message):
            CacheGen(mode="paper", profile=str(tmp_path / codec)).encode(drifting())
    with pytest.raises(ConfigError, match="step = 0"):
        fit(Calibrated([drifting()]), step=0)


# Both


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 11, 300])
def test_round_trip_keeps_types_and_is_close(mode, dtype, tokens):
    codec = CacheGen(mode=mode, level=3)
    chunk = drifting(heads=1, tokens=tokens, dtype=dtype)
    out = codec.decode(codec.encode(chunk))
    assert torch.equal(out.tokens, chunk.tokens)
    assert all(a.dtype == dtype and a.shape == b.shape for p, q in zip(out.layers, chunk.layers) for a, b in zip(p, q))
    assert relative_error(chunk, out) < 0.3


@pytest.mark.parametrize("mode", MODES)
def test_latent_attention_shapes_and_layers_without_a_second_tensor(mode):
    codec = CacheGen(mode=mode)
    layer = torch.randn(1, 23, 64), torch.randn(1, 23, 16)
    chunk = KVChunk(torch.arange(23), (layer, layer, (layer[0], torch.zeros(0, 23, 0))))
    out = codec.decode(codec.encode(chunk))
    assert [tuple(x.shape) for pair in out.layers for x in pair] == [tuple(x.shape) for p in chunk.layers for x in p]
    assert relative_error(KVChunk(chunk.tokens, chunk.layers[:2]), KVChunk(out.tokens, out.layers[:2])) < 0.4


@pytest.mark.parametrize("mode", MODES)
def test_zero_tokens_zero_channels_and_an_outlier_channel(mode):
    chunk = drifting(dtype=torch.float32)
    for k, v in chunk.layers:
        k[:, 5], k[..., 3], v[:, 17:40], k[0, :, 0] = 0, 0, 0, k[0, :, 0] * 1000
    codec = CacheGen(mode=mode, sinks=4)
    out = codec.decode(codec.encode(chunk))
    assert all(x.isfinite().all() for pair in out.layers for x in pair)
    assert relative_error(chunk, out) < 0.4
    rest = [KVChunk(c.tokens, tuple((k[..., 1:], k[..., 1:]) for k, _ in c.layers)) for c in (chunk, out)]
    # The scale of all channels in lmcache; in paper that of anchors only, for deltas have a step per channel.
    low, high = (0.0, 0.6) if mode == "paper" else (0.9, 1.1)
    assert low < relative_error(*rest) < high
    nothing = KVChunk(torch.arange(30), ((torch.zeros(1, 30, 4), torch.zeros(1, 30, 4)),))
    assert_same(nothing, codec.decode(codec.encode(nothing)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_plane_with_numbers_that_cannot_be_coded_is_exact(mode, value):
    chunk = drifting(2, tokens=20, dtype=torch.float32)
    chunk.layers[1][0][0, 3, 1], chunk.layers[1][0][0, 4, 1] = value, -value
    out = CacheGen(mode=mode).decode(CacheGen(mode=mode).encode(chunk))
    if mode == "paper" or value != 3e38:
        mine, theirs = (c.layers[1][0].contiguous().view(torch.int32) for c in (chunk, out))
        assert torch.equal(mine, theirs)
    assert relative_error(*(KVChunk(c.tokens, c.layers[:1]) for c in (chunk, out))) < 0.5


@pytest.mark.parametrize("mode", MODES)
def test_a_higher_level_is_larger_and_closer(mode):
    chunk = drifting(12, tokens=256)
    sizes, errors = [], []
    for level in (1, 2, 3):
        codec = CacheGen(mode=mode, level=level)
        data = codec.encode(chunk)
        sizes.append(len(data))
        errors.append(relative_error(chunk, codec.decode(data)))
    assert sizes == sorted(set(sizes))
    assert errors == sorted(set(errors), reverse=True)


@pytest.mark.parametrize("mode", MODES)
def test_sinks_are_kept_and_a_chunk_of_nothing_else_too(mode):
    codec = CacheGen(mode=mode, sinks=4)
    for tokens in (2, 4, 5, 40):
        chunk = drifting(tokens=tokens, dtype=torch.float16)
        out = codec.decode(codec.encode(chunk))
        for a, b in zip(chunk.layers, out.layers, strict=True):
            assert torch.equal(a[0][:, :4], b[0][:, :4])
            assert torch.equal(a[1][:, :4], b[1][:, :4])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"level": 1, "sinks": 4},
        {"k_bins": [[2, 64], [1, 32]], "v_bins": 128},
        {"k_bins": [64, 64, 32], "v_bins": None},
        {"mode": "paper", "group": 5, "step": 0.25},
    ],
)
def test_config_round_trips_through_json_and_its_chunks_decode_with_any_codec_of_the_kind(settings):
    codec = CacheGen(**settings)
    assert get_codec(json.dumps(codec.get_config())) == codec
    data = codec.encode(make_chunk(layers=3))
    assert_same(get_codec("cachegen").decode(data), codec.decode(data))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"level": 4}, "level = 4"),
        ({"k_bins": 3}, "k_bins.*= 3"),
        ({"k_bins": [[30, 512]]}, "k_bins.*512"),
        ({"mode": "paper", "k_bins": 64}, "k_bins = 64 is a setting of mode 'lmcache'"),
        ({"group": 5}, "group = 5 is a setting of mode 'paper'"),
        ({"profile": "x"}, "profile = 'x' is a setting of mode 'paper'"),
        ({"mode": "paper", "step": 0}, "step = 0"),
        ({"mode": "paper", "group": 1}, "group = 1"),
        ({"mode": "paper", "group": 10**30}, "group = 1000000"),
    ],
)
def test_bad_settings_name_the_value(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        CacheGen(**settings)
    assert "\n" not in str(caught.value)


def test_bins_of_other_layers_than_the_chunk_has_are_refused():
    with pytest.raises(ConfigError, match="v_bins is for 2 layers, the chunk has 3; one number serves any"):
        CacheGen(v_bins=[16, 16]).encode(make_chunk(layers=3))


@pytest.mark.parametrize("case", [*MODES, "profile"])
def test_hostile_chunks_decode_or_are_corrupt(case, fitted):
    codec = CacheGen(mode="paper", profile=fitted) if case == "profile" else CacheGen(mode=case)
    chunks = [codec.encode(drifting(tokens=n)) for n in (13, 300)]
    rng, refused = random.Random(0), 0
    for i in range(400):
        damage = hostile_part if i % 2 else hostile_segment
        with contextlib.suppress(CorruptChunkError):
            codec.decode(damage(rng, chunks[i // 2 % 2]))
            continue
        refused += 1
    assert refused > 100
