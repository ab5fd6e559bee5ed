"""Faults of tiers are misses with a cause, within the deadline, and recovery needs no restart."""

import errno
import os
import threading
import time
from typing import ClassVar

import pytest
from kv import chunk, equal, flip, key, keys
from third_party_tier import DictTier, Unruly

from lmcache_blend import KVEngine
from lmcache_blend.engine import checked_io, faults
from lmcache_blend.engine.faults import FaultConfig, Guard
from lmcache_blend.engine.tiers.base import ABSENT, Miss
from lmcache_blend.metrics import TierMetrics, value

FAST = {"timeout_s": 0.3, "backoff_s": 0.01, "probe_s": 0.1}


def engine(**settings):
    return KVEngine(tiers=[{"tier": "third_party_tier.Unruly", "faults": {**FAST, **settings}}])


def unruly(engine):
    return engine.levels[0].tier


def test_an_error_is_tried_again_and_then_a_miss():
    guard = Guard(tier := Unruly(), "t", FaultConfig(**FAST, retries=2, failures=9), TierMetrics("t"))
    tier.put([key(0)], [[b"abc"]])
    calls, tier.mode = tier.calls, ConnectionResetError("gone")
    before = value("lmcache_blend_retries_total", tier="t")
    (out,) = guard.call("lookup", [key(0)])
    assert out.cause == "error"
    assert "gone" in out.detail
    assert tier.calls - calls == 3
    assert value("lmcache_blend_retries_total", tier="t") - before == 2
    tier.mode = None
    assert guard.call("lookup", [key(0), key(1)]) == [3, ABSENT]


def test_only_what_failed_is_tried_again():
    class Flaky(DictTier):
        asked: ClassVar = []

        def lookup(self, keys):
            self.asked.append(len(keys))
            return [Miss("error") if k == key(1) and len(self.asked) == 1 else 7 for k in keys]

    guard = Guard(Flaky(), "t", FaultConfig(**FAST), TierMetrics("t"))
    assert guard.call("lookup", keys(3)) == [7, 7, 7]
    assert Flaky.asked == [3, 1]


def test_no_more_gets_run_side_by_side_than_the_tier_takes():
    class Counting(DictTier):
        threads = 2
        running: ClassVar = []
        most: ClassVar = []

        def get(self, keys, buffers, offsets=None):
            self.running.append(1)
            self.most.append(len(self.running))
            time.sleep(0.01)
            self.running.pop()
            return super().get(keys, buffers, offsets)

    guard = Guard(tier := Counting(), "t", FaultConfig(), TierMetrics("t"))
    tier.put(keys(6), [[b"abc"]] * 6)
    buffers = [memoryview(bytearray(3)) for _ in range(6)]
    calling = [
        threading.Thread(target=guard.call, args=("get", keys(6), buffers, [0] * 6), kwargs={"part": 1})
        for _ in range(3)
    ]
    for thread in calling:
        thread.start()
    for thread in calling:
        thread.join()
    assert max(Counting.most) == 2


def test_a_hanging_tier_blocks_nobody_longer_than_its_timeout():
    with engine(failures=2) as e:
        e.store(keys(3), [chunk(i) for i in range(3)], wait=True)
        unruly(e).mode = hang = threading.Event()
        began = time.monotonic()
        assert e.retrieve(keys(3)) == [None] * 3
        assert 0.25 < time.monotonic() - began < 0.6
        assert e.retrieve(keys(3)) == [None] * 3
        assert e.levels[0].guard.is_open
        began = time.monotonic()
        for _ in range(50):
            assert e.retrieve(keys(3)) == [None] * 3
            assert e.lookup(keys(3)).prefix == 0
        assert time.monotonic() - began < 0.2, "an open breaker answers at once"
        assert value("lmcache_blend_circuit_open", tier="Unruly") == 1
        assert value("lmcache_blend_misses_total", tier="Unruly", cause="timeout") >= 6
        assert value("lmcache_blend_misses_total", tier="Unruly", cause="unavailable") >= 150
        unruly(e).mode = None
        hang.set()
        end = time.monotonic() + 5
        while e.levels[0].guard.is_open and time.monotonic() < end:
            time.sleep(0.01)
        assert all(equal(c, chunk(i)) for i, c in enumerate(e.retrieve(keys(3)))), "recovers without a restart"
        assert value("lmcache_blend_circuit_open", tier="Unruly") == 0


def test_a_breaker_stays_open_while_probes_fail():
    with engine(failures=1, retries=0) as e:
        unruly(e).mode = OSError("down")
        e.retrieve([key(0)])
        time.sleep(0.35)
        assert e.levels[0].guard.is_open
        assert unruly(e).calls >= 2, "it was probed"


