"""The Tier protocol: where encoded chunks live, as opaque bytes under 32-byte keys, moved in batches.

A tier stores, and nothing else. What belongs to the engine above it, for every tier alike: codecs and checksums (a tier
may return any bytes; they are verified before use), eviction and quotas (a tier that has no room says `full`, and the
engine chooses what goes), timeouts, retries and the circuit breaker, promotion and demotion, metrics.

A tier is a class whose parameters are keyword arguments, registered by name (`@register_tier("mine")`), by an entry
point in the group `lmcache_blend.tiers`, or found at run time by dotted path ("package.module:Class"). A name
that is also a URL scheme serves that scheme and gets the whole URL: `make_tier("redis://h:6379/0", capacity_bytes=n)`
calls `Redis(url="redis://h:6379/0", capacity_bytes=n)`, Redis being registered as "redis".

Every operation takes a batch and answers with one Outcome per key, in order: a number of bytes, or a Miss that says why
not. So a batch with one bad key serves the others. A tier may also raise (OSError, TimeoutError, its client's errors)
where the whole batch failed; the engine turns that into a Miss for every key and tells the breaker. Methods are called
from several threads at once, at most `threads` of them for get and put.

`lmcache_blend.testing.TierConformance` holds these promises as tests.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable
from urllib.parse import urlsplit

from lmcache_blend.errors import ConfigError, UnknownNameError
from lmcache_blend.registry import Registry

KEY_BYTES = 32

Cause = Literal["absent", "corrupt", "full", "too_large", "pinned", "read_only", "timeout", "error", "unavailable"]
FAULTS = frozenset({"timeout", "error"})
"""Causes that count against a tier in its circuit breaker; the others are answers of a tier that works."""

Part = bytes | bytearray | memoryview
Value = Sequence[Part]
"""One value in pieces that are written one after another (header, then tensors), so that nothing is joined first.

It may also have `nbytes`, the whole, and `scattered()`, which gives (offset, pieces) in the order that is cheapest to
write where any order is possible; bytes that none of them covers are zero. And `push(fd)`, which writes all of it into
a file that is empty; whether that went well, where not the file is to be written anew.
"""


class Miss(NamedTuple):
    """Why there is no result. detail: for the log; names no secret."""

    cause: Cause
    detail: str = ""


Outcome = int | Miss
"""Bytes written, read, found or freed; or why not."""

ABSENT = Miss("absent")


class Entry(NamedTuple):
    """One stored value. modified: seconds since the epoch, 0.0 where the tier does not know."""

    key: bytes
    nbytes: int
    modified: float = 0.0


class Usage(NamedTuple):
    """What a tier holds. capacity_bytes: None where it has no limit of its own."""

    nbytes: int
    chunks: int
    capacity_bytes: int | None


@runtime_checkable
class Tier(Protocol):
    """Bytes by key. All methods are safe to call from several threads, and fast where the batch is empty."""

    threads: int
    """How many calls of get and put may run side by side; the engine splits a batch over so many."""
    capacity_bytes: int | None
    """Bytes that the tier may hold, values only; None where the engine shall never evict from it."""

    def put(self, keys: Sequence[bytes], values: Sequence[Value]) -> list[Outcome]:
        """Store each value whole or not at all, in place of an older one under its key; bytes written.

        A reader sees the old value or the new one, never a mixture. The pieces belong to the caller again when the call
        returns. Misses: "full" (evict and call again), "too_large", "read_only", "error".
        """
        ...

    def get(
        self, keys: Sequence[bytes], buffers: Sequence[memoryview], offsets: Sequence[int] | None = None
    ) -> list[Outcome]:
        """Fill each buffer (writable, contiguous, format "B") from its value; bytes read, always len(buffer).

        offsets: where in the value to begin, by default 0. So a part of a value (a group of layers) can be read alone;
        `lookup` tells how large the whole is. Misses: "absent"; "corrupt" where the value ends before the buffer.
        After a Miss the buffer's content is undefined.
        """
        ...

    def lookup(self, keys: Sequence[bytes]) -> list[Outcome]:
        """Size of each value in bytes, without reading it; Miss "absent" where there is none."""
        ...

    def delete(self, keys: Sequence[bytes]) -> list[Outcome]:
        """Bytes freed by each key. Misses: "absent"; "pinned", from a PinningTier, where someone holds a pin."""
        ...

    def entries(self) -> Iterator[Entry]:
        """Every value that is stored, in any order, while others may write; foreign objects are left out."""
        ...

    def usage(self) -> Usage:
        """Bytes and number of values, counted as `entries` lists them."""
        ...

    def close(self) -> None:
        """Release threads, files and connections; what is stored stays, unless the tier is this process's memory."""
        ...


