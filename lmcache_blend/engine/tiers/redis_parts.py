"""Large values in Redis: a hash whose fields are the parts, written aside and put in place by RENAME.

Fields: "size", "part" (bytes of every part but the last), "mark" (drawn for this value), and mark:0, mark:1, ... So
a reader that takes parts while the value is replaced finds the next one missing, never one of another value.
"""

import os
from collections.abc import Iterator
from typing import Any

from lmcache_blend.engine.tiers.base import ABSENT, Miss, Outcome, Value
from lmcache_blend.engine.tiers.resp import ServerError, Wire, command, command_with

UNFINISHED_MS = 600_000
"""Parts of a value whose writer died go after so long."""
MAX_PART = 512 << 20
"""The server's own limit. What claims more was not written by us."""


def put_parts(wire: Wire, name: str, value: Value, size: int, part: int) -> ServerError | None:
    """Store a value, whole or not at all; the server's error, if any."""
    mark = os.urandom(8).hex()
    temporary = f"{name}:{mark}"
    error = _error(
        wire.ask(
            [
                command("HSET", temporary, "size", size, "mark", mark, "part", part),
                command("PEXPIRE", temporary, UNFINISHED_MS),
            ]
        )
    )
    for i, pieces in enumerate(_cut(value, part)):
        if error is None:
            wire.send(command_with(["HSET", temporary, f"{mark}:{i}"], pieces, min(part, size - i * part)))
            error = _error([wire.reply()])
    if error is None:
        ends = [command("MULTI"), command("PERSIST", temporary), command("RENAME", temporary, name), command("EXEC")]
        replies = wire.ask(ends)
        error = _error([*replies, *(replies[-1] if isinstance(replies[-1], list) else ())])
    if error is not None:
        wire.ask([command("UNLINK", temporary)])
    return error


def get_parts(wire: Wire, name: str, buffer: memoryview, start: int) -> Outcome | ServerError | None:
    """Fill the buffer from byte `start` on; None where the value was replaced meanwhile, or the server's error."""
    (meta,) = wire.ask([command("HMGET", name, "size", "mark", "part")])
    if isinstance(meta, ServerError):
        return meta
    if not isinstance(meta, list) or len(meta) != 3 or (size := number_of(meta[0])) is None:
        return ABSENT
    mark, part = meta[1], number_of(meta[2])
    if not isinstance(mark, bytes) or part is None or not 0 < part <= MAX_PART or start + len(buffer) > size:
        return Miss("corrupt", f"{len(buffer)} bytes at {start} of {size}")
    return len(buffer) if _read(wire, name, mark, part, size, buffer, start) else None


def _read(wire: Wire, name: str, mark: bytes, part: int, size: int, buffer: memoryview, start: int) -> bool:
    """Whether every part was there."""
    end = start + len(buffer)
    wanted = range(start // part, -(-end // part))
    sent, whole = 0, True
    for done, i in enumerate(wanted):
        while whole and sent < min(done + 2, len(wanted)):  # the next one is under way while this one comes
            wire.send([command("HGET", name, mark + b":%d" % wanted[sent])])
            sent += 1
        if done == sent:
            break
        begin, length = i * part, min(part, size - i * part)
        low, high = max(start, begin), min(end, begin + length)
        target = buffer[low - start : high - start]
        if high - low == length:
            got = wire.value_into(target)
        else:
            copy = bytearray(length)
            got = wire.value_into(memoryview(copy))
            target[:] = memoryview(copy)[low - begin : high - begin]
        whole = whole and got == length
    return whole


def _cut(value: Value, part: int) -> Iterator[list[memoryview]]:
    """The pieces of a value in runs of `part` bytes, nothing copied."""
    run, room = [], part
    for piece in value:
        view = memoryview(piece).cast("B")
        while len(view):
            run.append(view[:room])
            view, room = view[room:], room - len(run[-1])
            if not room:
                yield run
                run, room = [], part
    if run:
        yield run


def _error(replies: list[Any]) -> ServerError | None:
    return next((reply for reply in replies if isinstance(reply, ServerError)), None)


def number_of(text: Any) -> int | None:
    """A field that holds a size; None for a null, and for what others wrote there."""
    return int(text) if isinstance(text, bytes) and text.isdigit() and len(text) < 19 else None


def is_wrong_type(reply: Any) -> bool:
    """Whether the name holds another type than the command is for."""
    return isinstance(reply, ServerError) and reply.code == "WRONGTYPE"
