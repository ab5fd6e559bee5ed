"""Redis or Valkey, single or cluster, by URL: redis://, rediss:// (TLS), redis+unix:///path.

A value is a string named PREFIX{hex key}. One larger than `part_bytes` is a hash under that name, its parts in fields
that carry a number drawn for this value, and gets its name by RENAME when it is whole: so each value is one object of
the server, which evicts or expires it as one, and no reader can take parts of two values for one. The braces keep all
that belongs to a key on one node of a cluster.

Connections, TLS, log-in and cluster maps are redis-py's; values go by `resp`, without a copy. Options in the URL's
query are redis-py's (db, username, password, ssl_ca_certs, ...).
"""

import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lmcache_blend.engine.tiers.base import (
    ABSENT,
    Entry,
    Miss,
    Outcome,
    Usage,
    Value,
    check_keys,
    register_tier,
    size_of,
)
from lmcache_blend.engine.tiers.redis_parts import get_parts, is_wrong_type, number_of, put_parts
from lmcache_blend.engine.tiers.redis_servers import Servers
from lmcache_blend.engine.tiers.resp import ServerError, Wire, command, command_with
from lmcache_blend.engine.tiers.room import Room
from lmcache_blend.errors import ConfigError

WINDOW_BYTES, WINDOW_COMMANDS = 1 << 20, 256
"""Values and commands under way at once: larger pipelines are slower, since the server then buffers its answers."""
WHOLE_BYTES = 1 << 16
ATTEMPTS = 5
REPLACED = 200
"""How often a value is begun anew that others replace faster than it is read."""
MOVED = {"MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN"}
CAUSES = {"OOM": "full", "READONLY": "read_only", "MISCONF": "read_only", "WRONGTYPE": "corrupt"}

SIZE = """
local t = redis.call('TYPE', KEYS[1]).ok
local size = -1
if t == 'string' then size = redis.call('STRLEN', KEYS[1])
elseif t == 'hash' then size = tonumber(redis.call('HGET', KEYS[1], 'size') or -1) end
"""
DELETE = SIZE + """
if size < 0 then return -1 end
if redis.call('EXISTS', KEYS[2]) == 1 then return -2 end
redis.call('UNLINK', KEYS[1])
return size
"""  # fmt: skip
PIN = SIZE + """
local left, wanted = redis.call('PTTL', KEYS[2]), tonumber(ARGV[1])
if size < 0 or left == -1 then return size end
if wanted < 0 then redis.call('SET', KEYS[2], ARGV[2])
elseif wanted > left and wanted > 0 then redis.call('SET', KEYS[2], ARGV[2], 'PX', wanted) end
return size
"""  # fmt: skip
UNPIN = SIZE + """
if redis.call('DEL', KEYS[2]) == 0 then return -1 end
return size
"""  # fmt: skip


