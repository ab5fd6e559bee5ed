"""The engine's operations as requests and answers in JSON: what the HTTP API and `lmcache-blend store` have in common.

Every request is checked before anything is done; a key is 64 hex digits. No request names a file or a tier that the
engine does not have already.
"""

import json
from typing import TYPE_CHECKING, Annotated, Any

import pydantic

from lmcache_blend.config import Config
from lmcache_blend.engine.keys import Keyer
from lmcache_blend.engine.tiers.base import KEY_BYTES
from lmcache_blend.errors import ConfigError, TierError, UnknownNameError

if TYPE_CHECKING:
    from lmcache_blend.engine.engine import KVEngine

MAX_KEYS, MAX_TOKENS = 65_536, 1 << 20
Key = Annotated[str, pydantic.StringConstraints(pattern=rf"^[0-9a-f]{{{2 * KEY_BYTES}}}$")]
Keys = Annotated[tuple[Key, ...], pydantic.Field(max_length=MAX_KEYS)]
Tokens = Annotated[tuple[Annotated[int, pydantic.Field(ge=0, lt=1 << 32)], ...], pydantic.Field(max_length=MAX_TOKENS)]


class Lookup(Config):
    """Which chunks are there. keys: a prefix in order; segments: anywhere; or tokens and segment_tokens, of which the
    keys are made with the other fields, as `Keyer` makes them."""

    keys: Keys = ()
    segments: Keys = ()
    tokens: Tokens = ()
    segment_tokens: Annotated[tuple[Tokens, ...], pydantic.Field(max_length=4096)] = ()
    fingerprint: str = ""
    salt: str = ""
    layout: str = "pre_rope"
    chunk_tokens: int = pydantic.Field(default=256, ge=1)


class Listing(Config):
    """Chunks of a tier (null: of all) and of a tenant (null: of all), at most `limit`."""

    tier: str | None = None
    salt: str | None = None
    limit: int = pydantic.Field(default=10_000, ge=1, le=1_000_000)


class Pin(Config):
    """seconds: null pins until unpinned."""

    keys: Keys
    seconds: float | None = pydantic.Field(default=None, gt=0, allow_inf_nan=False)


class OfKeys(Config):
    """Chunks by key."""

    keys: Keys


class Move(Config):
    """From one tier into another. keys null: all. keep: copy."""

    keys: Keys | None = None
    source: str
    target: str
    keep: bool = False


class Compress(Config):
    """Recode in place. keys null: all of the tier. codec null: store as it decodes."""

    keys: Keys | None = None
    tier: str
    codec: str | dict[str, Any] | None


class OfTier(Config):
    """A tier; null: all."""

    tier: str | None = None


class Clear(Config):
    """Of a tier (null: all) and of a tenant (null: all). force: pinned ones too."""

    tier: str | None = None
    salt: str | None = None
    force: bool = False


class Nothing(Config):
    """No fields."""


