"""Several writers on one directory, one of them killed (SIGKILL) at a random moment again and again.

    python tests/crash_disk.py [--kills 200] [--writers 3] [--seed 0]

While the others write on: every file decodes bit for bit to the chunk that its key names, and unless a change was cut
short, which the next to take the lock repairs, the count in the state file is that of the files. At the end, with all
writers dead: a restart leaves no temporary file and no pin without a chunk, and the count is exact.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

from kv import chunk, equal, key

from lmcache_blend.engine import KVEngine
from lmcache_blend.engine.tiers.directory import STATE, Directory

CHUNKS = 40
MINE = {key(i): chunk(i, tokens=64, dim=32) for i in range(CHUNKS)}
ROOM = 25 * 200_000


def engine(path: Path, codec: str | None = None) -> KVEngine:
    return KVEngine(tiers=[{"tier": "disk", "path": str(path), "capacity_bytes": ROOM, "codec": codec, "threads": 2}])


def writer(path: Path, seed: int, ready: int) -> None:
    """Store, read, delete, pin and unpin until killed."""
    rng = random.Random(seed)
    mine = engine(path, rng.choice([None, "lossless"]))
    names = list(MINE)
    os.write(ready, b"x")
    while True:
        some = rng.sample(names, rng.randrange(1, 6))
        what = rng.random()
        if what < 0.6:
            mine.store(some, [MINE[k] for k in some], wait=True)
        elif what < 0.75:
            mine.levels[0].delete(some)
        elif what < 0.85:
            mine.pin(some[:1], seconds=rng.choice([0.01, 5.0]))
        elif what < 0.9:
            mine.unpin(some)
        else:
            wrong = [k for k, c in zip(some, mine.retrieve(some), strict=True) if c and not equal(c, MINE[k])]
            if wrong:
                os._exit(3)


def check(path: Path, restarted: bool) -> None:
    """Raises AssertionError. restarted: no writer runs."""
    directory = Directory(path)
    with directory.locked():
        files = {e.key: e.nbytes for e in directory.entries()}
        _, _, dirty, nbytes, chunks = STATE.unpack(os.pread(directory._state, STATE.size, 0))
        assert dirty or (nbytes, chunks) == (sum(files.values()), len(files)), "the count is wrong"
        assert directory.count() == (sum(files.values()), len(files))
        assert sum(files.values()) <= ROOM
    with engine(path) as mine:
        for name in files:
            (found,) = mine.retrieve([name])
            assert found is None or equal(found, MINE[name]), f"{name.hex()} decodes to something else"
            assert found is not None or not restarted, f"{name.hex()} is there and unreadable"
    if restarted:
        assert not list((path / "tmp").iterdir()), "temporary files stay"
        assert {p.name for p in (path / "pins").iterdir()} <= {k.hex() for k in files}, "pins without a chunk stay"
    directory.close()


def forked(work, *arguments) -> int:
    """Process id of a child that does the work and exits, with 1 after an exception."""
    child = os.fork()
    if child:
        return child
    try:
        work(*arguments)
        os._exit(0)
    except BaseException as error:
        print(f"{work.__name__}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def finished(child: int) -> None:
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == 0, f"a checking process ended with {status}"


def run(path: Path, kills: int, writers: int, seed: int) -> None:
    rng = random.Random(seed)
    running: list[int] = []

    def start() -> None:
        came, ready = os.pipe()
        running.append(forked(writer, path, rng.randrange(1 << 30), ready))
        os.read(came, 1)
        os.close(came)
        os.close(ready)

    for _ in range(writers):
        start()
    try:
        for i in range(kills):
            time.sleep(rng.uniform(0.0, 0.04))
            victim = running.pop(rng.randrange(len(running)))
            os.kill(victim, signal.SIGKILL)
            _, status = os.waitpid(victim, 0)
            assert os.WIFSIGNALED(status), f"a writer ended by itself with {os.waitstatus_to_exitcode(status)}"
            if i % 4 == 0:
                finished(forked(check, path, False))
            start()
    finally:
        for child in running:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    finished(forked(check, path, True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--writers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        run(Path(folder), given.kills, given.writers, given.seed)
        print(
            f"{given.kills} kills in {time.monotonic() - began:.0f} s: every chunk whole or absent, nothing left over"
        )
