"""Chunks for the engine's tests."""

import hashlib
import os

import torch

from lmcache_blend.testing import same_bits
from lmcache_blend.types import KVChunk


def key(i: int, salt: str = "") -> bytes:
    from lmcache_blend.engine.keys import tenant

    return tenant(salt) + hashlib.sha256(f"{salt}/{i}".encode()).digest()[:28]


def keys(n: int, salt: str = "") -> list[bytes]:
    return [key(i, salt) for i in range(n)]


def chunk(i: int, tokens: int = 16, layers: int = 3, dim: int = 16) -> KVChunk:
    """Known by its number: what a key returns can be checked against what belongs to it."""
    rng = torch.Generator().manual_seed(i)
    pairs = tuple(
        (torch.randn(2, tokens, dim, generator=rng), torch.randn(2, tokens, dim, generator=rng)) for _ in range(layers)
    )
    return KVChunk(torch.arange(tokens) + i, pairs, hashlib.sha256(bytes([i % 256])).digest())


def equal(a: KVChunk | None, b: KVChunk) -> bool:
    return a is not None and torch.equal(a.tokens, b.tokens) and a.exact_after == b.exact_after and same_bits(a, b)


def flip(path):
    """Damage a file: another bit in its middle."""
    with open(path, "r+b") as file:
        file.seek(os.path.getsize(path) // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 16]))
