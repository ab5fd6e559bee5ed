"""Between the engine and a tier: deadlines, retries with back-off, and a circuit breaker. Every failure is a Miss.

The breaker opens after some faults in a row; then nobody waits for the tier until a probe in the background is answered
(Nygard, Release It!, 2007).
"""

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import pydantic

from lmcache_blend.config import Config
from lmcache_blend.engine.tiers.base import FAULTS, KEY_BYTES, MemoryTier, Miss, Outcome, Tier
from lmcache_blend.engine.workers import Workers
from lmcache_blend.errors import ConfigError
from lmcache_blend.metrics import TierMetrics


class FaultConfig(Config):
    """How long to wait for a tier, and when to leave it alone."""

    timeout_s: float = pydantic.Field(default=5.0, gt=0)
    """Longest that one call may block, retries included."""
    retries: int = pydantic.Field(default=1, ge=0)
    """How often a failed call is tried once more, within the time; a timeout is not."""
    backoff_s: float = pydantic.Field(default=0.05, ge=0)
    """Wait before the first retry; doubles each time, with jitter."""
    failures: int = pydantic.Field(default=3, ge=1)
    """Faults in a row that open the breaker."""
    probe_s: float = pydantic.Field(default=1.0, gt=0)
    """Wait before the first probe; doubles up to 30 s."""


Each = Callable[[int, Outcome], None]
POOLS = {"put": 0, "get": 1, "get_stepwise": 1}
"""Which of the pools; all other operations have the last one, and one worker each."""


