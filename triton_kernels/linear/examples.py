"""The flagship codec's transform of 1,024 tokens: 2,048 channels (K and V of a layer), 1,330 coefficients, 64 features,
9 classes; small: 63 tokens, 96 channels, 70 coefficients."""

import torch
from torch import Tensor

from lmcache_blend.triton_kernels.example import Example
from lmcache_blend.triton_kernels.linear.ops import Classes, analyse, synthesise
from lmcache_blend.triton_kernels.linear.reference import analyse_reference, synthesise_reference

CLASSES = 9


def classes(tokens: int, ranks: int, generator: torch.Generator) -> tuple[Classes, int]:
    """Tokens of random classes; the last coefficients are coded in the finer classes only. And the symbols' size."""
    kind = torch.randn(tokens, generator=generator).mul(1.5).round().long().add(CLASSES // 2).clamp(0, CLASSES - 1)
    counts = torch.bincount(kind, minlength=CLASSES)
    bounds = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
    dead = torch.arange(ranks)[:, None] * 2 > ranks * (CLASSES + 1 - torch.arange(CLASSES)) / CLASSES * 2
    sizes = torch.where(dead, 0, (counts + 3) // 4 * 4).flatten()
    offsets = torch.where(dead.flatten(), -1, sizes.cumsum(0) - sizes).view(ranks, CLASSES)
    steps = torch.exp2((torch.arange(CLASSES) - CLASSES // 2) / 2).float()
    return Classes(torch.argsort(kind, stable=True), bounds, offsets, steps), int(sizes.sum())


def _sizes(small: bool) -> tuple[int, int, int, int]:
    return (63, 96, 70, 5) if small else (1024, 2048, 1330, 64)


def _synthesise_args(device: torch.device, small: bool) -> tuple:
    tokens, dims, ranks, count = _sizes(small)
    g = torch.Generator().manual_seed(0)
    where, size = classes(tokens, ranks, g)
    symbols = (torch.randn(size, generator=g) * 8).round().to(torch.int16)
    inverse = torch.randn(ranks, dims, generator=g) / ranks**0.5
    predict, base = torch.randn(count, dims, generator=g), torch.randn(dims, generator=g)
    features = torch.randint(-127, 128, (tokens, count), generator=g) / 16
    half = torch.bfloat16 if device.type == "cpu" and small else torch.float16
    floats = (inverse.to(half), base, features.to(half), predict.to(half))
    moved = Classes(*(x.to(device) for x in where))
    return symbols.to(device), moved, *(x.to(device) for x in floats), torch.bfloat16


def _synthesise_reference(
    symbols: Tensor, where: Classes, inverse: Tensor, base: Tensor, features: Tensor, predict: Tensor, _: torch.dtype
) -> Tensor:
    base, features = base.double(), features.double()
    order, bounds, offsets, steps = where
    return synthesise_reference(
        symbols, order, bounds, offsets, steps, inverse.double(), base, features, predict.double(), torch.float64
    )


def _analyse_args(device: torch.device, small: bool) -> tuple:
    tokens, dims, ranks, _ = _sizes(small)
    g = torch.Generator().manual_seed(0)
    where, size = classes(tokens, ranks, g)
    x, base = torch.randn(tokens, dims, generator=g) * 8, torch.randn(tokens, dims, generator=g)
    forward = torch.randn(dims, ranks, generator=g) / dims**0.5
    moved = Classes(*(v.to(device) for v in where))
    return x.to(device, torch.bfloat16), base.to(device), forward.to(device, torch.float16), moved, size


def _symbols(x: Tensor, base: Tensor, forward: Tensor, where: Classes, size: int) -> Tensor:
    """As floats: a product in another order may round to the neighbour of a symbol."""
    return analyse(x, base, forward, where, size)[0].float()


def _analyse_naive(x: Tensor, base: Tensor, forward: Tensor, where: Classes, size: int) -> tuple:
    order, bounds, offsets, steps = where
    return analyse_reference(x, base, forward, order, bounds, offsets, steps, size)


def _analyse_reference(x: Tensor, base: Tensor, forward: Tensor, where: Classes, size: int) -> Tensor:
    order, bounds, offsets, steps = where
    return analyse_reference(x, base, forward.double(), order, bounds, offsets, steps, size)[0].double()


EXAMPLES = [
    Example(
        "synthesise",
        make=_synthesise_args,
        run=synthesise,
        reference=_synthesise_reference,
        tolerance=3e-3,
        flops=lambda args: 2 * len(args[1].order) * args[2].shape[1] * (args[2].shape[0] + args[5].shape[0]),
        matmul=("synthesise_tile",),
        rivals={"torch": lambda s, where, *rest: synthesise_reference(s, *where, *rest)},
    ),
    Example(
        "analyse",
        make=_analyse_args,
        run=_symbols,
        reference=_analyse_reference,
        # A rounding that falls the other way is an error of 1 in symbols of RMS 9.
        tolerance=2e-2,
        flops=lambda args: 2 * args[0].numel() * args[2].shape[1],
        matmul=("analyse_tile",),
        rivals={"torch": _analyse_naive},
    ),
]
