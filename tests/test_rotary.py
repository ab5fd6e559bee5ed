"""Rotation and its inverse, in every layout, and the fused placing kernel against plain torch."""

import math

import pytest
import torch
from architectures import build
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_blend.hf import HFRunner
from lmcache_blend.rotary import RotarySlice, Turn, rotate
from lmcache_blend.triton_kernels.place import place, place_reference

slices = st.builds(
    lambda start, half, rest, pairing: (
        RotarySlice(0, start, start + 2 * half, pairing, "half", 0),
        start + 2 * half + rest,
    ),
    st.integers(0, 5),
    st.integers(1, 8),
    st.integers(0, 5),
    st.sampled_from(["half", "interleaved"]),
)


def turn_of(tokens: int, half: int, scale: float = 1.0) -> Turn:
    angle = torch.arange(tokens)[:, None] * torch.logspace(0, -3, half)
    return Turn(scale * angle.cos(), scale * angle.sin())


@given(slices, st.integers(1, 9), st.floats(0.5, 2.0))
@settings(max_examples=80, deadline=None)
def test_turning_back_undoes_turning_whatever_the_attention_scaling(piece_and_dim, tokens, scale):
    piece, dim = piece_and_dim
    x = torch.randn(2, tokens, dim, generator=torch.Generator().manual_seed(0))
    turn = turn_of(tokens, (piece.stop - piece.start) // 2, scale)
    turned = rotate(x, turn, piece)
    assert torch.allclose(rotate(turned, turn, piece, inverse=True), x, atol=1e-5)
    outside = [i for i in range(dim) if not piece.start <= i < piece.stop]
    assert torch.equal(turned[..., outside], x[..., outside])
    norms = [y[..., piece.start : piece.stop].norm(dim=-1) for y in (turned, x)]
    assert torch.allclose(norms[0], scale * norms[1], rtol=1e-4)


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_a_turn_is_multiplication_by_a_complex_number(pairing):
    x, turn = torch.randn(1, 5, 8), turn_of(5, 4)
    real, imaginary = (x[..., :4], x[..., 4:]) if pairing == "half" else (x[..., ::2], x[..., 1::2])
    want = torch.complex(real, imaginary) * torch.complex(turn.cos, turn.sin)
    got = rotate(x, turn, RotarySlice(0, 0, 8, pairing, "half", 0))
    real, imaginary = (got[..., :4], got[..., 4:]) if pairing == "half" else (got[..., ::2], got[..., 1::2])
    assert torch.allclose(torch.complex(real, imaginary), want, atol=1e-6)


@given(slices, st.integers(1, 9), st.integers(0, 6), st.integers(1, 3), st.booleans())
@settings(max_examples=80, deadline=None)
def test_placing_equals_the_reference(piece_and_dim, tokens, start, heads, contiguous):
    piece, dim = piece_and_dim
    torch.manual_seed(0)
    source = torch.randn(heads, tokens, dim) if contiguous else torch.randn(tokens, heads, dim).transpose(0, 1)
    turn = turn_of(tokens, (piece.stop - piece.start) // 2)
    fused, plain = (
        torch.full((heads, start + tokens + 3, dim), torch.nan),
        torch.full((heads, start + tokens + 3, dim), torch.nan),
    )
    place(fused, source, start, turn, piece)
    place_reference(plain, source, start, turn, piece)
    assert torch.allclose(fused, plain, atol=1e-6, equal_nan=True)
    assert fused[:, :start].isnan().all(), "nothing outside the target positions is touched"
    assert fused[:, start + tokens :].isnan().all()


def test_placing_in_other_types_and_without_rotation():
    source, turn, piece = torch.randn(2, 4, 8).bfloat16(), turn_of(4, 4), RotarySlice(0, 0, 8, "half", "half", 0)
    target = torch.zeros(2, 9, 8, dtype=torch.bfloat16)
    place(target, source, 3, turn, piece)
    assert torch.equal(target[:, 3:7], rotate(source, turn, piece))
    place(target, source, 5, None, None)
    assert torch.equal(target[:, 5:9], source)
    for shape, start in (((2, 5, 8), 2), ((3, 9, 8), 0), ((2, 9, 6), 0)):
        with pytest.raises(ValueError, match="cannot place"):
            place(torch.zeros(shape), torch.zeros(2, 4, 8), start, turn, piece)
    with pytest.raises(ValueError, match="do not fit"):
        place(torch.zeros(2, 9, 8), torch.zeros(2, 4, 8), 0, turn_of(3, 4), piece)


@pytest.mark.parametrize(
    ("name", "piece"),
    [
        ("llama-default", RotarySlice(0, 0, 16, "half", "half", 0)),
        ("phi-default", RotarySlice(0, 0, 8, "half", "half", 0)),  # partial rotary
        ("glm4-default", RotarySlice(0, 0, 8, "interleaved", "half", 0)),
        ("cohere-default", RotarySlice(0, 0, 16, "interleaved", "stride", 0)),
        ("gpt_oss-yarn", RotarySlice(0, 0, 16, "half", "all", 0)),
        ("deepseek_v2-default", RotarySlice(1, 0, 8, "interleaved", "all", 0)),  # MLA: the rope key beside the latent
        ("deepseek_v3-default", RotarySlice(1, 0, 8, "half", "half", 0)),
    ],
)
def test_what_is_read_off_a_model(name, piece):
    assert set(HFRunner.checked(build(name)).rotary.layers) == {piece}


def test_layers_without_rope_and_with_two_thetas():
    assert HFRunner.checked(build("smollm3-default")).rotary.layers[1::2] == (None, None)
    table = HFRunner.checked(build("gemma3-two-thetas")).rotary
    local, whole = (table.at(torch.arange(9)).turns[i] for i in (0, 1))
    assert table.layers[0] == table.layers[2] != table.layers[1]
    assert not torch.allclose(local.cos, whole.cos)


def test_attention_scaling_is_not_stored():
    """yarn multiplies cos and sin; keys that were turned back are those of the projection, without it."""
    runner = HFRunner.checked(build("llama-yarn"))
    angles = runner.rotary.at(torch.arange(10))
    scale = (angles.turns[0].cos.square() + angles.turns[0].sin.square()).sqrt()
    assert torch.allclose(scale, torch.full_like(scale, 0.1 * math.log(4.0) + 1.0), atol=1e-5)
    x = torch.randn(2, 10, 16)
    k, _ = angles.unrotate(0, *angles.rotate(0, x, x))
    assert torch.allclose(k, x, atol=1e-5)


@pytest.mark.parametrize("name", ["llama-dynamic", "llama-longrope"])
def test_scaling_that_follows_the_length(name):
    """Tables beyond the original 64 positions differ; KV of one regime is never exact in the other."""
    table = HFRunner.checked(build(name)).rotary
    short, long = (table.at(torch.arange(n)) for n in (40, 100))
    assert short.regime() != long.regime()
    assert table.at(torch.arange(50)).regime() == short.regime()
    fixed = HFRunner.checked(build("llama-yarn")).rotary
    assert fixed.at(torch.arange(40)).regime() == fixed.at(torch.arange(100)).regime()
