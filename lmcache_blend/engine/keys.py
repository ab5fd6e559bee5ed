"""Keys of KV chunks: SHA-256 over everything that the KV depends on, so that no other KV can answer to a key."""

import hashlib

from torch import Tensor


def chunk_key(fingerprint: str, salt: str, behind: bytes, tokens: Tensor) -> bytes:
    """Key of a chunk: the model's fingerprint, the tenant's salt, what chunks are encoded behind, and the token ids."""
    digest = hashlib.sha256()
    for part in (fingerprint.encode(), salt.encode(), behind, tokens.cpu().numpy().tobytes()):
        digest.update(len(part).to_bytes(8, "little") + part)  # lengths keep ("ab", "c") and ("a", "bc") apart
    return digest.digest()


def context_digest(tokens: Tensor, regime: bytes) -> bytes:
    """Digest of the tokens before a chunk and of the rotary tables in force (dynamic scaling depends on the length)."""
    return hashlib.sha256(regime + tokens.cpu().numpy().tobytes()).digest()
