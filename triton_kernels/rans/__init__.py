"""rANS: symbols to bytes and back, 32 interleaved lanes a stream or a stream per lane."""

from lmcache_blend.triton_kernels.rans.ops import (
    Decoded,
    DecodeTables,
    Encoded,
    EncodeTables,
    Rows,
    decode,
    decode_exact,
    decode_lanes,
    encode,
    encode_lanes,
)

__all__ = [
    "DecodeTables",
    "Decoded",
    "EncodeTables",
    "Encoded",
    "Rows",
    "decode",
    "decode_exact",
    "decode_lanes",
    "encode",
    "encode_lanes",
]
