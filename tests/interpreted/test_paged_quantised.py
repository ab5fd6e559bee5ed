"""Quantised chunks into and out of paged caches: the same as quantising, turning and scattering one after another."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import keys, pieces, seeds, tokens, turn_of, wide
from kernel_lab import both_orders, traffic

from lmcache_blend.triton_kernels.measure import error_ratio
from lmcache_blend.triton_kernels.paged import (
    Quantised,
    gather_quantised,
    gather_reference,
    quantised,
    scatter_quantised,
    scatter_reference,
)
from lmcache_blend.triton_kernels.paged.quantised import pairing_of
from lmcache_blend.triton_kernels.quantise.reference import dequantise_reference, quantise_reference, spread, unpack
from lmcache_blend.types import RotarySlice

SIZE = 16


@pytest.fixture(autouse=True, scope="module")
def _large_tiles():
    """The interpreter takes as long for a small tile as for a large one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantised, "TILE", 8192)
        yield


@st.composite
def formats(draw, count: int, dim: int) -> tuple[int, bool, int]:
    """(bits, per token, group)."""
    bits, per_token = draw(st.sampled_from((4, 8))), draw(st.booleans())
    return bits, per_token, draw(st.sampled_from((dim, 8))) if per_token else draw(st.sampled_from((count, 32, 20)))


def exact(data: Quantised, bits: int, per_token: bool, group: int, pairing: str) -> torch.Tensor:
    zeros = data.steps.new_empty(0) if data.zeros is None else data.zeros
    return dequantise_reference(data.codes, data.steps, zeros, per_token, group, bits, pairing, torch.float64)


@settings(max_examples=20, deadline=None)
@given(st.data(), tokens, st.sampled_from((64, 80, 96, 128)), seeds, st.booleans(), st.booleans())
def test_load_and_store(data, count, dim, seed, symmetric, turned):
    piece = data.draw(pieces(dim))
    bits, per_token, group = data.draw(formats(count, dim))
    interleaved = piece.pairing == "interleaved"
    pairing = pairing_of(bits, interleaved)
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-count // SIZE) + 1
    cache = torch.randn(blocks + 3, SIZE, 2, dim, generator=generator)
    table = torch.randperm(blocks + 3, generator=generator)[:blocks].int()
    positions = torch.randperm(blocks * SIZE, generator=generator)[:count]
    if count > 2:
        positions[count // 2] = -1
    turn = turn_of(piece, count, seed) if turned else None
    options = () if turn is None else wide(turn, piece)

    made = both_orders(
        lambda: gather_quantised(
            cache, bits, per_token, group, symmetric, positions, table, turn=turn, piece=piece
        )
    )  # fmt: skip
    x = gather_reference(cache.double(), positions, table, 0, 0, *options)
    want = quantise_reference(x, per_token, group, bits, symmetric, pairing)
    for got, expected in zip(made[:2], want[:2], strict=True):
        assert got.shape == expected.shape
        assert got.dtype == expected.dtype
    # Rotation in float32 may tip a value over the edge between two codes; no value may be further off than its step.
    assert (unpack(made.codes, pairing) != unpack(want[0], pairing)).double().mean() < 0.02
    value, step = exact(made, bits, per_token, group, pairing), spread(want[1].double(), x.shape, per_token, group)
    assert ((value - x).abs() <= 0.51 * step + 2e-3).all()

    def fill() -> torch.Tensor:
        target = torch.full_like(cache, torch.nan)
        scatter_quantised(target, made, per_token, group, positions, table, turn=turn, piece=piece)
        return target

    target, reference = both_orders(fill), torch.full_like(cache, torch.nan, dtype=torch.double)
    scatter_reference(reference, value, positions, table, 0, *options)
    assert torch.equal(target.isnan(), reference.isnan())
    assert error_ratio(target, reference) < 1e-6


def test_codes_are_read_once_and_kv_is_written_once():
    x = keys(64, 128, torch.float32, 0, False)
    data = Quantised(*quantise_reference(x, False, 64, 4, False, "half"))
    cache = torch.zeros(6, SIZE, 3, 128, dtype=torch.bfloat16)
    piece = RotarySlice(0, 0, 128, "half", "half", 0)
    with traffic() as moved:
        scatter_quantised(cache, data, False, 64, torch.arange(64), turn=turn_of(piece, 64, 0), piece=piece)
    assert moved["codes", "load"] == data.codes.nbytes
    assert moved["cache", "store"] == x.numel() * 2
    assert moved["cache", "load"] == 0
