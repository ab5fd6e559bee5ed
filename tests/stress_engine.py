"""Threads in several processes on one directory, everything mixed, for as long as asked.

    python tests/stress_engine.py [--seconds 600] [--processes 4] [--threads 16]

Each process has a cpu tier of its own over a disk tier that all share, both far too small. Checked all the time: what
is served is what was stored, a pinned chunk is there until it is unpinned, every thread gets on (no deadlock). At the
end: the resident memory of every process has not grown since it was warm.
"""

import argparse
import os
import random
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
from crash_disk import finished, forked
from kv import chunk, equal, key

from lmcache_blend.engine import KVEngine
from lmcache_blend.errors import ChunkLostError

CHUNKS = 120
MINE = [chunk(i, tokens=32, dim=32) for i in range(CHUNKS)]
SIZE = MINE[0].nbytes + 2048
STALL_S = 60.0


class Stress:
    """One process's engine and what its threads found wrong."""

    def __init__(self, path: Path, number: int, threads: int):
        tiers = [
            {"tier": "cpu", "capacity_bytes": 30 * SIZE, "eviction": random.choice(["lru", "s3fifo", "arc"])},
            {
                "tier": "disk",
                "path": str(path),
                "capacity_bytes": 60 * SIZE,
                "write": random.choice(["through", "back"]),
            },
        ]
        self.engine, self.number = KVEngine(tiers=tiers), number
        self.steps, self.wrong = [0] * threads, []
        self.stop = threading.Event()

    def work(self, thread: int) -> None:
        rng = random.Random(1000 * self.number + thread)
        # Chunks that nobody else pins or clears, so that a lost pin is this engine's fault.
        own = key(10_000 + 100 * self.number + thread)
        while not self.stop.is_set():
            try:
                self._step(rng, own)
            except Exception as error:
                self.wrong.append(f"{type(error).__name__}: {error}")
                self.stop.set()
            self.steps[thread] += 1

    def _step(self, rng: random.Random, own: bytes) -> None:
        engine, some = self.engine, rng.sample(range(CHUNKS), rng.randrange(1, 5))
        names, what = [key(i) for i in some], rng.random()
        if what < 0.3:
            engine.store(names, [MINE[i] for i in some], wait=rng.random() < 0.1)
        elif what < 0.6:
            for i, found in zip(some, engine.retrieve(names), strict=True):
                assert found is None or equal(found, MINE[i]), f"chunk {i} came back changed"
        elif what < 0.7:
            for i, found in zip(some, engine.load(names), strict=True):
                with suppress(ChunkLostError):  # evicted by another process half way
                    assert found is None or equal(found.chunk, MINE[i]), f"chunk {i} came back changed"
        elif what < 0.8:
            engine.lookup(names)
        elif what < 0.84:
            engine.prefetch(names)
        elif what < 0.88:
            engine.move(names, "cpu", "disk")
        elif what < 0.9:
            engine.levels[1].delete(names)
        elif what < 0.91:
            engine.usage()
        else:
            self._pinned(rng, own)

    def _pinned(self, rng: random.Random, own: bytes) -> None:
        """Between pin and unpin the chunk is there, whatever the others do."""
        engine, mine = self.engine, MINE[own[5] % CHUNKS]
        engine.store([own], [mine], wait=True)
        if engine.pin([own], seconds=300.0) == [True]:
            for _ in range(rng.randrange(1, 4)):
                time.sleep(rng.uniform(0, 0.01))
                (found,) = engine.retrieve([own])
                assert found is not None, "a pinned chunk is gone"
                assert equal(found, mine)
            assert engine.unpin([own]) == [True]

    def run(self, seconds: float) -> None:
        threads = [threading.Thread(target=self.work, args=(i,), daemon=True) for i in range(len(self.steps))]
        for thread in threads:
            thread.start()
        process, began, warm = psutil.Process(), time.monotonic(), 0
        before, moved = list(self.steps), time.monotonic()
        while time.monotonic() - began < seconds and not self.stop.is_set():
            time.sleep(0.5)
            if time.monotonic() - began > seconds / 3 and not warm:
                warm = process.memory_info().rss
            if all(a > b for a, b in zip(self.steps, before, strict=True)):
                before, moved = list(self.steps), time.monotonic()
            assert time.monotonic() - moved < STALL_S, f"a thread stands still: {self.steps}"
        last = process.memory_info().rss
        self.stop.set()
        for thread in threads:
            thread.join(STALL_S)
            assert not thread.is_alive(), "a thread does not end"
        self.engine.close()
        assert not self.wrong, self.wrong
        growth = last / warm - 1
        print(f"process {self.number}: {sum(self.steps)} steps, {last >> 20} MiB, growth {growth:+.1%}", flush=True)
        assert growth < 0.1 or last - warm < 32 << 20, f"memory grew by {growth:.0%} from {warm >> 20} MiB"


def child(path: Path, number: int, seconds: float, threads: int) -> None:
    random.seed(number)
    Stress(path, number, threads).run(seconds)


def run(path: Path, seconds: float, processes: int, threads: int) -> None:
    children = [forked(child, path, i, seconds, threads) for i in range(processes)]
    for one in children:
        finished(one)
    with KVEngine(tiers=[{"tier": "disk", "path": str(path)}]) as engine:
        found = list(engine.list())
        assert engine.usage()["disk"][:2] == (sum(i.nbytes for i in found), len(found))
        assert engine.verify()["disk"] == (len(found), 0, 0, 0)
        assert not list((path / "tmp").iterdir())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--threads", type=int, default=16)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), given.seconds, given.processes, given.threads)
    print("no lost pin, no changed chunk, no deadlock, memory flat", file=sys.stderr)
