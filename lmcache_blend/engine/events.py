"""KV events: what an engine stored, evicted or cleared, for routers that follow which worker holds which tokens.

Every event has a number. A follower that lost its connection asks for the events after the last one it saw; where
those are gone already it gets a `reset` event and asks the engine anew (`ls`).
"""

import itertools
import json
import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

Action = Literal["stored", "removed", "moved", "pinned", "unpinned", "cleared", "reset"]


@dataclass(frozen=True)
class KVEvent:
    """One change. keys: hex digests of the chunks, empty where all of a tier are meant. tier: where it happened, for
    `moved` the target. number: ascending by 1. time: seconds since the epoch."""

    number: int
    action: Action
    tier: str
    keys: tuple[str, ...]
    time: float

    def json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))


class EventLog:
    """The last `keep` events; publishing never blocks and never waits for a follower.

    >>> log = EventLog()
    >>> log.publish("stored", "cpu", [b"k"])
    >>> [(e.number, e.action, e.keys) for e in log.after(0, timeout=0)]
    [(1, 'stored', ('6b',))]
    """

    def __init__(self, keep: int = 4096):
        self._events: deque[KVEvent] = deque(maxlen=keep)
        self._last = 0
        self._changed = threading.Condition()

    @property
    def last(self) -> int:
        """Number of the newest event, 0 before the first."""
        return self._last

    def publish(self, action: Action, tier: str, keys: Iterable[bytes] = ()) -> None:
        """Nothing, where no key changed: without keys an event means all of a tier."""
        names = tuple(key.hex() for key in keys)
        if not names and action != "cleared":
            return
        with self._changed:
            self._last += 1
            self._events.append(KVEvent(self._last, action, tier, names, time.time()))
            self._changed.notify_all()

    def after(self, number: int, timeout: float | None = None) -> list[KVEvent]:
        """Events newer than `number`, as soon as there are any; [] when `timeout` seconds pass without one."""
        with self._changed:
            self._changed.wait_for(lambda: self._last != number, timeout)
            if self._last == number:
                return []
            oldest = self._events[0].number
            if number < oldest - 1 or number > self._last:
                # The follower missed some, or follows an engine that has started anew.
                return [KVEvent(self._last, "reset", "", (), time.time())]
            return list(itertools.islice(self._events, number - oldest + 1, None))
