"""Copies that go past the caches: what a tier takes in is not read again soon.

A copy through the caches reads the lines that it is about to overwrite, half as much traffic again. The C library goes
past them only for pieces that do not fit the caches; the layers of a chunk do, one by one.
"""

import ctypes
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

STREAMED = 1 << 17
"""Pieces of fewer bytes are copied through the caches."""
WIDE = 128
"""Bytes of one step of the loop."""


def copy(target: int, source: int, nbytes: int) -> None:
    """Copy bytes between addresses, which must not overlap; other threads may run."""
    if nbytes < STREAMED:
        ctypes.memmove(target, source, nbytes)
        return
    head = -target % 32
    middle = (nbytes - head) // WIDE * WIDE
    done = head + middle
    if head:
        ctypes.memmove(target, source, head)
    _stream(target + head, source + head, middle)
    if done < nbytes:
        ctypes.memmove(target + done, source + done, nbytes - done)


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
def _stream(target: int, source: int, nbytes: int) -> None:
    _streaming(target, source, nbytes)  # pyright: ignore[reportCallIssue]
