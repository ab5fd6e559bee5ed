"""Deviation against float64; top-k equals a stable sort, ties, infinities and NaN included."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_lab import both_orders

from lmcache_blend.triton_kernels.measure import error_ratio
from lmcache_blend.triton_kernels.paged import gather_reference
from lmcache_blend.triton_kernels.selection import (
    paged_squared_deviation,
    squared_deviation,
    squared_deviation_reference,
    top_rows,
    top_rows_reference,
)

tokens = st.sampled_from((1, 63, 111, 257))
dims = st.sampled_from((64, 80, 96, 128, 256))
dtypes = st.sampled_from((torch.float32, torch.float16, torch.bfloat16))


@settings(max_examples=20, deadline=None)
@given(tokens, dims, dtypes, st.booleans(), st.integers(0, 99))
def test_deviation(count, dim, dtype, token_major, seed):
    generator = torch.Generator().manual_seed(seed)
    new = torch.randn((count, 3, dim) if token_major else (3, count, dim), generator=generator).to(dtype)
    new = new.transpose(0, 1) if token_major else new
    old = torch.randn(3, count + 9, dim, generator=generator).to(dtype)
    rows = torch.randperm(count + 9, generator=generator)[:count]
    got = both_orders(lambda: squared_deviation(new, old, rows))
    assert error_ratio(got, squared_deviation_reference(new.double(), old.double(), rows)) < 1e-6

    cache = torch.randn(count // 16 + 4, 16, 3, dim, generator=generator).to(dtype)
    table = torch.randperm(len(cache), generator=generator).int()
    rows[count // 2] = -1
    got = both_orders(lambda: paged_squared_deviation(new, cache, rows, table))
    want = squared_deviation_reference(
        new.double(), gather_reference(cache.double(), rows, table), torch.arange(count)
    ).masked_fill(rows < 0, 0.0)  # fmt: skip
    assert error_ratio(got, want) < 1e-6


numbers = st.one_of(
    st.sampled_from((0.0, -0.0, 1.0, -1.0, float("inf"), float("-inf"), float("nan"), 1e-42)), st.floats(width=32)
)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.lists(st.tuples(numbers, st.booleans()), min_size=1, max_size=300))
def test_top_rows(data, pairs):
    scores, candidate = torch.tensor([x for x, _ in pairs]), torch.tensor([c for _, c in pairs])
    count = data.draw(st.integers(0, int(candidate.sum())))
    got = both_orders(lambda: top_rows(scores, candidate, count))
    assert torch.equal(got, top_rows_reference(scores, candidate, count))


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 99), st.sampled_from((4095, 9001)), dtypes)
def test_top_rows_over_several_blocks(seed, count, dtype):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-50, 50, (count,), generator=generator).to(dtype)
    candidate = torch.rand(count, generator=generator) < 0.8
    got = both_orders(lambda: top_rows(scores, candidate, count // 7))
    assert torch.equal(got, top_rows_reference(scores, candidate, count // 7))
