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
from lmcache_blend.engine.tiers.base import Entry, Miss, PinningTier, Usage, check_keys
from lmcache_blend.engine.writing import Waiting, Writing
from lmcache_blend.errors import ConfigError, CorruptChunkError

BATCH = 16
"""Chunks that are in memory at once while all of a tier are gone through."""


class Item(NamedTuple):
    """One stored chunk. pinned: by this engine, or by anyone where the tier keeps pins for all."""

    key: bytes
    tier: str
    nbytes: int
    modified: float
    pinned: bool


class Verified(NamedTuple):
    """Chunks of a tier that were read and decoded, and how many of them were damaged (and are deleted now)."""

    checked: int
    corrupt: int


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
        out, origin = [], self.level(source)
        i = self.levels.index(self.level(target))
        for key in keys:
            ((chunk, _),) = read(origin, [key])
            done = chunk is not None and self.writing.write(i, [Waiting(key, chunk, float(len(chunk)))])[0]
            if done and not keep and not self.pins.holds(key) and origin is not self.levels[i]:
                origin.delete([key])
            out.append(done)
        self.events.publish("moved", target, [key for key, done in zip(keys, out, strict=True) if done])
        return out

    def compress(self, keys: Sequence[bytes], tier: str, codec: str | dict[str, Any]) -> list[bool]:
        """Recode chunks of a tier in their place; whether each is in that codec now. Raises for an unknown codec."""
        return self._recode(keys, self.level(tier), get_codec(codec))

    def decompress(self, keys: Sequence[bytes], tier: str) -> list[bool]:
        """Store chunks of a tier as they decode; what a codec took away does not come back."""
        return self._recode(keys, self.level(tier), None)

    def _recode(self, keys: Sequence[bytes], level: Level, codec: Codec | None) -> list[bool]:
        check_keys(keys)
        out = []
        for key in keys:
            ((chunk, _),) = read(level, [key])
            done = None
            if chunk is not None:
                (done,) = level.put([key], [values.encode(key, chunk, codec)], [float(len(chunk))], None)
            out.append(isinstance(done, int))
        return out

    def clear(self, tier: str | None = None, salt: str | None = None, force: bool = False) -> int:
        """Delete chunks, of one tier or of all, of one tenant or of all; how many. force: pinned ones too."""
        self.writing.flush()
        who, deleted = None if salt is None else tenant(salt), 0
        for level in self._chosen(tier):
            keys = [e.key for e in _entries(level) if who is None or e.key[:TENANT_BYTES] == who]
            if force:
                level.unpin(keys)
                for key in keys:
                    self.pins.drop(key)
            keys = [key for key in keys if not self.pins.holds(key)]
            deleted += sum(isinstance(o, int) for o in level.delete(keys))
            if tier is not None or salt is None:
                self.events.publish("cleared", level.name)
        return deleted

    def verify(self, tier: str | None = None) -> dict[str, Verified]:
        """Read and decode every chunk of a tier, or of all; damaged ones are deleted."""
        out = {}
        for level in self._chosen(tier):
            keys, good, gone = [e.key for e in _entries(level)], 0, 0
            for at in range(0, len(keys), BATCH):
                part = keys[at : at + BATCH]
                for key, size, buffer in _buffers(level, part):
                    (outcome,) = level.get([key], [buffer], [0])
                    try:
                        if not isinstance(outcome, int):
                            raise CorruptChunkError(outcome.cause)
                        head = values.parse(buffer, key, size)
                        head.chunk(buffer, level.coder(head))
                        good += 1
                    except CorruptChunkError as error:
                        miss = outcome if isinstance(outcome, Miss) else Miss("corrupt", str(error))
                        level.missed(key, miss)
                        gone += miss.cause == "corrupt"
            out[level.name] = Verified(good + gone, gone)
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


def _buffers(level: Level, keys: Sequence[bytes]) -> Iterator[tuple[bytes, int, memoryview]]:
    for key, size in zip(keys, level.lookup(keys), strict=True):
        if isinstance(size, int):
            yield key, size, memoryview(bytearray(size))
