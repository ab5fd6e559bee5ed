"""Copies that go past the caches, by as many threads as torch uses: what a tier takes in is not read again soon.

A copy through the caches reads the lines that it is about to overwrite, half as much traffic again. The C library goes
past them only for pieces that do not fit the caches; the layers of a chunk do, one by one.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

STREAMED = 1 << 16
"""Pieces of fewer bytes are copied through the caches."""
SHARED = 2 << 20
"""Bytes that are worth another thread."""
WIDE = 128
"""Bytes of one step of the loop."""

Piece = tuple[int, int, int]
"""Address to copy to, address to copy from, bytes. The two must not overlap."""


def copy_all(pieces: Sequence[Piece]) -> None:
    """Copy all pieces; other threads of Python may run."""
    table = np.array(pieces, np.int64).reshape(-1, 3)
    parts = min(torch.get_num_threads(), 1 + int(table[:, 2].sum()) // SHARED)
    others = [_pool(parts).submit(_copy, table, i, parts) for i in range(1, parts)]
    _copy(table, 0, parts)
    for other in others:
        other.result()


@lru_cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "kv-copy")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of the threads


@intrinsic
def _cached(typing_context: Any, target: Any, source: Any, nbytes: Any) -> Any:
    """The C library's copy."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        to, at, size = arguments
        byte = ir.IntType(8).as_pointer()
        cgutils.raw_memcpy(builder, builder.inttoptr(to, byte), builder.inttoptr(at, byte), size, 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def _streaming(typing_context: Any, target: Any, source: Any, nbytes: Any) -> Any:
    """Store nbytes (a multiple of WIDE) with the hint that nobody reads them soon; target is a multiple of 32."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        to, at, size = arguments
        vector = ir.VectorType(ir.IntType(64), 4)
        hint = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        loop, done = builder.append_basic_block("stream"), builder.append_basic_block("streamed")
        before = builder.block
        zero = ir.Constant(size.type, 0)
        builder.cbranch(builder.icmp_signed(">", size, zero), loop, done)
        builder.position_at_end(loop)
        i = builder.phi(size.type)
        i.add_incoming(zero, before)
        for step in range(0, WIDE, 32):
            offset = builder.add(i, ir.Constant(size.type, step))
            value = builder.load(builder.inttoptr(builder.add(at, offset), vector.as_pointer()), align=1)
            store = builder.store(value, builder.inttoptr(builder.add(to, offset), vector.as_pointer()), align=32)
            store.set_metadata("nontemporal", hint)
        following = builder.add(i, ir.Constant(size.type, WIDE))
        i.add_incoming(following, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, size), loop, done)
        builder.position_at_end(done)
        # Such stores are not ordered with others, and another thread will be told that the bytes are there.
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@numba.njit(nogil=True, cache=True)
def _copy(table: np.ndarray, part: int, parts: int) -> None:
    """Copy one of equal parts of every piece. table: [N, 3] int64, rows as in Piece."""
    for row in range(len(table)):
        target, source, size = table[row]
        start, end = size * part // parts, size * (part + 1) // parts
        target, source, size = target + start, source + start, end - start
        if size < STREAMED:
            _cached(target, source, size)  # pyright: ignore[reportCallIssue]
            continue
        head = -target % 32
        middle = (size - head) // WIDE * WIDE
        done = head + middle
        _cached(target, source, head)  # pyright: ignore[reportCallIssue]
        _streaming(target + head, source + head, middle)  # pyright: ignore[reportCallIssue]
        _cached(target + done, source + done, size - done)  # pyright: ignore[reportCallIssue]
