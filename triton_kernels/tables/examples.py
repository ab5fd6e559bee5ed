"""Tables of a chunk of 256 tokens of a layer with 1,024 channels."""

import torch

from lmcache_blend.triton_kernels.example import Example
from lmcache_blend.triton_kernels.tables.ops import frequencies, histogram, slots
from lmcache_blend.triton_kernels.tables.reference import frequencies_reference, histogram_reference, slots_reference


def symbols(device: torch.device, small: bool) -> torch.Tensor:
    """[R, T] int16, Laplace of spreads from peaked to flat."""
    rows = 24 if small else 1024
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(-1, 2, rows)[:, None]
    uniform = torch.rand(rows, 256, generator=generator) - 0.5
    x = -spread * uniform.sign() * torch.log1p(-2 * uniform.abs().clamp_max(0.4999))
    return x.round().to(torch.int16).to(device)


def _counts(device: torch.device, small: bool) -> torch.Tensor:
    return histogram_reference(symbols(torch.device("cpu"), small)[:, :64] % 32, 31).double().to(device)


def _naive(q: torch.Tensor, reach: int) -> torch.Tensor:
    return torch.stack([torch.bincount(row.clamp(-reach, reach).int() + reach, minlength=2 * reach + 1) for row in q])


EXAMPLES = [
    Example(
        "histogram",
        make=lambda device, small: (symbols(device, small), 127),
        run=histogram,
        reference=histogram_reference,
        rivals={"torch.bincount by row": _naive},
    ),
    Example(
        "frequencies",
        make=lambda device, small: (_counts(device, small), 8),
        run=frequencies,
        reference=frequencies_reference,
        rivals={"numpy": frequencies_reference},
    ),
    Example(
        "slots",
        make=lambda device, small: (frequencies_reference(_counts(torch.device("cpu"), small), 8).to(device), 8),
        run=slots,
        reference=slots_reference,
        rivals={"torch": slots_reference},
    ),
]
