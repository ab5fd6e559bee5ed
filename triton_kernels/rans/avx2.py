"""The inner step of rANS decoding in AVX2: 32 lanes in four vectors, the same stream as the portable loop.

Numba does not vectorise a loop whose lanes draw from one stream. Here the step is written in LLVM's own vector types:
look-ups are gathers, and the words that the lanes of a vector need are spread by a permutation that their mask names
(Giesen, arXiv 1402.3392, section 5). On processors without AVX2 cpu.py's loop does the work.
"""

from typing import Any

import llvmlite.binding
import numba as nb
import numpy as np
from llvmlite import ir
from numba.core import cgutils, config, types
from numba.extending import intrinsic

from lmcache_blend.triton_kernels.rans.reference import MISSING, MISSING_BYTE

I8, I16, I32, I64 = (ir.IntType(n) for n in (8, 16, 32, 64))
V8, V4L = ir.VectorType(I32, 8), ir.VectorType(I64, 4)
SYMBOLS = 0
"""Width of `decode32` that writes symbols instead of values."""


def available() -> bool:
    """Whether numba compiles for a processor with AVX2."""
    name, features = getattr(config, "CPU_NAME", None), getattr(config, "CPU_FEATURES", None)
    if name or features is not None:
        return "+avx2" in (features or "")
    return bool(llvmlite.binding.get_host_cpu_features().get("avx2"))


def _spread() -> np.ndarray:
    """[256, 8] int32: for each mask of lanes, which of the next words each lane takes."""
    taken = (np.arange(256)[:, None] >> np.arange(8)) & 1
    return np.ascontiguousarray(np.maximum(np.cumsum(taken, 1) - 1, 0).astype(np.int32))


SPREAD = _spread()


def _make(width: int) -> Any:
    """decode32(states, lut, values, words, spread, bits, out): one symbol of each lane; returns the words it took.

    All but bits are addresses: of 32 uint32, of 2^bits uint32 (Tables.direct), of 256 x 4 int16 (Tables.values,
    for widths 2 and 4), of the next words, of SPREAD, of where the 32 x max(1, width) int16 go.
    """

    @intrinsic
    def decode32(typing, states, lut, values, words, spread, bits, out):
        def emit(context, builder: ir.IRBuilder, signature, arguments):
            x_at, lut_at, values_at, words_at, spread_at, bits64, out_at = arguments
            module = builder.module

            def function(name, result, *takes):
                return cgutils.get_or_insert_function(module, ir.FunctionType(result, takes), name)

            def splat(value):
                one = builder.insert_element(ir.Constant(V8, ir.Undefined), value, ir.Constant(I32, 0))
                return builder.shuffle_vector(
                    one, ir.Constant(V8, ir.Undefined), ir.Constant(ir.VectorType(I32, 8), [0] * 8)
                )

            def const(value):
                return ir.Constant(V8, [value] * 8)

            def load(kind, address, align):
                return builder.load(builder.inttoptr(address, kind.as_pointer()), align=align)

            def store(value, address):
                builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=2)

            def plus(address, offset):
                return builder.add(address, ir.Constant(I64, offset))

            byte_ptr = I8.as_pointer()
            gather8 = function("llvm.x86.avx2.gather.d.d.256", V8, V8, byte_ptr, V8, V8, I8)
            gather4 = function("llvm.x86.avx2.gather.d.q.256", V4L, V4L, byte_ptr, ir.VectorType(I32, 4), V4L, I8)
            permute = function("llvm.x86.avx2.permd", V8, V8, V8)
            count = function("llvm.ctpop.i64", I64, I64)
            bits32 = builder.trunc(bits64, I32)
            mask = splat(builder.sub(builder.shl(ir.Constant(I32, 1), bits32), ir.Constant(I32, 1)))
            shift = splat(bits32)
            luts, table = builder.inttoptr(lut_at, byte_ptr), builder.inttoptr(values_at, byte_ptr)
            all8, all4 = const(-1), ir.Constant(V4L, [-1] * 4)
            at = words_at
            for group in range(4):
                place = plus(x_at, 32 * group)
                x = load(V8, place, 4)
                e = builder.call(gather8, [const(0), luts, builder.and_(x, mask), all8, ir.Constant(I8, 4)])
                freq = builder.add(builder.lshr(e, const(20)), const(1))
                bias = builder.and_(builder.lshr(e, const(8)), const(4095))
                s = builder.add(builder.mul(freq, builder.lshr(x, shift)), bias)
                need = builder.icmp_unsigned("<", s, const(1 << 16))
                lanes = builder.zext(builder.bitcast(need, I8), I64)
                next8 = builder.zext(load(ir.VectorType(I16, 8), at, 2), V8)
                row = builder.add(spread_at, builder.shl(lanes, ir.Constant(I64, 5)))
                fresh = builder.call(permute, [next8, load(V8, row, 4)])
                x = builder.select(need, builder.or_(builder.shl(s, const(16)), fresh), s)
                builder.store(x, builder.inttoptr(place, V8.as_pointer()), align=4)
                at = builder.add(at, builder.shl(builder.call(count, [lanes]), ir.Constant(I64, 1)))
                symbol = builder.and_(e, const(255))
                if width == 4:
                    for half in range(2):
                        lanes4 = ir.Constant(ir.VectorType(I32, 4), list(range(4 * half, 4 * half + 4)))
                        index = builder.shuffle_vector(symbol, ir.Constant(V8, ir.Undefined), lanes4)
                        got = builder.call(gather4, [ir.Constant(V4L, [0] * 4), table, index, all4, ir.Constant(I8, 8)])
                        store(got, plus(out_at, 64 * group + 32 * half))
                    continue
                if width == 2:
                    pair = builder.call(gather8, [const(0), table, symbol, all8, ir.Constant(I8, 8)])
                    store(pair, plus(out_at, 32 * group))
                    continue
                if width == 1:
                    value = builder.ashr(builder.shl(e, const(24)), const(24))
                    escape = builder.icmp_signed("==", value, const(MISSING_BYTE))
                    symbol = builder.select(escape, const(MISSING), value)
                store(builder.trunc(symbol, ir.VectorType(I16, 8)), plus(out_at, 16 * group))
            return builder.lshr(builder.sub(at, words_at), ir.Constant(I64, 1))

        return types.int64(*[types.int64] * 7), emit

    return decode32


_one, _two, _four, _symbols = (_make(width) for width in (1, 2, 4, SYMBOLS))


@nb.njit(nogil=True, cache=True, boundscheck=False)
def decode_blocks(words, at, count, x, lut, values, spread, bits, width, blocks, out):
    """`blocks` times 32 symbols of one table into out [blocks * 32 * width] int16; returns where the next word is.

    words: [count + 32] uint16. x: [32] uint32, changed. Returns -1 where the words run out.
    """
    base, state, table, map_at, to = (
        words.ctypes.data,
        x.ctypes.data,
        lut.ctypes.data,
        spread.ctypes.data,
        out.ctypes.data,
    )
    val = values.ctypes.data
    for b in range(blocks):
        if at > count:
            return np.int64(-1)
        if width == 1:
            at += _one(state, table, val, base + 2 * at, map_at, bits, to + 64 * b)
        elif width == 2:
            at += _two(state, table, val, base + 2 * at, map_at, bits, to + 128 * b)
        elif width == 4:
            at += _four(state, table, val, base + 2 * at, map_at, bits, to + 256 * b)
        else:
            at += _symbols(state, table, val, base + 2 * at, map_at, bits, to + 64 * b)
    return at
