"""What an administrator does with stored chunks: move, recode, check, clear, list, measure."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from lmcache_blend.codecs import Codec, get_codec
from lmcache_blend.engine import values
from lmcache_blend.engine.events import EventLog
from lmcache_blend.engine.keys import TENANT_BYTES, tenant
from lmcache_blend.engine.level import Level, Pins
from lmcache_blend.engine.reading import read
from lmcache_blend.engine.tiers.base import ABSENT, Entry, Miss, PinningTier, Usage, check_keys
from lmcache_blend.engine.writing import Waiting, Writing
from lmcache_blend.errors import ConfigError, LMCacheBlendError


class Item(NamedTuple):
    """One stored chunk. pinned: by this engine, or by anyone where the tier keeps pins for all."""

    key: bytes
    tier: str
    nbytes: int
    modified: float
    pinned: bool


class Verified(NamedTuple):
    """Chunks of a tier that were read and decoded, and how many of them were damaged (and are deleted now).

    kept: of the damaged ones, those that could not be deleted, since they are pinned or the tier takes no changes; they
    are not served. unread: chunks that the tier did not bring, or whose codec or profile is not at hand.
    """

    checked: int
    corrupt: int
    kept: int = 0
    unread: int = 0


class Operations:
    """Mixin of KVEngine. Every method waits until it is done."""

    levels: "list[Level]"
    pins: Pins
    events: EventLog
    writing: Writing

    def level(self, name: str) -> Level:
        """The tier of that name. Raises ConfigError."""
        for level in self.levels:
            if level.name == name:
                return level
        raise ConfigError(f"this engine has no tier {name!r}; it has {', '.join(x.name for x in self.levels)}")

    def move(self, keys: Sequence[bytes], source: str, target: str, keep: bool = False) -> list[bool]:
        """Write chunks from one tier into another, in its codec, and delete them in the first; whether each went.

        keep: copy. Pinned chunks are copied, and stay.
        """
        check_keys(keys)
        out, origin, goal = [], self.level(source), self.level(target)
        i = self.levels.index(goal)
        for key in keys:
            ((chunk, _),) = read(origin, [key])
            item = [] if chunk is None else [Waiting(key, chunk, float(len(chunk)))]
            done = bool(item) and self.writing.write(i, item)[0]
            if done and not keep and not self.pins.holds(key) and origin is not goal:
                origin.delete([key])
                # Both may be the same store, by two names: then it has just lost the chunk.
                if isinstance(goal.lookup([key])[0], Miss):
                    done = self.writing.write(i, item)[0]
            out.append(done)
        self.events.publish("moved", target, [key for key, done in zip(keys, out, strict=True) if done])
        return out

    def compress(self, keys: Sequence[bytes], tier: str, codec: str | dict[str, Any]) -> list[bool]:
        """Recode chunks of a tier in their place; whether each is in that codec now.

        Raises ConfigError for an unknown codec, and for one that takes none of the chunks (a profile of another model).
        """
        return self._recode(keys, self.level(tier), get_codec(codec))

    def decompress(self, keys: Sequence[bytes], tier: str) -> list[bool]:
        """Store chunks of a tier as they decode; what a codec took away does not come back."""
        return self._recode(keys, self.level(tier), None)

    def _recode(self, keys: Sequence[bytes], level: Level, codec: Codec | None) -> list[bool]:
        check_keys(keys)
        out, refused = [], None
        for key in keys:
            ((chunk, _),) = read(level, [key])
            done = None
            if chunk is not None:
                try:
                    value = values.encode(key, chunk, codec)
                    (done,) = level.put([key], [value], [float(len(chunk))], None)
                except LMCacheBlendError as error:
                    refused = error
            out.append(isinstance(done, int))
        if refused is not None and not any(out):
            raise refused
        return out

    def clear(self, tier: str | None = None, salt: str | None = None, force: bool = False) -> int:
        """Delete chunks, of one tier or of all, of one tenant or of all; how many. force: pinned ones too."""
        self.writing.flush()
        who, deleted = None if salt is None else tenant(salt), 0
        for level in self._chosen(tier):
            found = [e.key for e in _entries(level) if who is None or e.key[:TENANT_BYTES] == who]
            if force:
                level.unpin(found)
                for key in found:
                    self.pins.drop(key)
            keys = [key for key in found if not self.pins.holds(key)]
            out = level.delete(keys)
            deleted += sum(isinstance(o, int) for o in out)
            if who is None and keys == found and all(isinstance(o, int) or o.cause == "absent" for o in out):
                self.events.publish("cleared", level.name)
        return deleted

    def verify(self, tier: str | None = None) -> dict[str, Verified]:
        """Read and decode every chunk of a tier, or of all; damaged ones are deleted."""
        out = {}
        for level in self._chosen(tier):
            keys = [e.key for e in _entries(level)]
            checked, corrupt, unread, kept = 0, [], 0, 0
            for key in keys:
                miss = _check(level, key)
                checked += miss is None or miss.cause == "corrupt"
                if miss is not None:
                    corrupt += [key] if miss.cause == "corrupt" else []
                    unread += miss.cause not in ("corrupt", "absent")
            kept = sum(o != ABSENT for o in level.guard.call("lookup", corrupt))
            out[level.name] = Verified(checked, len(corrupt), kept, unread)
        return out

    def usage(self) -> dict[str, Usage | None]:
        """Bytes, chunks and capacity of each tier; None for one that does not answer."""
        out: dict[str, Usage | None] = {}
        for level in self.levels:
            found = level.guard.ask("usage")
            out[level.name] = None if isinstance(found, Miss) else found
            if not isinstance(found, Miss):
                level.metrics.holds(found.nbytes, found.chunks)
        return out

    def _chosen(self, tier: str | None) -> list[Level]:
        return self.levels if tier is None else [self.level(tier)]

    def list(self, tier: str | None = None) -> Iterator[Item]:
        """Every chunk of a tier, or of all."""
        for level in self._chosen(tier):
            pinned: Any = level.guard.ask("pinned") if isinstance(level.tier, PinningTier) else {}
            pinned = {} if isinstance(pinned, Miss) else pinned
            for key, nbytes, modified in _entries(level):
                yield Item(key, level.name, nbytes, modified, key in pinned or self.pins.holds(key))


def _entries(level: Level) -> list[Entry]:
    """What a tier holds; nothing where it does not answer."""
    found = level.guard.ask("entries")
    out: list[Entry] = []
    if not isinstance(found, Miss):
        with suppress(Exception):  # of whatever client
            out.extend(found)
    return out


def _check(level: Level, key: bytes) -> Miss | None:
    """Why a chunk that is listed cannot be served; None for a good one."""
    (size,) = level.lookup([key])
    if isinstance(size, int):
        buffer = memoryview(bytearray(size))
        (size,) = level.get([key], [buffer], [0])
        if isinstance(size, int):
            try:
                head = values.parse(buffer, key, size)
                head.chunk(buffer, level.coder(head))
            except Exception as error:  # of whatever codec
                return level.failed(key, error)
            return None
    elif size.cause == "too_large":
        size = Miss("corrupt", "larger than any value")
    level.missed(key, size)
    return size
