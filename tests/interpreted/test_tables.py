"""Counts, frequencies and look-up tables equal their references exactly."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_lab import both_orders

from lmcache_blend.triton_kernels.tables import frequencies, histogram, slots
from lmcache_blend.triton_kernels.tables.reference import (
    frequencies_reference,
    histogram_reference,
    slots_reference,
)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 5), tokens=st.sampled_from((0, 1, 63, 111, 257, 1100)), reach=st.sampled_from((1, 7, 15, 127)),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_histograms(rows, tokens, reach, seed):
    q = (torch.randn(rows, tokens, generator=torch.Generator().manual_seed(seed)) * 60).to(torch.int16)
    assert torch.equal(both_orders(lambda: histogram(q, reach)), histogram_reference(q, reach))


@st.composite
def counts(draw) -> torch.Tensor:
    size = draw(st.integers(1, 255))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    spread = draw(st.sampled_from((0.3, 3.0, 60.0)))
    x = (torch.randn(draw(st.integers(1, 3)), draw(st.sampled_from((1, 63, 400))), generator=generator) * spread).long()
    rows = [torch.bincount(row.clamp(-size // 2, size // 2).abs().clamp(0, size - 1), minlength=size) for row in x]
    return torch.stack([*rows, torch.zeros(size, dtype=torch.int64)]).double()


@settings(max_examples=40, deadline=None)
@given(counts=counts(), bits=st.sampled_from((8, 12)))
def test_frequencies_and_slots(counts, bits):
    made = both_orders(lambda: frequencies(counts, bits))
    assert torch.equal(made, frequencies_reference(counts, bits))
    assert torch.equal(both_orders(lambda: slots(made, bits)), slots_reference(made, bits))
