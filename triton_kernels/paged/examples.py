"""Calls that are compiled, validated and timed: 2,048 tokens of 8 heads, 128 dims, in blocks of 16 (Llama 3, vLLM)."""

from functools import partial

import torch
from torch import Tensor

from lmcache_blend.triton_kernels.example import Example
from lmcache_blend.triton_kernels.paged import (
    Quantised,
    gather,
    gather_quantised,
    gather_reference,
    scatter,
    scatter_quantised,
    scatter_reference,
)
from lmcache_blend.triton_kernels.paged.quantised import pairing_of
from lmcache_blend.triton_kernels.quantise.reference import dequantise_reference, quantise_reference
from lmcache_blend.triton_kernels.rotation.examples import tables
from lmcache_blend.types import RotarySlice, Turn

BLOCK = 16
HALF_PAIRS = RotarySlice(0, 0, 128, "half", "half", 0)
ADJACENT_PAIRS = RotarySlice(0, 0, 128, "interleaved", "half", 0)
PARTIAL = RotarySlice(0, 0, 32, "half", "half", 0)


def _paged(device: torch.device, small: bool, dim: int, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    """Cache, slots, block table."""
    heads, tokens = (2, 45) if small else (8, 2048)
    blocks = -(-tokens // BLOCK)
    generator = torch.Generator().manual_seed(0)
    shape = (blocks + 5, BLOCK, heads, dim) if layout == "NHD" else (blocks + 5, heads, BLOCK, dim)
    cache = torch.randn(shape, generator=generator).bfloat16().to(device)
    table = torch.randperm(blocks + 5, generator=generator)[:blocks].int().to(device)
    return cache, torch.arange(tokens, device=device), table


def _turn(piece: RotarySlice | None, tokens: int, device: torch.device) -> Turn | None:
    return None if piece is None else Turn(*tables(device, tokens, (piece.stop - piece.start) // 2))


def _scatter_args(dim: int, piece: RotarySlice | None, layout: str, device: torch.device, small: bool) -> tuple:
    cache, positions, table = _paged(device, small, dim, layout)
    heads = cache.shape[2 if layout == "NHD" else 1]
    x = torch.randn(heads, len(positions), dim, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)
    return cache, x, positions, table, _turn(piece, len(positions), device)


def _run_scatter(piece, layout, cache, x, positions, table, turn) -> Tensor:
    scatter(cache, x, positions, table, 0, turn, piece, layout)
    return cache


def _angles(turn: Turn | None, piece: RotarySlice | None, dtype: torch.dtype) -> tuple:
    if turn is None or piece is None:
        return ()
    return turn.cos.to(dtype), turn.sin.to(dtype), piece.start, piece.pairing == "interleaved"


def _nhd(cache: Tensor, layout: str) -> Tensor:
    return cache if layout == "NHD" else cache.transpose(1, 2)


def _torch_scatter(piece, layout, cache, x, positions, table, turn) -> Tensor:
    scatter_reference(_nhd(cache, layout), x, positions, table, 0, *_angles(turn, piece, x.dtype))
    return cache


def _wide_scatter(piece, layout, cache, x, positions, table, turn) -> Tensor:
    cache = cache.double()
    scatter_reference(_nhd(cache, layout), x.double(), positions, table, 0, *_angles(turn, piece, torch.float64))
    return cache


def _gather_args(dim: int, piece: RotarySlice | None, layout: str, device: torch.device, small: bool) -> tuple:
    cache, positions, table = _paged(device, small, dim, layout)
    return cache, positions, table, _turn(piece, len(positions), device)


def _run_gather(piece, layout, cache, positions, table, turn) -> Tensor:
    return gather(cache, positions, table, 0, 0, turn, piece, layout)


def _torch_gather(piece, layout, cache, positions, table, turn) -> Tensor:
    return gather_reference(_nhd(cache, layout), positions, table, 0, 0, *_angles(turn, piece, cache.dtype))


def _wide_gather(piece, layout, cache, positions, table, turn) -> Tensor:
    return gather_reference(_nhd(cache, layout).double(), positions, table, 0, 0, *_angles(turn, piece, torch.float64))


def _moved_scatter(args: tuple, result: Tensor) -> int:
    """Tokens read and written, and the angles."""
    _, x, _, _, turn = args
    return 2 * x.nbytes + (0 if turn is None else 2 * turn.cos.nbytes)


def _moved_gather(args: tuple, result: Tensor) -> int:
    return 2 * result.nbytes + (0 if args[-1] is None else 2 * args[-1].cos.nbytes)


def _plain(name: str, dim: int, piece: RotarySlice | None, layout: str = "NHD") -> list[Example]:
    return [
        Example(
            f"scatter_{name}", partial(_scatter_args, dim, piece, layout), partial(_run_scatter, piece, layout),
            partial(_wide_scatter, piece, layout), 4e-3, _moved_scatter, streaming=("scatter_kernel",),
            rivals={"torch": partial(_torch_scatter, piece, layout)},
        ),
        Example(
            f"gather_{name}", partial(_gather_args, dim, piece, layout), partial(_run_gather, piece, layout),
            partial(_wide_gather, piece, layout), 4e-3, _moved_gather, streaming=("gather_kernel",),
            rivals={"torch": partial(_torch_gather, piece, layout)},
        ),
    ]  # fmt: skip


def _quantised_args(bits, per_token, group, piece, device: torch.device, small: bool) -> tuple:
    cache, x, positions, table, turn = _scatter_args(128, piece, "NHD", device, small)
    pairing = pairing_of(bits, piece is not None and piece.pairing == "interleaved")
    codes, steps, zeros = quantise_reference(x.float(), per_token, group, bits, False, pairing)
    return cache, Quantised(codes, steps, zeros), positions, table, turn


def _run_load(per_token, group, piece, cache, data, positions, table, turn) -> Tensor:
    scatter_quantised(cache, data, per_token, group, positions, table, 0, turn, piece)
    return cache


def _wide_load(bits, per_token, group, piece, cache, data, positions, table, turn) -> Tensor:
    pairing = pairing_of(bits, piece is not None and piece.pairing == "interleaved")
    codes, steps, zeros = data
    assert zeros is not None, "the examples are asymmetric"
    x = dequantise_reference(codes, steps, zeros, per_token, group, bits, pairing, torch.float64)
    return _wide_scatter(piece, "NHD", cache, x, positions, table, turn)


def _moved_load(args: tuple, result: Tensor) -> int:
    _, data, _, _, turn = args
    read = sum(t.nbytes for t in data)
    return read + data.codes.shape[0] * data.codes.shape[1] * 256 + (0 if turn is None else 2 * turn.cos.nbytes)


def _run_store(bits, per_token, group, piece, cache, positions, table, turn) -> Tensor:
    """Dequantised, as codes at a step's edge may differ by one from those of float64."""
    data = gather_quantised(cache, bits, per_token, group, False, positions, table, 0, 0, turn, piece)
    pairing = pairing_of(bits, piece is not None and piece.pairing == "interleaved")
    codes, steps, zeros = data
    assert zeros is not None, "the examples are asymmetric"
    return dequantise_reference(codes, steps, zeros, per_token, group, bits, pairing, torch.float32)


def _wide_store(bits, per_token, group, piece, cache, positions, table, turn) -> Tensor:
    x = _wide_gather(piece, "NHD", cache, positions, table, turn)
    pairing = pairing_of(bits, piece is not None and piece.pairing == "interleaved")
    return dequantise_reference(
        *quantise_reference(x, per_token, group, bits, False, pairing), per_token, group, bits, pairing, torch.float64
    )


def _quantised(name: str, bits: int, per_token: bool, group: int, piece: RotarySlice | None) -> list[Example]:
    options, kernel = (bits, per_token, group, piece), "tokens" if per_token else "channels"
    # Where only some dims turn, the codes of a pair's two dims lie apart.
    load, store = (
        ((), ()) if piece is PARTIAL else (("scatter_quantised_kernel",), (f"gather_quantised_{kernel}_kernel",))
    )
    return [
        Example(
            f"scatter_quantised_{name}", partial(_quantised_args, *options), partial(_run_load, *options[1:]),
            partial(_wide_load, *options), 4e-3, _moved_load, streaming=load,
        ),
        Example(
            f"gather_quantised_{name}", partial(_gather_args, 128, piece, "NHD"), partial(_run_store, *options),
            partial(_wide_store, *options), 5e-3, streaming=store,
        ),
    ]  # fmt: skip


EXAMPLES = [
    *_plain("keys_neox", 128, HALF_PAIRS),
    *_plain("keys_gptj_hnd", 128, ADJACENT_PAIRS, "HND"),
    *_plain("keys_partial", 80, PARTIAL),
    *_plain("values_hnd", 128, None, "HND"),
    *_quantised("keys_int4_channel", 4, False, 256, HALF_PAIRS),
    *_quantised("keys_int4_channel_gptj", 4, False, 256, ADJACENT_PAIRS),
    *_quantised("keys_int8_channel", 8, False, 256, HALF_PAIRS),
    *_quantised("values_int4_token", 4, True, 128, None),
    *_quantised("values_int4_groups", 4, True, 32, None),
    *_quantised("values_int8_token", 8, True, 128, None),
    *_quantised("keys_int4_partial", 4, False, 256, PARTIAL),
]
