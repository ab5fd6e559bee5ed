"""fisher_klt and fisher_diagonal: fitted profiles round-trip, follow their budgets, and refuse what is not theirs."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import torch

from lmcache_blend.codecs import FisherDiagonal, FisherKLT, Profile, get_codec, products
from lmcache_blend.codecs.calibration import FitTarget
from lmcache_blend.codecs.fisher_fit import FitConfig, fit
from lmcache_blend.errors import ConfigError, CorruptChunkError
from lmcache_blend.types import KVChunk

SHAPES = ((2, 8, 2, 8), (2, 8, 2, 8), (1, 12, 1, 4))
CURVE = [{"step": s, "bits": b, "kl": k} for s, b, k in ((0.5, 3.0, 0.001), (1.0, 2.0, 0.004), (2.0, 1.2, 0.016))]


class Synthetic:
    """KV that a token's id explains in part, low in rank, with a few tokens that matter more."""

    def __init__(self, tokens=1500, seed=0):
        g = torch.Generator().manual_seed(seed)
        embedding = torch.randn(50, 16, generator=torch.Generator().manual_seed(9))
        self.target = FitTarget("synthetic", "f" * 64, SHAPES, embedding.numpy())
        whole = torch.randint(0, 50, (tokens + 4,), generator=g)
        self.ids, self.lengths, self.texts = [whole], [tokens], frozenset({"text"})
        hidden = torch.randn(tokens, 6, generator=g)
        self._kv, weights = [], torch.Generator().manual_seed(5)
        for h, d, h2, d2 in SHAPES:
            pair = []
            for width in (h * d, h2 * d2):
                token = embedding[whole[4:]] @ torch.randn(16, width, generator=weights) / 4
                rest = hidden @ torch.randn(6, width, generator=weights) / 2
                pair.append(3 + token + rest + 0.1 * torch.randn(tokens, width, generator=g))
            self._kv.append(tuple(pair))

    def kv(self, layer):
        return self._kv[layer]

    def fisher(self, layer):
        h, d, h2, d2 = SHAPES[layer]
        return torch.eye(d).repeat(h, 1, 1), 2 * torch.eye(d2).repeat(h2, 1, 1)

    def energy(self, layer):
        return 1 + 30 * (self._kv[layer][0][:, 0] > 4).float()

    def chunk(self, tokens=None, dtype=torch.float32):
        n = self.lengths[0] if tokens is None else tokens
        layers = tuple(
            tuple(
                x[:n].T.unflatten(0, shape).transpose(1, 2).to(dtype)
                for x, shape in zip(pair, (s[:2], s[2:]), strict=True)
            )
            for pair, s in zip(self._kv, SHAPES, strict=True)
        )
        return KVChunk(self.ids[0][4:][:n], layers)


@pytest.fixture(scope="module", params=["klt", "klt2", "diagonal"])
def path(request, tmp_path_factory):
    options = FitConfig(token_rank=8, group=2 if request.param == "klt2" else 1)
    profile = fit(Synthetic(), options, diagonal=request.param == "diagonal")
    profile = dataclasses.replace(profile, settings={**profile.settings, "curve": CURVE})
    file = tmp_path_factory.mktemp("profiles") / request.param
    profile.save(file)
    return file


def codec_of(path, **settings):
    return get_codec({"id": Profile.load(path).codec, "profile": str(path), **settings})


def error(a: KVChunk, b: KVChunk) -> float:
    pairs = [(x, y) for p, q in zip(a.layers, b.layers, strict=True) for x, y in zip(p, q, strict=True)]
    num = sum(float((x.float() - y.float()).square().sum()) for x, y in pairs)
    return (num / sum(float(x.float().square().sum()) for x, _ in pairs)) ** 0.5


def test_finer_steps_cost_more_and_err_less(path):
    chunk = Synthetic(600, seed=3).chunk()
    sizes, errors = [], []
    for step in (0.1, 0.5, 2.0):
        data = codec_of(path, step=step).encode(chunk)
        sizes.append(len(data))
        errors.append(error(chunk, codec_of(path, step=step).decode(data)))
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)
    assert errors[0] < 0.02
    assert errors[-1] < 0.3


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 37, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_length_and_type_comes_back(path, tokens, dtype):
    chunk = Synthetic(400, seed=4).chunk(tokens, dtype)
    codec = codec_of(path, step=0.2)
    data = codec.encode(chunk)
    out = codec.decode(data)
    assert torch.equal(out.tokens, chunk.tokens)
    pairs = [(x, y) for p, q in zip(out.layers, chunk.layers, strict=True) for x, y in zip(p, q, strict=True)]
    assert all(x.dtype == dtype and x.shape == y.shape for x, y in pairs)
    assert error(chunk, out) < 0.05
    first, later = codec.decode_layers(data, 0)[0], out.layers[0]
    assert torch.equal(first[0], later[0])


def test_outliers_and_nan_survive(path):
    chunk = Synthetic(64, seed=5).chunk()
    chunk.layers[0][0][0, :, 0] *= 1000
    codec = codec_of(path, step=0.5)
    out = codec.decode(codec.encode(chunk))
    assert all(bool(x.isfinite().all()) for pair in out.layers for x in pair)
    chunk.layers[0][0][0, 9, 0] = torch.nan
    out = codec.decode(codec.encode(chunk))
    assert torch.equal(out.layers[0][0].nan_to_num(7), chunk.layers[0][0].nan_to_num(7))


