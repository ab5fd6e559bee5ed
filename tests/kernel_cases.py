"""Keys, rotary slices and angles that tests of kernels draw."""

import torch
from hypothesis import strategies as st

from lmcache_blend.types import RotarySlice, Turn

# RMS of the error over RMS of the reference: one rounding to the dtype.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 3e-4, torch.bfloat16: 2.5e-3}

tokens = st.sampled_from((1, 63, 111, 257))
dims = st.sampled_from((64, 80, 96, 128, 256))
dtypes = st.sampled_from(sorted(TOLERANCE, key=str))
seeds = st.integers(0, 999)


@st.composite
def pieces(draw, dim: int) -> RotarySlice:
    """All dims, the first quarter (partial rotary), or some in the middle."""
    start, stop = draw(st.sampled_from(((0, dim), (0, dim // 4), (8, dim // 2), (dim // 2, dim))))
    return RotarySlice(0, start, stop, draw(st.sampled_from(("half", "interleaved"))), "half", 0)


def turn_of(piece: RotarySlice, count: int, seed: int, scale: float = 1.3) -> Turn:
    """Random angles; scale: the attention scaling that yarn bakes into its tables."""
    angle = torch.rand(count, (piece.stop - piece.start) // 2, generator=torch.Generator().manual_seed(seed)) * 7
    return Turn(scale * angle.cos(), scale * angle.sin())


def keys(count: int, dim: int, dtype: torch.dtype, seed: int, token_major: bool) -> torch.Tensor:
    shape = (count, 3, dim) if token_major else (3, count, dim)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.transpose(0, 1) if token_major else x


def wide(turn: Turn, piece: RotarySlice) -> tuple:
    return turn.cos.double(), turn.sin.double(), piece.start, piece.pairing == "interleaved"
