"""Triton's interpreter made strict, for tests in a process with TRITON_INTERPRET=1.

Importing it patches the interpreter of triton 3.7.1:
- Comparisons give booleans. bfloat16 casts round to nearest even and tl.dot multiplies values, not bit patterns; any
  other arithmetic on bfloat16, which the interpreter gets wrong, is an error: kernels compute in float32.
- A load, store or atomic outside of the tensors of the launch is an IndexError instead of a crash or of silence. The
  extent is the tensor's own, not that of the storage it is a view of.
- `both_orders` runs a call with its programs first in the grid's order, then in reverse: results must be equal to the
  bit, so that no program builds on what another one left.
- `traffic` counts the bytes that kernels load and store, by argument.
- `poison` fills what torch.empty gives, with NaN or a large integer: what a kernel leaves unwritten shows.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
from torch import Tensor

from lmcache_blend.triton_kernels.example import tensors

if os.environ.get("TRITON_INTERPRET") != "1":
    raise ImportError("kernel_lab needs a process of its own, started with TRITON_INTERPRET=1")
if not triton.__version__.startswith("3.7."):
    raise ImportError(f"kernel_lab patches the interpreter of triton 3.7, not of {triton.__version__}")

Builder, Handle, Grid = interpreter.InterpreterBuilder, interpreter.TensorHandle, interpreter.GridExecutor

_extents: list[tuple[str, int, int]] = []
_traffic: Counter[tuple[str, str]] | None = None
_reverse = False


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _values(handle: Any) -> Any:
    """bfloat16 bit patterns -> float32."""
    if not _is_bf16(handle):
        return handle
    return Handle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _patterns(x: np.ndarray) -> Any:
    """float32 -> bfloat16 bit patterns, to the nearest, ties to even."""
    x = np.ascontiguousarray(x, np.float32)
    bits = x.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return Handle(np.where(np.isnan(x), np.uint16(0x7FC0), rounded), tl.bfloat16)


def _patch_bfloat16() -> None:
    binary, unary, dot, cast, float_cast = (
        Builder.binary_op,
        Builder.unary_op,
        Builder.create_dot,
        Builder.cast_impl,
        Builder.create_fp_to_fp,
    )

    def no_arithmetic(*handles: Any) -> None:
        if any(_is_bf16(h) for h in handles):
            raise TypeError("arithmetic on bfloat16: cast to float32 first")

    def binary_op(self, a, b, op):
        no_arithmetic(a, b)
        out = binary(self, a, b, op)
        # Else a comparison has the type of what it compares, and becomes a float when it is splat.
        return Handle(out.data, tl.int1) if out.data.dtype == np.bool_ else out

    def unary_op(self, a, op):
        no_arithmetic(a)
        return unary(self, a, op)

    def cast_impl(self, source, kind):
        if _is_bf16(source):
            return source if kind.scalar == tl.bfloat16 else cast(self, _values(source), kind)
        if kind.scalar == tl.bfloat16:
            single = source.data if source.dtype.scalar == tl.float32 else cast(self, source, tl.float32).data
            return _patterns(single)
        return cast(self, source, kind)

    def create_fp_to_fp(self, source, kind, mode):
        nearest = mode in (None, interpreter._ir.ROUNDING_MODE.RTNE)
        if nearest and tl.bfloat16 in (source.dtype.scalar, kind.scalar):
            return self.cast_impl(source, kind)
        return float_cast(self, source, kind, mode)

    Builder.binary_op, Builder.unary_op = binary_op, unary_op
    Builder.create_dot = lambda self, a, b, *rest: dot(self, _values(a), _values(b), *rest)
    Builder.cast_impl, Builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    Builder.get_bf16 = lambda self, value: _patterns(np.array([value]))

    reduce = interpreter.ReduceOps.apply_impl

    def apply_impl(self, inputs):
        no_arithmetic(*(x.handle for x in inputs))
        return reduce(self, inputs)

    interpreter.ReduceOps.apply_impl = apply_impl


def _patch_memory() -> None:
    start, load, store, atomic, swap = (
        Grid._init_args_hst,
        Builder.create_masked_load,
        Builder.create_masked_store,
        Builder.create_atomic_rmw,
        Builder.create_atomic_cas,
    )

    def init_args(self, args, named):
        args_host, named_host = start(self, args, named)
        _extents.clear()
        for name, value in [*zip(self.arg_names, args_host, strict=False), *named_host.items()]:
            if isinstance(value, Tensor) and value.numel():
                last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
                _extents.append((name, value.data_ptr(), value.data_ptr() + (last + 1) * value.element_size()))
        return args_host, named_host

    def visit(kind, pointers, mask):
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        live = np.True_ if mask is None else mask.data
        at = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, live.shape))
        at = at[np.broadcast_to(live, at.shape)]
        inside = np.zeros(at.shape, bool)
        for name, low, high in _extents:
            here = ~inside & (at >= low) & (at + np.uint64(size) <= high)
            inside |= here
            if _traffic is not None and here.any():
                _traffic[name, kind] += int(here.sum()) * size
        if not inside.all():
            raise IndexError(f"{int((~inside).sum())} of {inside.size} lanes {kind} outside of every tensor")

    def masked_load(self, pointers, mask, *rest):
        visit("load", pointers, mask)
        return load(self, pointers, mask, *rest)

    def masked_store(self, pointers, value, mask, *rest):
        visit("store", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def atomic_rmw(self, op, pointers, value, mask, *rest):
        visit("store", pointers, mask)
        return atomic(self, op, pointers, value, mask, *rest)

    def atomic_cas(self, pointers, *rest):
        visit("store", pointers, None)
        return swap(self, pointers, *rest)

    Grid._init_args_hst = init_args
    Builder.create_masked_load, Builder.create_masked_store = masked_load, masked_store
    Builder.create_atomic_rmw, Builder.create_atomic_cas = atomic_rmw, atomic_cas


def _patch_order() -> None:
    place = Builder.set_grid_idx

    def set_grid_idx(self, *index):
        if _reverse:
            index = tuple(n - 1 - i for n, i in zip(self.grid_dim, index, strict=True))
        place(self, *index)

    Builder.set_grid_idx = set_grid_idx


_patch_bfloat16()
_patch_memory()
_patch_order()


def both_orders(call: Callable[[], Any]) -> Any:
    """The call's result; AssertionError where it depends on the order of programs. The call makes its own buffers."""
    global _reverse
    first = call()
    _reverse = True
    try:
        second = call()
    finally:
        _reverse = False
    for a, b in zip(tensors(first), tensors(second), strict=True):
        assert torch.equal(_bits(a), _bits(b)), "the result depends on the order of programs"
    return first


@contextmanager
def traffic() -> Iterator[Counter[tuple[str, str]]]:
    """(argument's name, "load" or "store") -> bytes of all launches within."""
    global _traffic
    _traffic = Counter()
    try:
        yield _traffic
    finally:
        _traffic = None


@contextmanager
def poison() -> Iterator[None]:
    """Within it, torch.empty and its relatives give NaN, or the integer 0x5A in every byte."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def filled(*args: Any, **named: Any) -> Tensor:
            out = make(*args, **named)
            if out.is_floating_point():
                return out.fill_(float("nan"))
            if out.numel() and out.dtype != torch.bool:
                out.untyped_storage().fill_(0x5A)
            return out

        return filled

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")):
            patch.setattr(owner, name, poisoned(getattr(owner, name)))
        yield


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)
