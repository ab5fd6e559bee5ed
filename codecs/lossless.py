"""Lossless: exponents are few and entropy coded, mantissas are noise and kept as packed bits.

As DFloat11 (arXiv 2504.11651) and ZipNN (arXiv 2411.05239) do for weights: float types of 16 and 32 bits are split
into sign, exponent and mantissa. Every channel's exponents are taken relative to its own most frequent one and coded
by rANS with one of a few tables, together with the sign where that saves bits. Bits are moved, never computed with, so
NaN, infinities and -0.0 come back as they were.

    head 2 bytes | most frequent exponents | usual signs | symbols | tables | table of each channel | rANS | mantissas
"""

import zlib
from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from lmcache_blend.codecs import rans
from lmcache_blend.codecs.base import codecs
from lmcache_blend.codecs.container import DTYPES, Header, array, join, split
from lmcache_blend.codecs.entropy import inflate
from lmcache_blend.codecs.grouped import pack, unpack
from lmcache_blend.codecs.pipeline import CODED, PLAIN, PipelineCodec, members
from lmcache_blend.codecs.stages import Plane, Stage
from lmcache_blend.codecs.tables import ESCAPE, Tables, exact
from lmcache_blend.errors import CorruptChunkError

BITS, TABLES, TABLE_ELEMENTS = 12, 8, 8192
FIELDS = {torch.float32: (8, 23), torch.bfloat16: (8, 7), torch.float16: (5, 10)}
"""Bits of exponent and mantissa."""