@runtime_checkable
class SteppingTier(Tier, Protocol):
    """A tier that reads a value step by step, so that each is checked while the processor's cache holds it."""

    def get_stepwise(
        self, keys: Sequence[bytes], buffers: Sequence[memoryview], reached: Sequence[Callable[[int], int]]
    ) -> list[Outcome]:
        """As `get` from the beginning of each value. reached[i] is told how many bytes of buffer i are there, first 0
        and at last all; it answers how many should be there when it is asked next.

        It may also have `pull(fd, there)`, after it was told of `there`: reads on from a file that is this value and
        answers how many bytes are there then, fewer than all where it could not go on.
        """
        ...


@runtime_checkable
class PinningTier(Tier, Protocol):
    """A tier that several processes share, and that keeps pins where all of them see them.

    Pins of one process are the engine's own; it passes them on to tiers of this kind, whose `delete` then refuses.
    """

    def pin(self, keys: Sequence[bytes], until: float) -> list[Outcome]:
        """Keep the values until that time (seconds since the epoch; inf: until unpinned); the later of two pins holds.

        The size of each value, or Miss "absent". A value that was reported pinned is there until the pin ends.
        """
        ...

    def unpin(self, keys: Sequence[bytes]) -> list[Outcome]:
        """End the pins; the size of each value, or Miss "absent" where it had no pin."""
        ...

    def pinned(self) -> dict[bytes, float]:
        """Keys that are pinned now, and until when."""
        ...


@runtime_checkable
class MemoryTier(Tier, Protocol):
    """A tier in this process's memory, whose values are filled and read in place, without a copy."""

    def reserve(self, size: int) -> Any:
        """Room for a value, [size] uint8 to be filled and then committed; dropped, it is free again. Misses: as put."""
        ...

    def commit(self, key: bytes, slot: Any) -> Outcome:
        """Make a filled slot the value of a key."""
        ...

    def view(self, key: bytes) -> memoryview | None:
        """The value itself, not to be written to; stays valid for as long as someone refers to it."""
        ...


tiers: Registry[Any] = Registry("tier", "lmcache_blend.tiers")
register_tier = tiers.register


def make_tier(spec: str, **options: Any) -> Tier:
    """A tier from a registered name, a URL or a dotted path ("package.module:Class"), and its options.

    Raises UnknownNameError for a name or scheme that is not registered, ConfigError for a path that cannot be imported,
    a class that is no tier, and options that it refuses.
    """
    if "://" in spec:
        options = {"url": spec, **options}
        factory = tiers.get(urlsplit(spec).scheme)
    elif ":" in spec or ("." in spec and spec not in tiers):
        factory = _import(spec)
    else:
        factory = tiers.get(spec)
    try:
        tier = factory(**options)
    except TypeError as error:
        raise ConfigError(f"tier {spec!r} refuses {sorted(options)}: {error}") from None
    if not isinstance(tier, Tier):
        missing = [name for name in _MEMBERS if not hasattr(tier, name)]
        raise ConfigError(f"tier {spec!r} is no tier: it has no {', '.join(missing)}")
    return tier


_MEMBERS = ("threads", "capacity_bytes", "put", "get", "lookup", "delete", "entries", "usage", "close")


def _import(path: str) -> Any:
    module, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        if isinstance(error, ModuleNotFoundError) and ":" not in path:
            raise UnknownNameError("tier", path, tiers) from None
        raise ConfigError(f"tier {path!r} cannot be imported: {error}") from None


def check_keys(keys: Sequence[bytes]) -> None:
    """Raises ConfigError unless every key is 32 bytes: names of files and objects are made of them."""
    for key in keys:
        if type(key) is not bytes or len(key) != KEY_BYTES:
            raise ConfigError(f"key {key!r:.80} is not {KEY_BYTES} bytes; make keys with lmcache_blend.engine.keys")


def size_of(value: Value) -> int:
    """Bytes of a value, over all pieces."""
    if (known := getattr(value, "nbytes", None)) is not None:
        return known
    return sum(len(part) if isinstance(part, bytes | bytearray) else part.nbytes for part in value)
