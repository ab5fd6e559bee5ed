"""Which rows go through this package's attention kernel, and what probes mask; needs no vLLM."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from lmcache_blend.serving import attend
from lmcache_blend.serving.attend import PagedAttention, Rows, kernel_fits, unknown, window_of
from lmcache_blend.serving.kv import PagedKV, PagedLayer
from lmcache_blend.triton_kernels.attention import selective_attention_reference


def impl(**named):
    own = {"alibi_slopes": None, "sinks": None, "sliding_window": None, "logits_soft_cap": 0, "scale": 0.125}
    return SimpleNamespace(**{**own, **named})


class Attention(SimpleNamespace):
    """Named as vLLM's; its cache keeps keys transposed, as vLLM's does on CPU."""


class ChunkedLocalAttention(Attention):
    pass


@pytest.mark.parametrize(
    ("device", "dim", "near", "extra", "fits"),
    [
        ("cuda", 128, True, "", True),
        ("cuda", 80, True, "", True),
        ("cuda", 256, True, "", True),
        ("cuda", 512, True, "", False),
        ("cuda", 68, True, "", False),
        ("cuda", 8, True, "", False),
        ("cuda", 128, False, "", False),
        ("cuda", 128, True, "sinks", False),
        ("cpu", 128, True, "", False),
        ("xpu", 128, True, "", False),
    ],
)
def test_the_kernel_is_for_cuda_and_for_what_it_knows(device, dim, near, extra, fits):
    assert kernel_fits(device, dim, near, extra) is fits


def test_tests_can_force_it_on_cpu(monkeypatch):
    monkeypatch.setattr(attend, "DEVICES", frozenset({"cpu"}))
    assert kernel_fits("cpu", 64, False, "")
    assert not kernel_fits("cpu", 64, False, "alibi_slopes")
    assert not kernel_fits("cuda", 64, True, "")


def test_what_a_layer_does_beside_masking_is_named():
    assert unknown(Attention(impl=impl(), attn_type="decoder")) == ""
    assert unknown(Attention(impl=impl(sinks=torch.ones(2)), attn_type="decoder")) == "sinks"
    assert unknown(Attention(impl=impl(alibi_slopes=[1.0]), attn_type="decoder")) == "alibi_slopes"
    assert unknown(ChunkedLocalAttention(impl=impl(), attn_type="decoder")) == "ChunkedLocalAttention"
    assert unknown(Attention(impl=impl(), attn_type="encoder_only"))


def test_windows_of_both_conventions():
    assert [window_of(impl(sliding_window=w)) for w in (None, -1, (-1, -1), 128, (127, 0))] == [None] * 3 + [128] * 2


def paged(window, cap, blocks=5, size=4, heads=2, dim=16):
    """A layer over shuffled blocks whose keys lie transposed, and what it holds for a request of 3 blocks."""
    cache = torch.randn(blocks, heads, size, 2 * dim)

    def update(layer, k, v, kv_cache, slots):
        flat = kv_cache.view(blocks, heads, 2 * size * dim)
        for slot, key, value in zip(slots.tolist(), k, v, strict=True):
            at, place = divmod(slot, size)
            flat[at, :, : size * dim].view(heads, dim, size)[:, :, place] = key
            flat[at, :, size * dim :].view(heads, size, dim)[:, place] = value

    own = impl(sliding_window=window, logits_soft_cap=cap, do_kv_cache_update=update)
    attention = Attention(impl=own, attn_type="decoder", num_kv_heads=heads, head_size=dim)
    layer = PagedLayer("layer", attention, cache, size, scratch=1)
    kv = PagedKV([layer], torch.tensor([4, 0, 2]), 11)
    k, v = torch.randn(1, heads, 11, dim), torch.randn(1, heads, 11, dim)
    kv.write(0, torch.arange(11), k, v)
    return layer, kv, k, v


@pytest.mark.parametrize(
    ("forced", "window", "cap", "hide"), itertools.product((False, True), (None, 3), (0, 2.0), (False, True))
)
def test_rows_and_probes_agree_with_dense_attention(monkeypatch, forced, window, cap, hide):
    torch.manual_seed(0)
    monkeypatch.setattr(attend, "DEVICES", frozenset({"cpu"} if forced else ()))
    layer, kv, k, v = paged(window, cap)
    attention = PagedAttention(layer)
    assert attention.by_kernel is forced
    positions, q = torch.tensor([2, 7, 8, 10]), torch.randn(4, 4, 16)
    hidden = torch.zeros(11, dtype=torch.bool)
    hidden[[1, 6, 9]] = hide
    mask = torch.zeros(1, 1, 4, 11, dtype=torch.float64).masked_fill(hidden, -torch.inf)
    wanted, _, mass = selective_attention_reference(
        q.transpose(0, 1)[None], k, v, positions[None], mask, 0.125, window, cap or None
    )
    out, seen, values = attention.probe(q, kv, Rows(positions, hidden if hide else None))
    torch.testing.assert_close(out, wanted[0].transpose(0, 1).float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen, mass[0].float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(values, v[0])
    if not hide:
        out = attention.rows(q, kv, Rows(positions))
        torch.testing.assert_close(out, wanted[0].transpose(0, 1).float(), atol=1e-5, rtol=1e-5)