class ExactCodec(PipelineCodec):
    """What codecs of bit patterns share: one tensor at a time, kept plainly where coding it saves nothing."""

    @abstractmethod
    def pack_tensor(self, x: torch.Tensor) -> bytes | None:
        """x [H, T, D] contiguous, not empty, on the CPU -> bytes; None where it cannot be coded."""

    @abstractmethod
    def unpack_tensor(self, data: memoryview, dtype: torch.dtype, shape: tuple[int, int, int]) -> torch.Tensor:
        """Undo `pack_tensor`. Raises CorruptChunkError."""

    def stages(self, plane: Plane) -> Sequence[Stage]:
        """None: stages work on float32, where a NaN may lose its payload."""
        return ()

    def _encode_plane(self, plane: Plane, layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> bytes:
        ((layer, slot),) = members(plane)
        x = layers[layer][slot].detach().cpu().contiguous()
        coded = self.pack_tensor(x) if x.numel() else None
        if coded is not None and len(coded) < x.nbytes:
            return CODED + coded
        return PLAIN + x.flatten().view(torch.uint8).numpy().tobytes()

    def _decode_plane(
        self, data: memoryview, plane: Plane, header: Header, found: dict[tuple[int, int], torch.Tensor]
    ) -> None:
        if data[:1] != CODED:
            super()._decode_plane(data, plane, header, found)
            return
        if len(plane.shapes) != 1:
            raise CorruptChunkError(f"{len(plane.shapes)} layers are in one segment, this codec writes one")
        layer, slot = members(plane)[0]
        heads, dim = plane.shapes[0][2 * slot : 2 * slot + 2]
        dtype = DTYPES[header.dtypes[layer][slot]]
        found[layer, slot] = self.unpack_tensor(data[1:], dtype, (heads, plane.tokens, dim))


@codecs.register("lossless")
class Lossless(ExactCodec):
    """Bit for bit; about 10.5 bits per element of bfloat16, 13.5 of float16, 26.5 of float32."""

    def pack_tensor(self, x: torch.Tensor) -> bytes | None:
        exponent_bits, mantissa_bits = FIELDS[x.dtype]
        mask = (1 << exponent_bits) - 1
        words = x.view(torch.int16 if x.itemsize == 2 else torch.int32).numpy()
        words = words.view(f"u{x.itemsize}").transpose(0, 2, 1).reshape(-1, x.shape[1])
        exponent, sign = (words >> mantissa_bits & mask).astype(np.int64), (words >> (x.itemsize * 8 - 1)).astype(bool)
        rows = np.arange(len(words))[:, None]
        usual = np.bincount((rows * 256 + exponent).ravel(), minlength=256 * len(words)).reshape(-1, 256).argmax(1)
        flip = sign.mean(1) > 0.5
        symbols = exponent - usual[:, None] & mask
        joint = symbols * 2 + (sign ^ flip[:, None])
        alone, both = np.bincount(symbols.ravel()), np.bincount(joint.ravel())
        signed = np.count_nonzero(both) <= ESCAPE and _bits(both) < _bits(alone) + words.size
        counts, symbols = (both, joint) if signed else (alone, symbols)
        used = np.flatnonzero(counts)
        if len(used) > ESCAPE:
            return None
        index = np.zeros(len(counts), np.int16)
        index[used] = np.arange(len(used))
        q = index[symbols]
        tables, ids = _cluster(np.bincount((rows * len(used) + q).ravel(), minlength=used.size * len(q)), len(q))
        mantissa = words & ((1 << mantissa_bits) - 1)
        # float32 that came from 16 bits ends in zeros: they are not worth storing.
        union = int(np.bitwise_or.reduce(mantissa, None)) | 1 << mantissa_bits
        cut = (union & -union).bit_length() - 1
        rest = mantissa.astype(np.uint32) >> np.uint32(cut)
        if not signed:
            rest |= sign.astype(np.uint32) << np.uint32(mantissa_bits - cut)
        return join(
            [
                bytes([int(signed), cut]),
                zlib.compress(usual.astype(np.uint8).tobytes(), 9),
                zlib.compress(np.packbits(flip).tobytes(), 9) if signed else b"",
                used.astype("<u2").tobytes(),
                zlib.compress(tables.freq[:, : len(used)].astype("<u2").tobytes(), 9),
                zlib.compress(ids.tobytes(), 9),
                rans.encode(q, ids, tables),
                pack(rest, mantissa_bits - cut + (0 if signed else 1)),
            ]
        )

    def unpack_tensor(self, data: memoryview, dtype: torch.dtype, shape: tuple[int, int, int]) -> torch.Tensor:
        heads, tokens, dim = shape
        exponent_bits, mantissa_bits = FIELDS[dtype]
        rows, mask = heads * dim, (1 << exponent_bits) - 1
        head, usual, flip, used, freq, which, stream, rest = split(data, 8)
        if len(head) != 2 or head[0] > 1 or head[1] > mantissa_bits:
            raise CorruptChunkError(f"a tensor's head is {bytes(head).hex()}, not two bytes that this codec writes")
        signed, cut = head
        first = array(inflate(usual, rows), "u1", (rows,))
        palette = array(used, "<u2", (len(used) // 2,)).astype(np.uint32)
        if not 0 < len(palette) <= ESCAPE or palette.max() >> signed > mask:
            raise CorruptChunkError(f"{len(palette)} symbols are not those of a {exponent_bits}-bit exponent")
        raw = inflate(freq, 2 * TABLES * len(palette))
        counts = array(raw, "<u2", (len(raw) // (2 * len(palette)), len(palette))).astype(np.int64)
        if (counts.sum(1) != 1 << BITS).any():
            raise CorruptChunkError(f"frequencies do not sum to {1 << BITS}")
        ids = array(inflate(which, rows), "u1", (rows,))
        symbols = palette[rans.decode(stream, ids, tokens, exact(counts, BITS))]
        width = mantissa_bits - cut + (0 if signed else 1)
        noise = unpack(rest, width, (rows, tokens)).astype(np.uint32)
        if signed:
            flips = np.unpackbits(array(inflate(flip, -(-rows // 8)), "u1", (-(-rows // 8),)), count=rows)
            sign, symbols = symbols & 1 ^ flips[:, None], symbols >> 1
        else:
            sign, noise = noise >> (width - 1), noise & ((1 << width - 1) - 1)
        words = sign << (exponent_bits + mantissa_bits) | (symbols + first[:, None] & mask) << mantissa_bits
        words = (words | noise << cut).astype(f"u{dtype.itemsize}")
        return torch.from_numpy(words.reshape(heads, dim, tokens).transpose(0, 2, 1).copy()).view(dtype)


def _cluster(counts: np.ndarray, rows: int) -> tuple[Tables, np.ndarray]:
    """Counts [R * A] of each row's symbols -> up to 8 tables, fewer for few symbols, and the one of each row [R] uint8.

    k-means with code length for a distance, begun from the rows in order of their entropy.
    """
    counts = counts.reshape(rows, -1).astype(np.float32)
    share = counts / counts.sum(1, keepdims=True)
    order = np.argsort((share * np.log2(np.maximum(share, 1e-9))).sum(1), kind="stable")
    clusters = int(np.clip(counts.sum() // TABLE_ELEMENTS, 1, min(TABLES, rows)))
    ids = np.empty(rows, np.int64)
    ids[order] = np.arange(rows) * clusters // rows
    for _ in range(4):
        # A tenth of a count keeps what a table has not met yet expensive, not impossible.
        p = np.stack([counts[ids == i].sum(0) for i in range(clusters)]) + 0.1
        ids = (counts @ -np.log2(p / p.sum(1, keepdims=True)).T).argmin(1)
    kept, ids = np.unique(ids, return_inverse=True)
    return exact(np.stack([counts[ids == i].sum(0) for i in range(len(kept))]), BITS), ids.astype(np.uint8)


def _bits(counts: np.ndarray) -> float:
    """Ideal bits of symbols that occur that often."""
    p = counts[counts > 0]
    return float(-(p * np.log2(p / p.sum())).sum())
