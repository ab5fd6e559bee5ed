"""Keys of KV chunks: SHA-256 over everything that the KV depends on, so that no other KV can answer to a key.

A key is 32 bytes: 4 that name the tenant (a digest of its salt, so that quotas and clearing work on keys alone, also
after a restart and on every tier), and 28 of SHA-256 over the model's fingerprint, the salt and the tokens. They are
the same in every process and on every machine. Without the salt neither part can be computed.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lmcache_blend.errors import ConfigError

TENANT_BYTES = 4


def tenant(salt: str) -> bytes:
    """The first bytes of every key of that salt. Raises ConfigError where it is no Unicode text."""
    return hashlib.sha256(b"lmcache-blend tenant" + _encoded("salt", salt)).digest()[:TENANT_BYTES]


def chunk_key(fingerprint: str, salt: str, behind: bytes, tokens: Tensor) -> bytes:
    """Key of a segment, wherever it stands: model, tenant, what chunks are encoded behind, and the token ids.

    Raises ConfigError for what are no token ids.
    """
    ids = _ids(tokens).astype("<i8").tobytes()
    return _key(salt, _seeded(_encoded("fingerprint", fingerprint), _encoded("salt", salt), behind, ids))


def context_digest(tokens: Tensor, regime: bytes) -> bytes:
    """Digest of the tokens before a chunk and of the rotary tables in force (dynamic scaling depends on the length)."""
    return hashlib.sha256(regime + _ids(tokens).astype("<i8").tobytes()).digest()


@dataclass(frozen=True)
class Keyer:
    """Keys of one model and tenant.

    fingerprint: identity of weights, KV type, rotary configuration and tokenizer. layout: what the engine's bytes are
    ("pre_rope", "post_rope/tp0of2", ...); keys of different layouts never meet. chunk_tokens: of prefix chunks.

    >>> keyer = Keyer("model")
    >>> a, b = keyer.prefix_keys(range(512)), keyer.prefix_keys([*range(256), *range(300)])
    >>> len(a), len(b), a[0] == b[0], a[1] == b[1]
    (2, 3, True, False)
    """

    fingerprint: str
    salt: str = ""
    layout: str = "pre_rope"
    chunk_tokens: int = 256

    def __post_init__(self) -> None:
        if not 1 <= self.chunk_tokens < 1 << 32:
            raise ConfigError(f"chunk_tokens = {str(self.chunk_tokens)[:20]}: a chunk has 1 to {(1 << 32) - 1} tokens")
        for name in ("fingerprint", "salt", "layout"):
            _encoded(name, getattr(self, name))

    def prefix_keys(self, tokens: Tensor | Sequence[int], partial: bool = True) -> list[bytes]:
        """One key per chunk_tokens tokens from the start, each over all tokens up to its chunk's end.

        partial: whether a shorter last chunk has a key too. Raises ConfigError for what are no token ids.
        """
        ids = _ids(tokens).astype("<u4")
        size, raw = self.chunk_tokens, ids.data.cast("B")
        end = len(ids) if partial else len(ids) - len(ids) % size
        parts = (b"prefix", self.layout.encode(), size.to_bytes(8, "little"))
        running = _seeded(*self._who(), *parts)
        out, who = [], tenant(self.salt)
        for at in range(0, 4 * end, 4 * size):
            running.update(raw[at : at + 4 * size])
            out.append(who + running.copy().digest()[:-TENANT_BYTES])
        return out

    def segment_key(self, tokens: Tensor | Sequence[int], behind: bytes = b"") -> bytes:
        """Key of a segment, wherever it stands. behind: digest of what it was encoded behind, if anything.

        Raises ConfigError for what are no token ids.
        """
        parts = (b"segment", self.layout.encode(), behind, _ids(tokens).astype("<u4").tobytes())
        return _key(self.salt, _seeded(*self._who(), *parts))

    def _who(self) -> tuple[bytes, bytes]:
        return _encoded("fingerprint", self.fingerprint), _encoded("salt", self.salt)


def _ids(tokens: Tensor | Sequence[int]) -> np.ndarray:
    """Token ids [T]. What is no id of 32 bits is refused: cut down to them, it would have another token's key."""
    try:
        ids = torch.as_tensor(tokens).cpu().numpy() if len(tokens) else np.empty(0, np.int64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"token ids {str(tokens)[:40]} are no integers: {str(error).splitlines()[0]}") from None
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ConfigError(f"token ids are {ids.dtype} {list(ids.shape)}; give integers in one dimension")
    if len(ids) and (ids.min() < 0 or ids.max() >= 1 << 32):
        raise ConfigError(f"token ids reach from {ids.min()} to {ids.max()}; a key takes 0 to {(1 << 32) - 1}")
    return ids


def _encoded(name: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{name} = {text!r} is no Unicode text; write it in UTF-8") from None


def _seeded(*parts: bytes) -> "hashlib._Hash":
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)  # lengths keep ("ab", "c") and ("a", "bc") apart
    return digest


def _key(salt: str, digest: "hashlib._Hash") -> bytes:
    return tenant(salt) + digest.digest()[:-TENANT_BYTES]