class Guard:
    """A tier's operations under a deadline: get, put, lookup, delete and the others, by name.

    metrics: gets errors, retries and the breaker's state. Tiers in memory are called directly.
    """

    MOST_PROBE_S = 30.0

    def __init__(self, tier: Tier, name: str, config: FaultConfig, metrics: TierMetrics):
        self.tier, self.name, self.config, self.metrics = tier, name, config, metrics
        self._direct = isinstance(tier, MemoryTier)
        self._pools = self._new_pools()
        self._faults = 0
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self.is_open = False

    def ask(self, operation: str) -> Any:
        """What tier.<operation>() answers, or a Miss."""
        if self._direct:
            return getattr(self.tier, operation)()
        if self.is_open:
            return Miss("unavailable")
        try:
            return self._pools[2].submit(getattr(self.tier, operation)).result(self.config.timeout_s)
        except Exception as error:
            self.metrics.error(error)
            return Miss("timeout" if isinstance(error, TimeoutError) else "error", str(error))

    def call(
        self, operation: str, keys: Sequence[bytes], *columns: Any, each: Each = lambda i, outcome: None, part: int = 0
    ) -> list[Outcome]:
        """Outcome per key of tier.<operation>(keys, *columns); never raises for what the tier does.

        columns: a list has one item a key, anything else is for all of them. part: keys of one call to the tier, by
        default an equal share for each of its threads. each: called for every key as soon as its part is done, while
        others go on; the time that it takes does not count.
        """
        if not keys:
            return []
        if self._direct:
            out = getattr(self.tier, operation)(keys, *columns)
            for i, outcome in enumerate(out):
                each(i, outcome)
            return out
        out: list[Outcome] = [Miss("unavailable", f"{self.name} is left alone after {self._faults} faults")] * len(keys)
        deadline = time.monotonic() + self.config.timeout_s
        left, wait = list(range(len(keys))), self.config.backoff_s
        for attempt in range(self.config.retries + 1):
            if self.is_open:
                break
            deadline = self._once(operation, keys, columns, left, deadline, out, each, part)
            faults = [i for i in left if isinstance(o := out[i], Miss) and o.cause in FAULTS]
            self._note(bool(faults))
            left = [i for i in faults if out[i].cause != "timeout"]  # pyright: ignore[reportAttributeAccessIssue]
            pause = wait * random.uniform(0.5, 1.5)
            if not left or attempt == self.config.retries or time.monotonic() + pause >= deadline:
                break
            self.metrics.retried()
            time.sleep(pause)
            wait *= 2
        for i, outcome in enumerate(out):
            if isinstance(outcome, Miss):
                each(i, outcome)
        return out

    def _once(
        self,
        operation: str,
        keys: Sequence[bytes],
        columns: Sequence[Any],
        rows: list[int],
        deadline: float,
        out: list[Outcome],
        each: Each,
        part: int,
    ) -> float:
        """Try the rows once, and put their outcomes into `out`; the deadline, moved by the time that `each` took."""
        call: Callable[..., list[Outcome]] = getattr(self.tier, operation)
        parts = min(len(rows), self.tier.threads) if operation in POOLS else 1
        pool, size = self._pools[POOLS.get(operation, 2)], part or -(-len(rows) // parts)
        cuts = [rows[i : i + size] for i in range(0, len(rows), size)]
        self.metrics.queued(len(cuts))
        try:
            waiting = [pool.submit(call, *(_part(c, cut) for c in (keys, *columns))) for cut in cuts]
        except RuntimeError:  # closed, or replaced by a breaker that has just opened
            self.metrics.queued(-len(cuts))
            return deadline
        for cut, future in zip(cuts, waiting, strict=True):
            found = self._result(future, len(cut), deadline)
            self.metrics.queued(-1)
            began = time.monotonic()
            for i, outcome in zip(cut, found, strict=True):
                out[i] = outcome
                if not isinstance(outcome, Miss):
                    each(i, outcome)
            deadline += time.monotonic() - began
        return deadline

    def _result(self, future: "Future[list[Outcome]]", count: int, deadline: float) -> list[Outcome]:
        try:
            out = future.result(max(0.0, deadline - time.monotonic()))
            if len(out) == count:
                return out
            return [Miss("error", f"{len(out)} answers for {count} keys")] * count
        except ConfigError:
            raise
        except Exception as error:
            if isinstance(error, TimeoutError) and not future.done():
                future.cancel()  # a call that has begun goes on; it owns its buffers and nobody looks at them again
                error = TimeoutError(f"no answer within {self.config.timeout_s:g} s")
            self.metrics.error(error)
            cause = "timeout" if isinstance(error, TimeoutError) else "error"
            return [Miss(cause, f"{type(error).__name__}: {error}")] * count

    def _note(self, fault: bool) -> None:
        with self._lock:
            self._faults = self._faults + 1 if fault else 0
            if self._faults < self.config.failures or self.is_open or self._closed.is_set():
                return
            self.is_open = True
            # Workers that hang in the tier are left to it; the next calls get fresh ones.
            for pool in self._pools:
                pool.close()
            self._pools = self._new_pools()
        self.metrics.circuit(True)
        threading.Thread(target=self._probe, name=f"{self.name}-probe", daemon=True).start()

    def _probe(self) -> None:
        """Ask until there is an answer; a question that hangs is waited for, not repeated."""
        wait, answered = self.config.probe_s, threading.Event()
        asking: threading.Thread | None = None

        def ask() -> None:
            try:
                (out,) = self.tier.lookup([bytes(KEY_BYTES)])
            except Exception:
                return
            if not isinstance(out, Miss) or out.cause not in FAULTS:
                answered.set()

        while not self._closed.wait(wait):
            if asking is None or not asking.is_alive():
                asking = threading.Thread(target=ask, name=f"{self.name}-ask", daemon=True)
                asking.start()
            asking.join(self.config.timeout_s)
            if answered.is_set():
                with self._lock:
                    self.is_open, self._faults = False, 0
                self.metrics.circuit(False)
                return
            wait = min(2 * wait, self.MOST_PROBE_S)

    def _new_pools(self) -> list[Workers]:
        """For put, for get, and for everything else, so that none of them waits for another."""
        return [Workers(self.tier.threads, f"{self.name}-{what}") for what in ("put", "get", "ask")]

    def close(self) -> None:
        self._closed.set()
        for pool in self._pools:
            pool.close()


def _part(column: Any, rows: list[int]) -> Any:
    return [column[i] for i in rows] if isinstance(column, list | tuple) else column
