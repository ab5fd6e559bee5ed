"""Tables: checks, dispatch, launch settings."""

import torch
from torch import Tensor

from lmcache_blend.triton_kernels.launch import launch, on_triton
from lmcache_blend.triton_kernels.operator import operator
from lmcache_blend.triton_kernels.tables import cpu
from lmcache_blend.triton_kernels.tables.reference import frequencies_reference

BLOCK = 1024


def histogram(q: Tensor, reach: int) -> Tensor:
    """q [R, T] int16 -> [R, 2 reach + 1] float32 counts of -reach..reach, larger values counted at the ends.

    Raises ValueError where q is no matrix of int16 or reach is outside 1 to 2047.
    """
    if q.dim() != 2 or q.dtype != torch.int16:
        raise ValueError(f"symbols are {q.dtype} {tuple(q.shape)}, not [R, T] int16")
    if not 1 <= reach <= 2047:
        raise ValueError(f"reach = {reach}: choose 1 to 2047")
    return _histogram(q, reach)


def frequencies(counts: Tensor, bits: int) -> Tensor:
    """counts [n, A] float64, A <= 256 -> [n, A] uint16 that sum to 2^bits, at least 1 where the count is not 0.

    Units beyond the floor go where they shorten the code most. Raises ValueError where counts or bits do not fit.
    """
    if counts.dim() != 2 or not 1 <= counts.shape[1] <= 256 or counts.dtype != torch.float64:
        raise ValueError(f"counts are {counts.dtype} {tuple(counts.shape)}, not [n, up to 256] float64")
    if not 8 <= bits <= 15:
        raise ValueError(f"bits = {bits}: choose 8 to 15, so that each of 256 symbols can have a frequency")
    return _frequencies(counts.contiguous(), bits)


def slots(freq: Tensor, bits: int) -> Tensor:
    """freq [n, A] uint16 that sum to 2^bits, A <= 256 -> [n, 2^bits] uint32 by slot.

    An entry has the frequency - 1 (12 bits), slot - start of its symbol (12), the symbol (8). Raises ValueError where
    shapes do not fit; rows of another sum give an undefined table.
    """
    if freq.dim() != 2 or freq.shape[1] > 256 or freq.dtype != torch.uint16:
        raise ValueError(f"frequencies are {freq.dtype} {tuple(freq.shape)}, not [n, up to 256] uint16")
    if not 1 <= bits <= 12:
        raise ValueError(f"bits = {bits}: choose 1 to 12")
    return _slots(freq.contiguous(), bits)


def power_of_2(n: int) -> int:
    """The next one, at least 16: smaller tiles leave most of a warp idle anyway."""
    return max(16, 1 << max(n - 1, 0).bit_length())


def _run_histogram(q: Tensor, reach: int) -> Tensor:
    out = _fake_histogram(q, reach)
    if on_triton(q):
        from lmcache_blend.triton_kernels.tables import kernels

        if q.stride(1) != 1:
            q = q.contiguous()
        rows, span = out.shape
        block = min(BLOCK, power_of_2(q.shape[1]))
        launch(
            kernels.histogram_rows, (rows,), q, out, q.shape[1], q.stride(0), span, reach, BINS=power_of_2(span),
            BLOCK=block,
        )  # fmt: skip
        return out
    return torch.from_numpy(cpu.histogram(q.numpy(), reach))


def _fake_histogram(q: Tensor, reach: int) -> Tensor:
    return q.new_empty((q.shape[0], 2 * reach + 1), dtype=torch.float32)


def _run_frequencies(counts: Tensor, bits: int) -> Tensor:
    if on_triton(counts):
        from lmcache_blend.triton_kernels.tables import kernels

        out, (rows, size) = _fake_frequencies(counts, bits), counts.shape
        launch(kernels.normalise_rows, (rows,), counts, out, size, BITS=bits, SIZE=power_of_2(size), num_warps=8)
        return out
    return frequencies_reference(counts, bits)


def _fake_frequencies(counts: Tensor, bits: int) -> Tensor:
    return counts.new_empty(counts.shape, dtype=torch.uint16)


def _run_slots(freq: Tensor, bits: int) -> Tensor:
    if on_triton(freq):
        from lmcache_blend.triton_kernels.tables import kernels

        out, (tables, size) = _fake_slots(freq, bits), freq.shape
        block = min(256, 1 << bits)
        launch(
            kernels.slot_table, (tables, (1 << bits) // block), freq, out, size, BITS=bits, SYMBOLS=power_of_2(size),
            BLOCK=block,
        )  # fmt: skip
        return out
    return torch.from_numpy(cpu.slots(freq.numpy(), bits))


def _fake_slots(freq: Tensor, bits: int) -> Tensor:
    return freq.new_empty((freq.shape[0], 1 << bits), dtype=torch.uint32)


_histogram = operator("histogram", _run_histogram, _fake_histogram)
_frequencies = operator("frequencies", _run_frequencies, _fake_frequencies)
_slots = operator("slots", _run_slots, _fake_slots)
