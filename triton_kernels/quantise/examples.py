"""Quantisation of 4,096 tokens of 8 heads of 128 dims in bfloat16; small: 63 tokens of 2 heads of 80."""

from typing import Any

import torch
from torch import Tensor

from lmcache_blend.triton_kernels.example import Example
from lmcache_blend.triton_kernels.quantise.ops import dequantise, quantise, statistics
from lmcache_blend.triton_kernels.quantise.reference import (
    dequantise_reference,
    quantise_reference,
    statistics_reference,
)


def keys(device: torch.device, small: bool) -> Tensor:
    """[H, T, D] bfloat16 with a few loud channels."""
    heads, tokens, dims = (2, 63, 80) if small else (8, 4096, 128)
    x = torch.randn(heads, tokens, dims, generator=torch.Generator().manual_seed(0))
    x[:, :, ::16] *= 12
    return x.to(device, torch.bfloat16)


def _quantise(x: Tensor, axis: str, group: int, bits: int, symmetric: bool, pairing: str) -> tuple:
    return tuple(t for t in quantise(x, axis, group, bits, symmetric, pairing) if t is not None)  # type: ignore[arg-type]


def _quantise_reference(x: Tensor, axis: str, *rest: Any) -> tuple:
    q, step, zero = quantise_reference(x, axis == "token", *rest)
    return (q, step, zero) if zero.numel() else (q, step)


def _codes(device: torch.device, small: bool, axis: str, group: int, bits: int, pairing: str) -> tuple:
    x = keys(torch.device("cpu"), small)
    made = (t.to(device) for t in quantise_reference(x, axis == "token", group, bits, False, pairing))
    return *made, axis, group, bits, pairing, torch.bfloat16


def _dequantise_reference(
    q: Tensor, step: Tensor, zero: Tensor, axis: str, group: int, bits: int, pairing: str, _: torch.dtype
) -> Tensor:
    return dequantise_reference(q, step, zero, axis == "token", group, bits, pairing, torch.float64)


def _statistics_reference(x: Tensor, axis: str, group: int) -> tuple:
    return statistics_reference(x.double(), axis == "token", group)


def _example(axis: str, group: int, bits: int, pairing: str, kernel: str) -> list[Example]:
    """Both directions. In small examples the group of a token is its head or 8 dims."""

    def size(small: bool) -> int:
        return {128: 80, 64: 8}[group] if small and axis == "token" else group

    name = f"{axis}_int{bits}"
    return [
        Example(
            f"quantise_{name}",
            make=lambda device, small: (keys(device, small), axis, size(small), bits, False, pairing),
            run=_quantise,
            reference=_quantise_reference,
            streaming=(f"quantise_{kernel}",),
            rivals={"torch": _quantise_reference},
        ),
        Example(
            f"dequantise_{name}",
            make=lambda device, small: _codes(device, small, axis, size(small), bits, pairing),
            run=dequantise,
            reference=_dequantise_reference,
            tolerance=2.5e-3,
            streaming=(f"dequantise_{kernel}",),
            rivals={
                "torch": lambda q, step, zero, axis, *rest: dequantise_reference(q, step, zero, axis == "token", *rest)
            },
        ),
    ]


EXAMPLES = [
    *_example("token", 128, 8, "none", "groups"),
    *_example("channel", 64, 8, "none", "groups"),
    *_example("token", 64, 4, "half", "pairs"),
    *_example("channel", 64, 4, "interleaved", "pair_channels"),
    Example(
        "statistics",
        make=lambda device, small: (keys(device, small), "channel", 256),
        run=statistics,
        reference=_statistics_reference,
        tolerance=1e-5,
        rivals={"torch": lambda x, axis, group: statistics_reference(x, axis == "token", group)},
    ),
]
