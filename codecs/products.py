"""Products of float32 matrices on CPU, by oneDNN."""

from typing import Any

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] times b [K, N], float32 on CPU, of any strides.

    torch.mm goes to MKL, which is half as fast as oneDNN on AMD's processors with AVX-512, and a fourth faster on those
    without. torch calls oneDNN for float32 only by the operator that its compiler puts in; where that is missing or
    refuses, this is torch.mm.
    """
    if _onednn is not None and a.numel() and b.numel():
        return _onednn(a, b.T, None, "none", [], "")
    return torch.mm(a, b)


def _works(operator: Any) -> bool:
    sample = torch.arange(6.0).view(2, 3)
    try:
        return torch.equal(operator(sample, sample, None, "none", [], ""), sample @ sample.T)
    except (RuntimeError, TypeError):
        return False


_onednn = getattr(getattr(torch.ops, "mkldnn", None), "_linear_pointwise", None)
if _onednn is not None and not ("AVX512" in torch.backends.cpu.get_cpu_capability() and _works(_onednn)):
    _onednn = None