def test_token_table_and_adaptive_steps_pay():
    chunk = Synthetic(1200, seed=6).chunk()
    sizes = {}
    for rank in (0, 8):
        profile = fit(Synthetic(), FitConfig(token_rank=rank, adaptivity=0))
        codec = _in_memory(profile)
        sizes[rank] = len(codec.encode(chunk))
    assert sizes[8] < 0.95 * sizes[0]


def test_budgets_pick_the_step(path):
    assert codec_of(path, budget={"kl": 0.004}).base_step == 0
    assert codec_of(path, budget={"bits": 1.2}).base_step == 64
    assert codec_of(path).base_step > 0
    with pytest.raises(ConfigError, match=r"budget kl = 1 is outside of what the fit measured, 0.001 to 0.016"):
        codec_of(path, budget={"kl": 1.0})
    for bad in ({"kl": 1.0, "bits": 1.0}, {"psnr": 3.0}):
        with pytest.raises(ConfigError, match="budget"):
            codec_of(path, budget=bad)


def test_a_profile_of_another_model_or_codec_is_refused(path, tmp_path):
    codec = codec_of(path)
    codec.check_model("f" * 64, "synthetic")
    with pytest.raises(ConfigError, match=r"fitted to synthetic .* not to other .*codec fit --model other"):
        codec.check_model("0" * 64, "other")
    other = "fisher_klt" if Profile.load(path).codec == "fisher_diagonal" else "fisher_diagonal"
    with pytest.raises(ConfigError, match="was fitted for"):
        get_codec({"id": other, "profile": str(path)})
    with pytest.raises(ConfigError, match="fit one for this model"):
        codec.encode(KVChunk(torch.arange(2), ((torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)),)))
    wrong = dataclasses.replace(Profile.load(path), fingerprint="0" * 64)
    wrong.save(tmp_path / "wrong")
    data = codec.encode(Synthetic(40).chunk(40))
    with pytest.raises(CorruptChunkError, match="profile"):
        codec_of(tmp_path / "wrong").decode(data)


def test_a_damaged_profile_is_refused(path, tmp_path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    (tmp_path / "bad").write_bytes(data)
    with pytest.raises(ConfigError, match="does not match its digest"):
        Profile.load(tmp_path / "bad")
    (tmp_path / "bad").write_bytes(data[:100])
    with pytest.raises(ConfigError, match="no readable profile"):
        Profile.load(tmp_path / "bad")
    with pytest.raises(ConfigError, match="codec fit"):
        Profile.load(tmp_path / "missing")


def test_text_unlike_the_fit_raises_the_alarm(path, caplog):
    codec = codec_of(path, step=1.0)
    strange = Synthetic(6000, seed=8).chunk()
    for k, v in strange.layers:
        k.mul_(-30)
        v.mul_(30)
    with caplog.at_level(logging.WARNING, "lmcache_blend.codecs"):
        codec.encode(strange)
        codec.encode(strange)
    assert codec.rate.mismatch
    assert len([r for r in caplog.records if "unlike" in r.message]) == 1


@pytest.mark.parametrize("cls", [FisherKLT, FisherDiagonal])
def test_without_a_profile_the_codec_is_self_contained(cls):
    chunk, codec = Synthetic(200, seed=2).chunk(), cls()
    assert error(chunk, codec.decode(codec.encode(chunk))) < 0.2
    assert get_codec(json.loads(json.dumps(codec.get_config()))) == codec
    with pytest.raises(ConfigError, match="budget needs a profile"):
        cls(budget={"kl": 0.005})


def _in_memory(profile: Profile):
    import tempfile
    from pathlib import Path

    file = Path(tempfile.mkdtemp()) / "profile"
    dataclasses.replace(profile, settings={**profile.settings, "curve": CURVE}).save(file)
    return codec_of(file, step=0.5)


def test_layouts_of_levels_and_classes_cover_each_symbol_once():
    from lmcache_blend.codecs import adaptive

    rng = np.random.default_rng(0)
    classes = rng.integers(0, adaptive.CLASSES, 301).astype(np.uint8)
    ids = adaptive.table_ids(rng.integers(-600, 400, 40).astype(np.int32), 0, 96)
    where = adaptive.layout(classes, ids)
    y = rng.standard_normal((40, 301)).astype(np.float32) * 9
    steps = adaptive.class_steps(0)
    from lmcache_blend.codecs.rans import row_starts

    symbols, out = np.zeros(int(row_starts(where.lengths)[-1]), np.int16), np.full_like(y, np.nan)
    adaptive.gather(y, where.order, where.bounds, where.offsets, steps, symbols)
    adaptive.scatter(symbols, where.order, where.bounds, where.offsets, steps, out, 0)
    step = steps[classes][None]
    expected = np.where(ids[:, classes] > 0, np.rint(y / step) * step, 0)
    assert np.allclose(out, expected, atol=1e-4)


@pytest.mark.parametrize("shapes", [((7, 5), (5, 3)), ((300, 128), (128, 64)), ((0, 4), (4, 2)), ((3, 0), (0, 2))])
@pytest.mark.parametrize("operator", [True, False])
def test_products_are_torchs(shapes, operator, monkeypatch):
    if not operator:
        monkeypatch.setattr(products, "_onednn", None)
    a, b = (torch.randn(s) for s in shapes)
    for x in (a, a.T.contiguous().T):
        for y in (b, b.T.contiguous().T):
            assert torch.allclose(products.product(x, y), a @ b, atol=1e-4)
