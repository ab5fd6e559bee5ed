"""Transforms equal float64 for odd shapes, class layouts and dtypes; symbols to the neighbouring integer at most."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_lab import both_orders, traffic

from lmcache_blend.triton_kernels.linear import analyse, synthesise
from lmcache_blend.triton_kernels.linear.examples import classes
from lmcache_blend.triton_kernels.linear.reference import analyse_reference, places, synthesise_reference
from lmcache_blend.triton_kernels.measure import error_ratio

TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}
SHAPES = st.tuples(
    st.sampled_from((1, 63, 111, 257)), st.sampled_from((64, 80, 96, 256)), st.sampled_from((1, 33, 70)),
    st.sampled_from((0, 5, 64)), st.integers(0, 999),
)  # fmt: skip


@settings(max_examples=20, deadline=None)
@given(shape=SHAPES, matrix=st.sampled_from(list(TOLERANCE)), out=st.sampled_from(list(TOLERANCE)))
def test_synthesis_equals_float64(shape, matrix, out):
    tokens, dims, ranks, count, seed = shape
    g = torch.Generator().manual_seed(seed)
    where, size = classes(tokens, ranks, g)
    symbols = (torch.randn(size, generator=g) * 30).round().to(torch.int16)
    inverse, predict = (torch.randn(n, dims, generator=g).to(matrix) for n in (ranks, count))
    base, features = torch.randn(dims, generator=g), torch.randint(-99, 99, (tokens, count), generator=g) / 16
    # Integers to 256 and features in sixteenths are exact in bfloat16.
    made = both_orders(lambda: synthesise(symbols, where, inverse, base, features, predict, out))
    want = synthesise_reference(
        symbols, *where, inverse.double(), base.double(), features.double(), predict.double(), torch.float64
    )
    assert made.dtype == out
    assert error_ratio(made, want) < TOLERANCE[out]


@settings(max_examples=20, deadline=None)
@given(shape=SHAPES, matrix=st.sampled_from(list(TOLERANCE)), kind=st.sampled_from(list(TOLERANCE)))
def test_analysis_equals_float64_up_to_a_rounding(shape, matrix, kind):
    tokens, dims, ranks, _, seed = shape
    g = torch.Generator().manual_seed(seed)
    where, size = classes(tokens, ranks, g)
    x, base = (torch.randn(tokens, dims, generator=g) * 8).to(kind), torch.randn(tokens, dims, generator=g)
    forward = (torch.randn(dims, ranks, generator=g) / dims**0.5).to(matrix)
    made, peak = both_orders(lambda: analyse(x, base, forward, where, size))
    want, top = analyse_reference(x, base, forward.double(), *where, size)
    apart = (made - want).abs()
    assert apart.max() <= 1 + 2e-2 * want.abs().max() * (matrix == torch.bfloat16)
    assert (apart > 0).double().mean() <= (0.01 if matrix == torch.float32 else 0.15)
    assert peak == pytest.approx(float(top), rel=1e-2, abs=1)
    outside = torch.ones(size, dtype=torch.bool)
    at = places(*where[:3])[1]
    outside[at[at >= 0]] = False
    assert not made[outside].any(), "gaps between rows must be 0: the coder reads them"


def test_symbols_too_large_are_reported_and_not_wrapped():
    where, size = classes(16, 3, torch.Generator().manual_seed(0))
    x, base = torch.full((16, 64), 1e6), torch.zeros(16, 64)
    made, peak = analyse(x, base, torch.ones(64, 3), where, size)
    assert peak > 32767
    assert made.abs().max() == 0


def test_each_value_is_written_once_and_each_symbol_read_once():
    tokens, dims, ranks = 111, 96, 33
    g = torch.Generator().manual_seed(0)
    where, size = classes(tokens, ranks, g)
    symbols = torch.ones(size, dtype=torch.int16)
    args = (torch.randn(ranks, dims), torch.randn(dims), torch.zeros(tokens, 0), torch.zeros(0, dims))
    with traffic() as moved:
        synthesise(symbols, where, *args, torch.bfloat16)
    columns = -(-dims // 64)
    coded = int((places(*where[:3])[1] >= 0).sum())
    assert moved["out", "store"] == 2 * tokens * dims
    # One pass over the symbols for every tile of columns; a tile is as wide as the product's dtype allows.
    assert moved["symbols", "load"] == 2 * coded * columns