@register_tier("redis")
@register_tier("rediss")
@register_tier("redis+unix")
class Redis:
    """A Redis or Valkey server, or a cluster (found out at the first use), shared by any number of engines.

    url: redis://[user:password@]host:port/db. prefix: of every name, so that a server may hold other things too.
    timeout_s: for a whole call, connecting included. threads: connections used side by side. part_bytes: larger values
    are split. capacity_bytes: counted by this process and counted anew when it seems used up; without it the server's
    own maxmemory and policy decide. Pins need a server that does not evict by itself. Raises ConfigError.
    """

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "lmcache-blend:",
        timeout_s: float = 5.0,
        threads: int = 4,
        part_bytes: int = 32 << 20,
        capacity_bytes: int | None = None,
    ):
        if not 0 < timeout_s < math.inf or threads < 1 or part_bytes < 1024:
            raise ConfigError(
                f"timeout_s = {timeout_s}, threads = {threads}, part_bytes = {part_bytes}: they must be above 0, "
                "at least 1, at least 1024"
            )
        if not re.fullmatch(r"[\w:.-]{1,100}", prefix, re.ASCII):
            raise ConfigError(f"prefix {prefix!r} is not made of letters, digits and :.-_")
        self.threads, self.capacity_bytes = threads, capacity_bytes
        self._prefix, self._timeout, self._part = prefix, timeout_s, part_bytes
        self._names = re.compile(re.escape(prefix).encode() + rb"\{([0-9a-f]{64})\}(:pin)?")
        self._servers = Servers(url, timeout_s)
        self._room = Room(capacity_bytes, self.entries)

    def __repr__(self) -> str:
        return f"Redis({self._servers.where})"

    # Operations

    def put(self, keys: Sequence[bytes], values: Sequence[Value]) -> list[Outcome]:
        sizes = [size_of(v) for v in values]

        def send(wire: Wire, at: list[int], out: list[Outcome]) -> None:
            waiting: list[int] = []

            def settle() -> None:
                for i in waiting:
                    out[i] = self._outcome(wire.reply(), sizes[i])
                waiting.clear()

            for i in at:
                if 0 < sizes[i] <= self._part:
                    wire.send(command_with(["SET", self._name(keys[i])], values[i], sizes[i]))
                    waiting.append(i)
                    if len(waiting) == WINDOW_COMMANDS or sum(sizes[j] for j in waiting) >= WINDOW_BYTES:
                        settle()
                else:
                    settle()
                    out[i] = self._outcome(
                        put_parts(wire, self._name(keys[i]), values[i], sizes[i], self._part), sizes[i]
                    )
            settle()

        return self._room.put(sizes, lambda at: self._batch(keys, at, send), keys, self.lookup)

    def get(
        self, keys: Sequence[bytes], buffers: Sequence[memoryview], offsets: Sequence[int] | None = None
    ) -> list[Outcome]:
        def receive(wire: Wire, at: list[int], out: list[Outcome]) -> None:
            doubtful, sent, under_way = [], 0, 0
            for done, i in enumerate(at):
                while sent < len(at) and sent - done < WINDOW_COMMANDS and (sent == done or under_way < WINDOW_BYTES):
                    j = at[sent]
                    wire.send([self._get_command(keys[j], len(buffers[j]), None if offsets is None else offsets[j])])
                    under_way += len(buffers[j])
                    sent += 1
                got = wire.value_into(buffers[i])
                under_way -= len(buffers[i])
                if is_wrong_type(got) or got == 0:
                    doubtful.append(i)
                else:
                    out[i] = ABSENT if got is None else self._outcome(got, _whole(got, len(buffers[i])))
            for i in doubtful:
                out[i] = self._get_doubtful(wire, keys[i], buffers[i], None if offsets is None else offsets[i])

        return self._batch(keys, range(len(keys)), receive)

    def lookup(self, keys: Sequence[bytes]) -> list[Outcome]:
        def ask(wire: Wire, at: list[int], out: list[Outcome]) -> None:
            found = wire.ask([command("STRLEN", self._name(keys[i])) for i in at])
            split = [i for i, size in zip(at, found, strict=True) if size == 0 or is_wrong_type(size)]
            for i, size in zip(at, found, strict=True):
                out[i] = self._outcome(size, size) if size else ABSENT
            sizes = wire.ask([command("HGET", self._name(keys[i]), "size") for i in split])
            for i, size in zip(split, sizes, strict=True):
                number = number_of(size)
                out[i] = self._outcome(size, number) if number is not None else ABSENT

        return self._batch(keys, range(len(keys)), ask)

    def delete(self, keys: Sequence[bytes]) -> list[Outcome]:
        out = self._script(DELETE, keys)
        self._room.freed(out)
        return out

    def entries(self) -> Iterator[Entry]:
        seen: set[bytes] = set()
        for names in self._scan("{*}"):
            found = [m for m in map(self._names.fullmatch, names) if m and not m[2]]
            fresh = list(dict.fromkeys(key for m in found if (key := bytes.fromhex(m[1].decode())) not in seen))
            seen.update(fresh)
            for key, size in zip(fresh, self.lookup(fresh), strict=True):
                if isinstance(size, int):
                    yield Entry(key, size)

    def usage(self) -> Usage:
        return self._room.usage()

    def pin(self, keys: Sequence[bytes], until: float) -> list[Outcome]:
        if policy := self._evicts():
            return [Miss("error", f"the server evicts what it likes (maxmemory-policy {policy})")] * len(keys)
        left_ms = -1 if until == math.inf else max(0, math.ceil((until - time.time()) * 1000))
        return self._script(PIN, keys, left_ms, repr(until))

    def unpin(self, keys: Sequence[bytes]) -> list[Outcome]:
        return self._script(UNPIN, keys)

    def pinned(self) -> dict[bytes, float]:
        out: dict[bytes, float] = {}
        for names in self._scan("{*}:pin"):
            keys = [bytes.fromhex(m[1].decode()) for m in map(self._names.fullmatch, names) if m and m[2]]

            def ask(wire: Wire, at: list[int], found: list[Any], keys: list[bytes] = keys) -> None:
                texts = wire.ask([command("GET", self._name(keys[i], ":pin")) for i in at])
                for i, text in zip(at, texts, strict=True):
                    found[i] = text

            for key, text in zip(keys, self._batch(keys, range(len(keys)), ask), strict=True):
                if isinstance(text, bytes) and (until := _time(text)) is not None:
                    out[key] = until
        return out

    def close(self) -> None:
        self._servers.close()

    # Below the operations

    def _get_doubtful(self, wire: Wire, key: bytes, buffer: memoryview, offset: int | None) -> Outcome:
        """A value that a GET did not bring: it is in parts, or gone, or was replaced just then."""
        for _ in range(REPLACED):
            got = get_parts(wire, self._name(key), buffer, offset or 0)
            if isinstance(got, int | Miss):
                return got
            if got is not None and not is_wrong_type(got):
                return self._outcome(got, 0)
            if got is not None:
                wire.send([self._get_command(key, len(buffer), offset)])
                got = wire.value_into(buffer)
                if isinstance(got, int):
                    return _whole(got, len(buffer))
        return ABSENT

    def _batch(
        self, keys: Sequence[bytes], at: Sequence[int], work: Callable[[Wire, list[int], list[Any]], None]
    ) -> list[Any]:
        """Run `work` for the indices `at` on the node that has their keys; outcomes in the order of `keys`."""
        check_keys(keys)
        out: list[Any] = [ABSENT] * len(keys)
        left, deadline = list(at), time.monotonic() + self._timeout
        for attempt in range(ATTEMPTS):
            for node, indices in self._servers.route([self._name(keys[i]) for i in left], left).items():
                with self._servers.wire(node, deadline) as wire:
                    work(wire, indices, out)
            left = [i for i in left if isinstance(out[i], Miss) and out[i].detail.split(" ", 1)[0] in MOVED]
            if not left:
                break
            self._servers.refresh(0.02 * 2**attempt, deadline)
        return out

    def _script(self, script: str, keys: Sequence[bytes], *arguments: int | str) -> list[Outcome]:
        def run(wire: Wire, at: list[int], out: list[Outcome]) -> None:
            names = [(self._name(keys[i]), self._name(keys[i], ":pin")) for i in at]
            replies = wire.ask([command("EVAL", script, 2, *pair, *arguments) for pair in names])
            for i, reply in zip(at, replies, strict=True):
                size = reply if isinstance(reply, int) else -1
                out[i] = Miss("pinned") if size == -2 else self._outcome(reply, size) if size >= 0 else (
                    self._outcome(reply, 0) if isinstance(reply, ServerError) else ABSENT
                )  # fmt: skip

        return self._batch(keys, range(len(keys)), run)

    def _scan(self, pattern: str) -> Iterator[list[bytes]]:
        match = self._prefix + pattern
        for node in self._servers.nodes():
            cursor = b"0"
            while True:
                # A connection for each step: whoever reads the entries may take any time between two of them.
                with self._servers.wire(node, time.monotonic() + self._timeout) as wire:
                    reply = wire.ask([command("SCAN", cursor, "MATCH", match, "COUNT", 1000)])[0]
                if not isinstance(reply, list) or len(reply) != 2 or not isinstance(reply[1], list):
                    raise OSError(f"the server does not list its keys: {reply!r:.200}")
                cursor = reply[0]
                yield [name for name in reply[1] if isinstance(name, bytes)]
                if cursor == b"0":
                    break

    def _evicts(self) -> str | None:
        """The server's eviction policy, where it takes keys that have no expiry."""
        for node in self._servers.nodes():
            with self._servers.wire(node, time.monotonic() + self._timeout) as wire:
                text = wire.ask([command("INFO", "memory")])[0]
            found = dict(line.split(":", 1) for line in str(text, "latin-1").splitlines() if ":" in line)
            if found.get("maxmemory") != "0" and found.get("maxmemory_policy", "").startswith("allkeys"):
                return found["maxmemory_policy"]
        return None

    def _name(self, key: bytes, suffix: str = "") -> str:
        return f"{self._prefix}{{{key.hex()}}}{suffix}"

    def _get_command(self, key: bytes, size: int, offset: int | None) -> bytes:
        # GET is faster than GETRANGE by a copy in the server. What is long and begins at the start is nearly always
        # whole; should the value be longer, the rest is read and dropped.
        if offset is None or (offset == 0 and size > WHOLE_BYTES):
            return command("GET", self._name(key))
        return command("GETRANGE", self._name(key), offset, offset + max(size, 1) - 1)

    def _outcome(self, reply: Any, good: Any) -> Outcome:
        if isinstance(reply, ServerError):
            return Miss(CAUSES.get(reply.code, "error"), str(reply)[:200])  # pyright: ignore[reportArgumentType]
        return good


def _whole(got: Any, wanted: int) -> Outcome:
    return wanted if isinstance(got, int) and got >= wanted else Miss("corrupt", f"{got} bytes of {wanted}")


def _time(text: bytes) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
