"""Daemon threads with a priority queue: a tier that hangs for ever must not keep the process from ending.

The standard library's pool joins its threads at exit, and so would hang with them.
"""

import itertools
import os
import queue
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


class Workers:
    """At most `threads` threads, started when there is work; they end when this object is closed or gone.

    nice: they leave the cores to threads whose niceness is lower, and so do the threads that they start (Linux only).
    """

    def __init__(self, threads: int, name: str, nice: int = 0):
        self._limit, self._name, self._nice = threads, name, nice
        self._queue: queue.PriorityQueue[tuple[float, int, Any]] = queue.PriorityQueue()
        self._number = itertools.count()
        self._lock = threading.Lock()
        self._started = self._idle = 0
        self._finish = weakref.finalize(self, _end, self._queue, threads)

    def submit(self, call: Callable[..., T], *arguments: Any, priority: float = 0.0) -> "Future[T]":
        """Run call(*arguments) on a worker; of what waits, the lowest priority number first, then the oldest."""
        future: Future[T] = Future()
        with self._lock:
            if not self._finish.alive:
                raise RuntimeError(f"{self._name} is closed")
            self._queue.put((priority, next(self._number), (future, call, arguments)))
            if self._started < self._limit and self._queue.qsize() > 0:
                self._started += 1
                name = f"{self._name}-{self._started}"
                threading.Thread(target=_run, args=(self._queue, self._nice), name=name, daemon=True).start()
        return future

    def waiting(self) -> int:
        """Calls that have not begun."""
        return self._queue.qsize()

    def close(self) -> None:
        """Take no more work; what has not begun is done before the threads end."""
        with self._lock:
            self._finish()


def _end(waiting: "queue.PriorityQueue[tuple[float, int, Any]]", threads: int) -> None:
    for i in range(threads):
        waiting.put((float("inf"), i, None))


def _run(waiting: "queue.PriorityQueue[tuple[float, int, Any]]", nice: int) -> None:
    if nice and sys.platform == "linux":
        with suppress(OSError):  # a limit of the system's on niceness costs speed, nothing else
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
    while (item := waiting.get()[2]) is not None:
        future, call, arguments = item
        if not future.set_running_or_notify_cancel():
            continue
        try:
            result = call(*arguments)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)
        # What the call held (buffers, chunks) must not live until the next one comes.
        del item, future, call, arguments
        result = None