class Admin:
    """Operations of an engine by name. own_files: whether a codec's config may name files (a profile) of this machine.

    >>> from lmcache_blend.engine import KVEngine
    >>> with KVEngine() as engine:
    ...     Admin(engine).run("usage", {})
    {'cpu': {'nbytes': 0, 'chunks': 0, 'capacity_bytes': 1073741824}}
    """

    def __init__(self, engine: "KVEngine", own_files: bool = False):
        self._engine, self._own_files = engine, own_files
        self._operations = {
            "lookup": (Lookup, self._lookup),
            "ls": (Listing, self._ls),
            "usage": (Nothing, self._usage),
            "pin": (Pin, self._pin),
            "unpin": (OfKeys, lambda r: {"unpinned": engine.unpin(_bytes(r.keys))}),
            "move": (Move, self._move),
            "compress": (Compress, self._compress),
            "verify": (OfTier, self._verify),
            "clear": (Clear, self._clear),
        }

    def run(self, operation: str, request: Any) -> Any:
        """The answer, JSON-able. Raises UnknownNameError, ConfigError for a request that is none, TierError where a
        tier that is asked about as a whole does not answer."""
        if operation not in self._operations:
            raise UnknownNameError("operation", operation, self._operations)
        model, call = self._operations[operation]
        if not isinstance(request, dict) or not all(isinstance(key, str) for key in request):
            raise ConfigError(f"a request is a JSON object, not {str(request)[:50]!r}")
        return call(model(**request))

    def _lookup(self, request: Lookup) -> Any:
        keyer = Keyer(request.fingerprint, request.salt, request.layout, request.chunk_tokens)
        if (request.tokens or request.segment_tokens) and not request.fingerprint:
            raise ConfigError("tokens need the model's fingerprint, of which their keys are made")
        if (many := -(-len(request.tokens) // request.chunk_tokens)) > MAX_KEYS:
            raise ConfigError(f"{many} chunks are more than {MAX_KEYS}; raise chunk_tokens, or ask for fewer tokens")
        keys, segments = _bytes(request.keys), _bytes(request.segments)
        keys += keyer.prefix_keys(request.tokens) if request.tokens else []
        segments += [keyer.segment_key(tokens) for tokens in request.segment_tokens]
        found = self._engine.lookup(keys, segments)
        return {
            "prefix_chunks": found.prefix,
            "prefix_tokens": min(found.prefix * request.chunk_tokens, len(request.tokens)) if request.tokens else None,
            "keys": [key.hex() for key in keys],
            "tiers": found.tiers,
            "segments": found.segments,
        }

    def _ls(self, request: Listing) -> Any:
        from lmcache_blend.engine.keys import TENANT_BYTES, tenant

        self.answers(request.tier)
        who, out = None if request.salt is None else tenant(request.salt), []
        for item in self._engine.list(request.tier):
            if who is None or item.key[:TENANT_BYTES] == who:
                if len(out) == request.limit:
                    return {"chunks": out, "complete": False}
                out.append({**item._asdict(), "key": item.key.hex()})
        return {"chunks": out, "complete": True}

    def _usage(self, request: Nothing) -> Any:
        return {name: None if usage is None else usage._asdict() for name, usage in self._engine.usage().items()}

    def _pin(self, request: Pin) -> Any:
        seconds = {} if request.seconds is None else {"seconds": request.seconds}
        return {"pinned": self._engine.pin(_bytes(request.keys), **seconds)}

    def _move(self, request: Move) -> Any:
        keys = self._keys(request.keys, request.source)
        self.answers(request.target)
        return _done("moved", keys, self._engine.move(keys, request.source, request.target, request.keep))

    def _compress(self, request: Compress) -> Any:
        if not self._own_files and _names_a_file(request.codec):
            raise ConfigError("a codec's profile is a file of the engine's machine and cannot be named from outside")
        keys = self._keys(request.keys, request.tier)
        if request.codec is None:
            return _done("decompressed", keys, self._engine.decompress(keys, request.tier))
        return _done("compressed", keys, self._engine.compress(keys, request.tier, request.codec))

    def _verify(self, request: OfTier) -> Any:
        self.answers(request.tier)
        return {name: found._asdict() for name, found in self._engine.verify(request.tier).items()}

    def _clear(self, request: Clear) -> Any:
        self.answers(request.tier)
        return {"deleted": self._engine.clear(request.tier, request.salt, request.force)}

    def _keys(self, keys: tuple[str, ...] | None, tier: str) -> list[bytes]:
        self.answers(tier)
        return _bytes(keys) if keys is not None else [item.key for item in self._engine.list(tier)]

    def answers(self, tier: str | None = None) -> None:
        """Raises TierError where a tier does not answer: an empty list would say that it holds nothing."""
        for level in self._engine.levels if tier is None else [self._engine.level(tier)]:
            try:
                next(iter(level.tier.entries()), None)
            except Exception as error:
                raise TierError(f"tier {level.name!r} does not answer: {error}") from None


def _bytes(keys: tuple[str, ...]) -> list[bytes]:
    return [bytes.fromhex(key) for key in keys]


def _done(word: str, keys: list[bytes], done: list[bool]) -> dict[str, Any]:
    return {word: sum(done), "missed": [key.hex() for key, ok in zip(keys, done, strict=True) if not ok]}


def _names_a_file(codec: Any, depth: int = 16) -> bool:
    """Whether a codec's config, as text or parsed, has a profile anywhere; one nested too deep is taken to have."""
    if isinstance(codec, str) and codec.lstrip().startswith("{"):
        try:
            codec = json.loads(codec)
        except (ValueError, RecursionError):
            return False  # no config at all, which `get_codec` says better
    if not depth:
        return True
    if isinstance(codec, dict):
        return codec.get("profile") is not None or any(_names_a_file(value, depth - 1) for value in codec.values())
    return isinstance(codec, list) and any(_names_a_file(value, depth - 1) for value in codec)
