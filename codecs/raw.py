"""The codec that keeps KV as it is: safetensors behind a checksum, optionally cast to another float type.

Layout: magic (8 bytes), SHA-256 of the rest (32 bytes), then one safetensors file with the tensors
"tokens" [T] int64, "k<i>" [H, T, Dk] and "v<i>" [H, T, Dv] of layer i, and, where the chunk has that digest,
"exact_after" [n] uint8.
"""

import hashlib
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from lmcache_blend.codecs.base import codecs
from lmcache_blend.config import Config
from lmcache_blend.errors import ConfigError, CorruptChunkError
from lmcache_blend.types import KVChunk

MAGIC = b"LMCBRAW1"
HEADER_BYTES = len(MAGIC) + hashlib.sha256().digest_size


@codecs.register("raw")
class Raw(Config):
    """Tensors as they are; 16 or 32 bits per element of K and V, no loss without `dtype`."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Float type that K and V are stored in; null keeps their own."""

    def encode(self, chunk: KVChunk) -> bytes:
        """Raises ConfigError where a value is too large for float16."""
        tensors = {"tokens": chunk.tokens.to("cpu", torch.long, copy=True).contiguous()}
        for i, (k, v) in enumerate(chunk.layers):
            tensors[f"k{i}"], tensors[f"v{i}"] = self._cast(k), self._cast(v)
        if chunk.exact_after is not None:
            tensors["exact_after"] = torch.tensor(list(chunk.exact_after), dtype=torch.uint8)
        body = save(tensors)
        return MAGIC + hashlib.sha256(body).digest() + body

    def decode(self, data: bytes) -> KVChunk:
        data = bytes(data)
        if len(data) < HEADER_BYTES or not data.startswith(MAGIC):
            raise CorruptChunkError(f"{len(data)} bytes do not start with the header of a raw chunk")
        body = data[HEADER_BYTES:]
        if hashlib.sha256(body).digest() != data[len(MAGIC) : HEADER_BYTES]:
            raise CorruptChunkError(f"a raw chunk of {len(data)} bytes does not match its checksum")
        try:
            return _chunk(load(body))
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CorruptChunkError(f"raw chunk with a valid checksum is malformed: {error}") from None

    def get_config(self) -> dict[str, Any]:
        return {"id": "raw", **self.model_dump()}

    def _cast(self, x: torch.Tensor) -> torch.Tensor:
        # A copy, because safetensors refuses tensors that share memory, as K and V of one allocation do.
        dtype = getattr(torch, self.dtype) if self.dtype else x.dtype
        out = x.detach().to("cpu", dtype, copy=True).contiguous()
        if self.dtype == "float16" and (out.isinf() & x.isfinite().cpu()).any():
            largest = float(x[x.isfinite()].abs().max())
            raise ConfigError(f"KV reaches {largest:.3g}, float16 ends at 65504; use dtype bfloat16")
        return out


def _chunk(tensors: dict[str, torch.Tensor]) -> KVChunk:
    """Tensors by name to a chunk; raises ValueError or KeyError where names, shapes or types do not fit."""
    tokens = tensors.pop("tokens")
    if tokens.dtype != torch.long or tokens.dim() != 1:
        raise ValueError(f"tokens are {tokens.dtype} {tuple(tokens.shape)}, not int64 [T]")
    digest = tensors.pop("exact_after", None)
    if digest is not None and (digest.dtype != torch.uint8 or digest.dim() != 1):
        raise ValueError(f"exact_after is {digest.dtype} {tuple(digest.shape)}, not uint8 [n]")
    layers = tuple((tensors[f"k{i}"], tensors[f"v{i}"]) for i in range(len(tensors) // 2))
    if len(tensors) != 2 * len(layers):
        raise ValueError(f"{len(tensors)} tensors are not pairs of K and V")
    for name, x in tensors.items():
        if not x.is_floating_point() or x.dim() != 3 or x.shape[1] != len(tokens):
            raise ValueError(f"{name} is {x.dtype} {tuple(x.shape)}, not float [H, {len(tokens)}, D]")
    return KVChunk(tokens, layers, None if digest is None else bytes(digest.tolist()))