def test_a_bad_tier_does_not_hide_a_good_one(tmp_path):
    tiers = [{"tier": "third_party_tier.Unruly", "faults": FAST}, {"tier": "disk", "path": str(tmp_path)}]
    with KVEngine(tiers=tiers) as e:
        e.store(keys(3), [chunk(i) for i in range(3)], wait=True)
        for mode in (OSError("x"), ValueError("x"), TimeoutError("x"), threading.Event()):
            unruly(e).mode = mode
            assert all(equal(c, chunk(i)) for i, c in enumerate(e.retrieve(keys(3)))), mode
            assert all(equal(s.chunk, chunk(i)) for i, s in enumerate(e.load(keys(3))) if s), mode
            assert e.store([key(9)], [chunk(9)], wait=True) == [True]


def test_late_answers_do_not_write_into_memory_that_is_used_again(tmp_path):
    """A read that timed out goes on in its thread; the slot that it fills must not become another chunk's."""
    tiers = [
        {"tier": "cpu", "capacity_bytes": 60_000},
        {"tier": "third_party_tier.Unruly", "faults": {**FAST, "failures": 99}},
    ]
    with KVEngine(tiers=tiers) as e:
        e.store(keys(3), [chunk(i) for i in range(3)], wait=True)
        e.clear("cpu")
        tier = e.levels[1].tier
        hang, plain = threading.Event(), DictTier.get

        def late(self, wanted, buffers, offsets=None):
            hang.wait(30)
            return plain(self, wanted, buffers, offsets)

        Unruly.get, saved = late, Unruly.get
        try:
            assert e.retrieve(keys(3)) == [None] * 3
        finally:
            Unruly.get = saved
        tier.mode = None
        fresh = [chunk(i) for i in range(10, 16)]
        e.store([key(i) for i in range(10, 16)], fresh)
        got = e.retrieve([key(i) for i in range(10, 16)])
        hang.set()
        time.sleep(0.2)
        again = e.retrieve([key(i) for i in range(10, 16)])
        for mine in (got, again):
            assert all(equal(c, f) for c, f in zip(mine, fresh, strict=True) if c is not None)


# Disks


def damaged(tmp_path, change):
    """An engine on a disk whose files went through a change, after which chunk 0 must be a miss or right."""
    with KVEngine(tiers=[{"tier": "disk", "path": str(tmp_path), "codec": "int8"}]) as e:
        e.store(keys(4), [chunk(i) for i in range(4)], wait=True)
    before = {cause: misses(cause) for cause in ("corrupt", "absent", "evicted")}
    with KVEngine(tiers=[{"tier": "disk", "path": str(tmp_path), "codec": "int8"}]) as e:
        change(e.levels[0].tier._directory.path(key(0)))
        out = e.retrieve(keys(4))
        assert out[0] is None
        assert all(item is not None for item in out[1:])
        assert e.get(key(0)) is None
        assert e.lookup([key(0)]).prefix == 0, "what is damaged is deleted"
        assert len(list(e.list())) == 3
        e.store([key(0)], [chunk(0)], wait=True)
        assert e.retrieve([key(0)])[0] is not None
        time.sleep(0.3)  # what people do to the files is noticed by the next count
        assert e.usage()["disk"][:2] == (sum(i.nbytes for i in e.list()), 4)
    return {cause: misses(cause) - n for cause, n in before.items()}


def misses(cause):
    return value("lmcache_blend_misses_total", tier="disk", cause=cause)


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (flip, "corrupt"),
        (lambda p: os.truncate(p, os.path.getsize(p) // 2), "corrupt"),
        (lambda p: os.truncate(p, 0), "corrupt"),
        (lambda p: os.truncate(p, 40), "corrupt"),
        (lambda p: os.truncate(p, os.path.getsize(p) * 2), "corrupt"),
        (os.unlink, "absent"),
    ],
)
def test_damaged_files_are_misses(tmp_path, change, cause):
    assert damaged(tmp_path, change)[cause] >= 1


def test_files_under_each_others_names_are_misses(tmp_path):
    with KVEngine(tiers=[{"tier": "disk", "path": str(tmp_path)}]) as e:
        e.store(keys(2), [chunk(0), chunk(1)], wait=True)
        path = e.levels[0].tier._directory.path
        os.replace(path(key(0)), path(key(1)))
        assert e.retrieve(keys(2)) == [None, None]


def test_a_full_disk_is_a_refused_store(tmp_path, monkeypatch):
    plain, room = os.pwritev, [40_000]

    def pwritev(fd, pieces, offset):
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        n = plain(fd, [memoryview(b"".join(pieces))[: room[0]]], offset)
        room[0] -= n
        return n

    monkeypatch.setattr(os, "pwritev", pwritev)
    monkeypatch.setattr(checked_io, "write", lambda *_: None)  # as it answers where the disk is full
    with KVEngine(tiers=[{"tier": "disk", "path": str(tmp_path)}]) as e:
        e.store(keys(9), [chunk(i) for i in range(9)], wait=True)
        kept = [i for i, item in enumerate(e.retrieve(keys(9))) if item is not None]
        assert 0 < len(kept) < 9
        assert all(equal(e.retrieve([key(i)])[0], chunk(i)) for i in kept)
        assert not any((tmp_path / "tmp").iterdir()), "nothing half written stays"
        assert e.usage()["disk"][:2] == (sum(i.nbytes for i in e.list()), len(kept))
        assert value("lmcache_blend_errors_total", tier="disk", error="Full") > 0
        room[0] = 1 << 30
        e.store(keys(9), [chunk(i) for i in range(9)], wait=True)
        assert e.lookup(keys(9)).prefix == 9


