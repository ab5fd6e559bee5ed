"""RESP2, as far as a tier needs it (https://redis.io/docs/latest/develop/reference/protocol-spec/): commands whose
values are sent without a copy, and replies that are received into the caller's own buffer.

General clients allocate every value anew, and the page faults of that cost more than the transfer (half the throughput
at 1 MiB). Connections, TLS, log-in and cluster maps are redis-py's.
"""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from lmcache_blend.engine.tiers.base import Part

JOIN_BYTES = 16_384
"""Pieces up to this size are copied together, larger ones are sent as they are."""
PIPELINE_COMMANDS = 1000
MAX_LINE, MAX_BULK, MAX_ARRAY, MAX_DEPTH = 4096, 1 << 20, 1 << 20, 4
"""What a reply may claim where the tier did not ask for a value: names, numbers and cursors only."""


class RespError(OSError):
    """The server's bytes are no RESP2, or more than was asked for; the connection is of no use any more."""


class ServerError(str):
    """An error reply, e.g. "OOM command not allowed". Part of an answer, so no exception."""

    @property
    def code(self) -> str:
        return self.split(" ", 1)[0]


def command(*words: bytes | str | int) -> bytes:
    """One command, whole.

    >>> command("STRLEN", b"k")
    b'*2\\r\\n$6\\r\\nSTRLEN\\r\\n$1\\r\\nk\\r\\n'
    """
    coded = [w if isinstance(w, bytes) else str(w).encode() for w in words]
    return b"*%d\r\n" % len(coded) + b"".join(b"$%d\r\n%b\r\n" % (len(w), w) for w in coded)


def command_with(words: Sequence[bytes | str], pieces: Sequence[Part], size: int) -> list[Part]:
    """One command whose last word is a value of `size` bytes in pieces, which are not copied."""
    head = command(*words)
    count = b"*%d\r\n" % len(words)
    return [b"*%d\r\n" % (len(words) + 1), head[len(count) :], b"$%d\r\n" % size, *pieces, b"\r\n"]


def packets(parts: Sequence[Part]) -> Iterator[Part]:
    """The same bytes in fewer parts: small ones joined, large ones as they are."""
    small, size = [], 0
    for part in parts:
        n = part.nbytes if isinstance(part, memoryview) else len(part)
        if n <= JOIN_BYTES:
            small.append(part)
            size += n
        if small and (n > JOIN_BYTES or size > JOIN_BYTES):
            yield b"".join(small)
            small, size = [], 0
        if n > JOIN_BYTES:
            yield part
    if small:
        yield b"".join(small)


class Wire:
    """Sends and receives on one connected socket, all of it before `deadline` (time.monotonic).

    Raises TimeoutError past the deadline, ConnectionError where the server hung up, RespError on bytes that are no
    RESP2. After any of them the connection must be closed: what is still under way would answer another question.
    """

    def __init__(self, sock: Any, deadline: float):
        self._sock, self._deadline = sock, deadline
        self._buffer = bytearray(65_536)
        self._view, self._start, self._end = memoryview(self._buffer), 0, 0

    def send(self, parts: Sequence[Part]) -> None:
        for packet in packets(parts):
            self._limit()
            self._sock.sendall(packet)

    def ask(self, commands: Sequence[bytes]) -> list[Any]:
        """Replies to commands that carry no values, in order."""
        out: list[Any] = []
        for at in range(0, len(commands), PIPELINE_COMMANDS):
            some = commands[at : at + PIPELINE_COMMANDS]
            self.send(some)
            out += [self.reply() for _ in some]
        return out

    def reply(self) -> Any:
        """A reply: bytes, int, None, list, or ServerError."""
        return self._reply(MAX_DEPTH)

    def value_into(self, buffer: memoryview) -> int | ServerError | None:
        """A bulk string into the front of `buffer`: its whole length, even where that is more than the buffer holds;
        None for a null, or an error reply."""
        line = self._line()
        if line[:1] == b"-":
            return ServerError(line[1:].decode("latin-1"))
        if line[:1] != b"$":
            raise RespError(f"a value was expected, not {line[:40]!r}")
        size = _int(line[1:])
        if size < 0:
            return None
        self._fill(buffer[: min(size, len(buffer))])
        left = size - len(buffer)
        while left > 0:  # more than was asked for: read and forgotten, so that the next reply is in its place
            left -= self._take(min(left, len(self._buffer)))
        self._end_of_value()
        return size

    def _reply(self, depth: int) -> Any:
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return rest
        if kind == b"-":
            return ServerError(rest.decode("latin-1"))
        if kind == b":":
            return _int(rest)
        if kind == b"$":
            size = _int(rest)
            if size > MAX_BULK:
                raise RespError(f"a reply of {size} bytes where at most {MAX_BULK} were expected")
            if size < 0:
                return None
            out = bytearray(size)
            self._fill(memoryview(out))
            self._end_of_value()
            return bytes(out)
        if kind == b"*" and depth:
            count = _int(rest)
            if count > MAX_ARRAY:
                raise RespError(f"an array of {count} replies where at most {MAX_ARRAY} were expected")
            return None if count < 0 else [self._reply(depth - 1) for _ in range(count)]
        raise RespError(f"no RESP2 reply: {line[:40]!r}")

    def _line(self) -> bytes:
        while True:
            at = self._buffer.find(b"\r\n", self._start, self._end)
            if at >= 0:
                line = bytes(self._view[self._start : at])
                self._start = at + 2
                return line
            if self._end - self._start > MAX_LINE:
                raise RespError(f"a line of more than {MAX_LINE} bytes")
            if self._start:
                self._buffer[: self._end - self._start] = self._buffer[self._start : self._end]
                self._start, self._end = 0, self._end - self._start
            self._end += self._receive(self._view[self._end :])

    def _fill(self, target: memoryview) -> None:
        have = min(len(target), self._end - self._start)
        target[:have] = self._view[self._start : self._start + have]
        self._start += have
        while have < len(target):
            have += self._receive(target[have:])

    def _take(self, most: int) -> int:
        if self._start == self._end:
            self._start, self._end = 0, self._receive(self._view)
        n = min(most, self._end - self._start)
        self._start += n
        return n

    def _end_of_value(self) -> None:
        end = bytearray(2)
        self._fill(memoryview(end))
        if end != b"\r\n":
            raise RespError("a value does not end where it said")

    def _receive(self, target: memoryview) -> int:
        self._limit()
        n = self._sock.recv_into(target)
        if not n:
            raise ConnectionError("the server closed the connection")
        return n

    def _limit(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the server did not answer in time")
        self._sock.settimeout(left)


def _int(text: bytes) -> int:
    # int() takes spaces, underscores and any number of digits.
    digits = text.removeprefix(b"-")
    if not digits.isdigit() or len(digits) > 19:
        raise RespError(f"{text[:40]!r} is no number")
    return int(text)
