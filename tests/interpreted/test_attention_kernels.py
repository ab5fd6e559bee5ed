"""Attention by position against float64: heads, dims, masks, windows, caps, pages; what no row may see holds NaN."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_lab import both_orders

from lmcache_blend.triton_kernels.attention import (
    attention_mass,
    row_attention,
    row_attention_mass,
    row_attention_reference,
    selective_attention_lse,
    selective_attention_reference,
)
from lmcache_blend.triton_kernels.measure import error_ratio

# RMS of the error over RMS of the reference; 16-bit: weights are rounded before they meet V, the result once more.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
# (query heads, KV heads, head dims of K, V)
SHAPES = st.sampled_from(
    ((4, 2, 64, 64), (3, 1, 80, 80), (7, 1, 128, 128), (2, 2, 96, 96), (2, 1, 256, 256), (4, 2, 96, 64))
)
LIMITS = st.sampled_from(((None, None), (37, None), (None, 5.0), (9, 20.0)))


@st.composite
def rows_of(draw, tokens: int, batch: int) -> torch.Tensor:
    """[B, N] ascending positions, some without any (-1)."""
    count = min(draw(st.sampled_from((1, 5, 23, 70))), tokens)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    rows = torch.stack([torch.randperm(tokens, generator=generator)[:count].sort().values for _ in range(batch)])
    if draw(st.booleans()):
        rows[0, 0] = -1
    return rows


@settings(max_examples=16, deadline=None)
@given(
    st.data(), st.sampled_from((1, 63, 111, 257, 700)), SHAPES, LIMITS, st.sampled_from(sorted(TOLERANCE, key=str)),
    st.sampled_from((None, 16, 48)), st.sampled_from((1, 2)),
)  # fmt: skip
def test_selected_rows(data, tokens, shape, limits, dtype, size, batch):
    (hq, h, d, dv), (window, soft_cap) = shape, limits
    rows = data.draw(rows_of(tokens, batch))
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randn(batch, rows.shape[1], hq, d, generator=generator).to(dtype).transpose(1, 2)
    k = torch.randn(batch, h, tokens, d, generator=generator).to(dtype)
    v = torch.randn(batch, h, tokens, dv, generator=generator).to(dtype)
    want, lse, mass = selective_attention_reference(q, k, v, rows, None, None, window, soft_cap)
    options = {"window": window, "soft_cap": soft_cap}
    table = None
    if size is None:  # dense; beyond the last row there is nothing that may be read
        k[:, :, rows.max() + 1 :], v[:, :, rows.max() + 1 :] = torch.nan, torch.nan
    else:
        k, v, table = paged(k, v, size, generator)
    got, sums = both_orders(lambda: selective_attention_lse(q, k, v, rows, table, **options))
    assert error_ratio(got, want) < TOLERANCE[dtype]
    assert torch.equal(sums.isinf(), lse.isinf())
    seen = ~lse.isinf()
    # A log-sum-exp may be close to 0: the error is measured against 1.
    assert (sums[seen] - lse[seen]).abs().max() < 1e-5 if seen.any() else True
    if size is None:
        k = k.nan_to_num()  # every key is looked at here, hidden or not
    heard = both_orders(lambda: attention_mass(q, k, rows, sums, tokens, table, **options))
    assert error_ratio(heard, mass) < 1e-5


def paged(k, v, size, generator):
    """The same keys and values in blocks of NaN."""
    batch, h, tokens, _ = k.shape
    blocks = -(-tokens // size)
    table = torch.randperm(batch * blocks + 2, generator=generator)[: batch * blocks].view(batch, blocks)
    caches = []
    for x in (k, v):
        cache = torch.full((batch * blocks + 2, size, h, x.shape[3]), torch.nan, dtype=x.dtype)
        for b in range(batch):
            at = torch.arange(tokens)
            cache[table[b, at // size], at % size] = x[b].transpose(0, 1)
        caches.append(cache)
    return *caches, table.int()


@settings(max_examples=10, deadline=None)
@given(st.data(), st.sampled_from((63, 257)), st.sampled_from(sorted(TOLERANCE, key=str)), st.booleans())
def test_rows_under_a_models_own_mask(data, tokens, dtype, shared):
    """Hugging Face's additive masks, for a batch or shared by it."""
    rows = data.draw(rows_of(tokens, 1)).clamp_min(0).expand(2, -1)
    generator = torch.Generator().manual_seed(tokens)
    q = torch.randn(2, 4, rows.shape[1], 64, generator=generator).to(dtype)
    k, v = (torch.randn(2, 2, tokens, 64, generator=generator).to(dtype) for _ in "kv")
    hidden = torch.rand(1 if shared else 2, 1, rows.shape[1], tokens, generator=generator) < 0.3
    causal = torch.arange(tokens) > rows[: len(hidden), None, :, None]
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden | causal, torch.finfo(dtype).min)
    mask[..., 0] = 0
    want = row_attention_reference(q, k, v, mask, 0.2)
    weights = row_attention_reference(q, k, torch.eye(tokens).expand(2, 2, -1, -1), mask, 0.2)
    last = rows[0].tolist()
    assert error_ratio(both_orders(lambda: row_attention(q, k, v, mask, last, 0.2)), want) < TOLERANCE[dtype]
    out, mass = both_orders(lambda: row_attention_mass(q, k, v, mask, last, 0.2))
    assert error_ratio(out, want) < TOLERANCE[dtype]
    assert error_ratio(mass, weights.mean(2)) < 1e-5


@settings(max_examples=10, deadline=None)
@given(st.data(), st.sampled_from((1, 40, 111)), st.one_of(st.none(), st.integers(1, 60)))
def test_the_mask_equals_brute_force(data, tokens, window):
    """With one-hot values and equal keys the output is the mask itself, row by row."""
    rows = data.draw(rows_of(tokens, 1))
    q, k = torch.zeros(1, 1, rows.shape[1], 64), torch.zeros(1, 1, tokens, 64)
    v = torch.nn.functional.pad(torch.eye(tokens), (0, 128 - tokens))[None, None]
    out, _ = selective_attention_lse(q, k, v, rows, window=window)
    for i, position in enumerate(rows[0].tolist()):
        seen = [key for key in range(tokens) if key <= position and (window is None or position - key < window)]
        assert (out[0, 0, i] > 0).nonzero().flatten().tolist() == seen