def test_a_read_only_disk_serves_and_takes_nothing(tmp_path, monkeypatch):
    with KVEngine(tiers=[{"tier": "disk", "path": str(tmp_path)}]) as e:
        e.store(keys(2), [chunk(0), chunk(1)], wait=True)
    plain = os.open

    def read_only(path, flags, *rest, **more):
        if flags & (os.O_RDWR | os.O_WRONLY | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system", path)
        return plain(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", read_only)
    with KVEngine(tiers=[{"tier": "disk", "path": str(tmp_path)}]) as e:
        assert all(equal(c, chunk(i)) for i, c in enumerate(e.retrieve(keys(2))))
        e.store([key(5)], [chunk(5)], wait=True)
        assert e.lookup([key(5)]).prefix == 0
        assert e.pin([key(0)]) in ([True], [False])
        assert e.clear() == 0
        assert e.usage()["disk"].chunks == 2
        assert value("lmcache_blend_errors_total", tier="disk", error="ReadOnly") > 0


@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_clock_jumps(tmp_path, monkeypatch, jump):
    tiers = [{"tier": "disk", "path": str(tmp_path), "capacity_bytes": 40_000}]
    with KVEngine(tiers=tiers) as e:
        e.store(keys(3), [chunk(i) for i in range(3)], wait=True)
        e.pin([key(0)], seconds=60)
        plain = time.time
        monkeypatch.setattr(time, "time", lambda: plain() + jump)
        for i in range(3, 20):
            e.store([key(i)], [chunk(i)], wait=True)
        assert e.lookup([key(0)]).prefix == 1, "this engine's own pins follow the monotonic clock"
        assert all(equal(s.chunk, chunk(i)) for i in range(20) if (s := e.get(key(i))))
    for path in tmp_path.rglob("*"):
        os.utime(path, (-1000, -1000) if jump < 0 else (1e11, 1e11))
    with KVEngine(tiers=tiers) as e:
        e.store([key(30)], [chunk(30)], wait=True)
        assert e.lookup([key(30)]).prefix == 1


def test_a_directory_that_vanishes(tmp_path):
    import shutil

    with KVEngine(tiers=[{"tier": "disk", "path": str(tmp_path / "kv")}]) as e:
        e.store(keys(2), [chunk(0), chunk(1)], wait=True)
        shutil.rmtree(tmp_path / "kv")
        assert e.retrieve(keys(2)) == [None, None]
        e.store([key(3)], [chunk(3)], wait=True)
        assert e.lookup([key(3)]).prefix == 0
        assert list(e.list()) == []


def test_foreign_files_are_left_alone(tmp_path):
    with KVEngine(tiers=[{"tier": "disk", "path": str(tmp_path)}]) as e:
        e.store([key(0)], [chunk(0)], wait=True)
        folder = tmp_path / "chunks" / key(0).hex()[:2]
        for name in ("README", "ZZ" * 32, "0" * 63, "ff" * 32 if key(0).hex()[:2] != "ff" else "00" * 32):
            (folder / name).write_bytes(b"mine")
        (tmp_path / "chunks" / "stray").write_bytes(b"mine")
        (folder / ("%s" % (key(0).hex()[:2] + "aa" * 31))).mkdir()
        time.sleep(0.3)  # until they are counted anew
        assert e.usage()["disk"].chunks == 1
    with KVEngine(tiers=[{"tier": "disk", "path": str(tmp_path)}]) as e:
        assert e.clear() >= 1
        assert (folder / "README").exists()


def test_a_file_of_impossible_size_is_a_miss(tmp_path):
    with KVEngine(tiers=[{"tier": "disk", "path": str(tmp_path)}]) as e:
        e.store([key(0)], [chunk(0)], wait=True)
        os.truncate(e.levels[0].tier._directory.path(key(0)), 1 << 42)
        assert e.retrieve([key(0)]) == [None]
        assert e.get(key(0)) is None
        assert e.lookup([key(0)]).prefix == 0


@pytest.mark.parametrize("state", [b"", b"x", b"LMCBDIR\n" + bytes(24), b"\xff" * 32, b"\0" * 4096])
def test_a_damaged_state_file_is_counted_anew(tmp_path, state):
    with KVEngine(tiers=[{"tier": "disk", "path": str(tmp_path)}]) as e:
        e.store(keys(3), [chunk(i) for i in range(3)], wait=True)
        (tmp_path / "state").write_bytes(state)
        assert e.usage()["disk"][:2] == (sum(i.nbytes for i in e.list()), 3)
        e.store([key(3)], [chunk(3)], wait=True)
        assert e.usage()["disk"][:2] == (sum(i.nbytes for i in e.list()), 4)


def test_guard_defaults_are_finite():
    assert faults.FaultConfig().timeout_s < 60
