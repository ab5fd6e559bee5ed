"""Rotation, paged gather and scatter against float64, for any shape, pairing and part that turns."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import TOLERANCE, dims, dtypes, keys, pieces, seeds, tokens, turn_of, wide
from kernel_lab import both_orders

from lmcache_blend.triton_kernels.measure import error_ratio
from lmcache_blend.triton_kernels.paged import gather, gather_reference, scatter, scatter_reference
from lmcache_blend.triton_kernels.place import place, place_reference
from lmcache_blend.triton_kernels.rotation import move, move_reference, ops, rotate, rotate_reference


@pytest.fixture(autouse=True, scope="module")
def _large_tiles():
    """The interpreter takes as long for a small tile as for a large one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "TILE", 8192)
        patch.setattr(ops, "PROGRAMS", 4)
        yield


@settings(max_examples=25, deadline=None)
@given(st.data(), tokens, dims, dtypes, seeds, st.booleans(), st.booleans())
def test_rotate_and_unrotate(data, count, dim, dtype, seed, token_major, inverse):
    piece = data.draw(pieces(dim))
    x, turn = keys(count, dim, dtype, seed, token_major), turn_of(piece, count, seed)
    options = (piece.start, piece.pairing == "interleaved", inverse)
    got = both_orders(lambda: rotate(x, *turn, *options))
    assert got.dtype == dtype
    assert error_ratio(got, rotate_reference(x.double(), *wide(turn, piece), inverse)) < TOLERANCE[dtype]


@settings(max_examples=15, deadline=None)
@given(st.data(), tokens, dims, dtypes, seeds)
def test_moving_equals_turning_back_and_on(data, count, dim, dtype, seed):
    piece = data.draw(pieces(dim))
    x, old, new = keys(count, dim, dtype, seed, False), turn_of(piece, count, seed), turn_of(piece, count, seed + 1)
    start, interleaved = piece.start, piece.pairing == "interleaved"
    got = both_orders(lambda: move(x, *old, *new, start, interleaved))
    tables = (*wide(old, piece)[:2], *wide(new, piece)[:2])
    assert error_ratio(got, move_reference(x.double(), *tables, start, interleaved)) < TOLERANCE[dtype]
    back = rotate_reference(x.double(), *wide(old, piece), True)
    assert error_ratio(got, rotate_reference(back, *wide(new, piece))) < TOLERANCE[dtype]


@settings(max_examples=15, deadline=None)
@given(
    st.data(), tokens, dims, dtypes, seeds, st.sampled_from(("NHD", "HND")),
    st.sampled_from(("slots", "table", "start")), st.sampled_from((16, 48)), st.booleans(),
)  # fmt: skip
def test_paged_tokens(data, count, dim, dtype, seed, layout, named, size, turned):
    """Into a cache of NaN and out again; tokens without a place are skipped, and nothing else is touched."""
    piece = data.draw(pieces(dim))
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-count // size) + 2
    x, turn = keys(count, dim, dtype, seed, True), turn_of(piece, count, seed) if turned else None
    table = torch.randperm(blocks + 3, generator=generator)[:blocks]
    table = table.to(data.draw(st.sampled_from((torch.int32, torch.int64))))
    positions = torch.randperm(blocks * size, generator=generator)[:count]
    if count > 2:
        positions[count // 2] = -1
    where = {"slots": (positions, None, 0), "table": (positions, table, 0), "start": (None, table, size + 5)}[named]

    def fill() -> torch.Tensor:
        cache = torch.full((blocks + 3, size, 3, dim) if layout == "NHD" else (blocks + 3, 3, size, dim), torch.nan)
        cache = cache.to(dtype)
        scatter(cache, x, *where, turn, piece, layout)
        return cache

    cache = both_orders(fill)
    nhd = cache if layout == "NHD" else cache.transpose(1, 2)
    want = torch.full_like(nhd, torch.nan, dtype=torch.double)
    options = () if turn is None else wide(turn, piece)
    scatter_reference(want, x.double(), *where, *options)
    assert torch.equal(nhd.isnan(), want.isnan())
    assert error_ratio(nhd, want) < TOLERANCE[dtype]
    full = torch.randn(cache.shape, generator=generator).to(dtype)
    got = both_orders(lambda: gather(full, *where, count, turn, piece, layout))
    full = full if layout == "NHD" else full.transpose(1, 2)
    assert error_ratio(got, gather_reference(full.double(), *where, count, *options)) < TOLERANCE[dtype]


@settings(max_examples=10, deadline=None)
@given(st.data(), tokens, dims, dtypes, seeds)
def test_placing_is_a_scatter_into_one_block(data, count, dim, dtype, seed):
    piece = data.draw(pieces(dim))
    x, turn = keys(count, dim, dtype, seed, False), turn_of(piece, count, seed)

    def fill() -> torch.Tensor:
        target = torch.full((3, count + 7, dim), torch.nan, dtype=dtype)
        place(target, x, 4, turn, piece)
        return target

    want = torch.full((3, count + 7, dim), torch.nan, dtype=torch.double)
    place_reference(want, x.double(), 4, turn, piece)
    assert error_ratio(both_orders(fill), want) < TOLERANCE[dtype]
