"""Quantisation gives its reference's bits for any shape, group and layout; dequantisation is exact up to the dtype."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_lab import both_orders

from lmcache_blend.triton_kernels.measure import error_ratio
from lmcache_blend.triton_kernels.quantise import dequantise, quantise, statistics
from lmcache_blend.triton_kernels.quantise.reference import (
    dequantise_reference,
    quantise_reference,
    statistics_reference,
)

# RMS of the error over RMS of the reference: half a unit in the last place, uniform.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 3e-4, torch.bfloat16: 2.5e-3}


@st.composite
def values(draw) -> torch.Tensor:
    """[H, T, D], contiguous or a view whose heads or tokens lie apart; a row of zeros, loud channels."""
    heads, tokens = draw(st.sampled_from((1, 2))), draw(st.sampled_from((1, 63, 111, 257)))
    dims = draw(st.sampled_from((64, 80, 96, 128, 256)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    layout = draw(st.sampled_from(("plain", "token major", "padded")))
    if layout == "token major":
        x = torch.randn(tokens, heads, dims, generator=generator).transpose(0, 1)
    else:
        x = torch.randn(heads, tokens, dims + (16 if layout == "padded" else 0), generator=generator)[..., :dims]
    x[..., ::16] *= 20
    x[:, tokens // 2] = 0
    return x.to(draw(st.sampled_from((torch.float32, torch.float16, torch.bfloat16))))


def tensors_of(made):
    return [t for t in made if t is not None and t.numel()]


def check(x, axis, group, bits, symmetric, pairing):
    made = both_orders(lambda: quantise(x, axis, group, bits, symmetric, pairing))
    want = quantise_reference(x, axis == "token", group, bits, symmetric, pairing)
    for got, expected in zip(tensors_of(made), tensors_of(want), strict=True):
        assert torch.equal(got, expected)
    exact = dequantise_reference(*want, axis == "token", group, bits, pairing, torch.float64)
    out = both_orders(lambda: dequantise(*made, axis, group, bits, pairing, x.dtype))
    assert out.dtype == x.dtype
    assert error_ratio(out, exact) < TOLERANCE[x.dtype]


@settings(max_examples=12, deadline=None)
@given(
    x=values(),
    axis=st.sampled_from(("token", "channel")),
    group=st.sampled_from((1, 16, 33, 64, 80, 128, 5000)),
    bits=st.sampled_from((2, 4, 8)),
    symmetric=st.booleans(),
)
def test_codes_in_bytes(x, axis, group, bits, symmetric):
    check(x, axis, min(group, x.shape[2]) if axis == "token" else group, bits, symmetric, "none")


@settings(max_examples=12, deadline=None)
@given(
    x=values(), axis=st.sampled_from(("token", "channel")), group=st.sampled_from((0, 2, 8, 16, 64, 300)),
    symmetric=st.booleans(), pairing=st.sampled_from(("half", "interleaved")),
)  # fmt: skip
def test_nibbles_of_rotary_pairs(x, axis, group, symmetric, pairing):
    dims = x.shape[2]
    if axis == "token":
        group = group if group and dims // 2 % group == 0 else dims
    check(x, axis, max(group, 1), 4, symmetric, pairing)


@settings(max_examples=6, deadline=None)
@given(x=values(), axis=st.sampled_from(("token", "channel")), group=st.sampled_from((1, 33, 64, 5000)))
def test_statistics_in_one_pass(x, axis, group):
    group = min(group, x.shape[2]) if axis == "token" else group
    made = both_orders(lambda: statistics(x, axis, group))
    low, high, mean = statistics_reference(x.double(), axis == "token", group)
    assert torch.equal(made.low.double(), low)
    assert torch.equal(made.high.double(), high)
    assert (made.mean.double() - mean).abs().max() < 1e-5
    assert torch.equal(made.peak.double(), torch.maximum(high, -low))
