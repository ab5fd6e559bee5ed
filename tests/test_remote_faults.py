"""A Redis that is killed, hangs, is slow, restarts empty or runs out of memory under an engine that 8 threads use:
no wrong byte, nobody waits longer than the configured timeout, and all is well again without a restart of the engine.
"""

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from kv import chunk, equal, key
from servers import Proxy, redis_server

from lmcache_blend import KVEngine
from lmcache_blend.metrics import value

TIMEOUT_S, SLACK_S, CHUNKS, THREADS = 0.5, 0.3, 24, 8
WANTED = [chunk(i, tokens=64, dim=64) for i in range(CHUNKS)]


@pytest.fixture
def server():
    server = redis_server()
    yield server
    server.close()


@contextmanager
def engine_on(port: int) -> Iterator[KVEngine]:
    """One tier, so that every chunk that is served came from the server. Parts, so that both layouts are met."""
    tier = {"tier": f"redis://127.0.0.1:{port}", "timeout_s": TIMEOUT_S, "part_bytes": 40_000}
    faults = {"timeout_s": TIMEOUT_S, "probe_s": 0.1, "failures": 2}
    with KVEngine(tiers=[{**tier, "faults": faults, "codec": "zstd"}]) as engine:
        yield engine


class Load:
    """Eight threads that store and retrieve until the block ends; raises what went wrong in any of them."""

    def __init__(self, engine: KVEngine):
        self.engine, self.longest = engine, 0.0
        self._stop, self._wrong = threading.Event(), []
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(THREADS)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(10)
        assert not any(thread.is_alive() for thread in self._threads), "a thread hangs"
        assert not self._wrong, self._wrong[:3]

    def _run(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self._stop.is_set():
            i, start = rng.randrange(CHUNKS), time.monotonic()
            try:
                if rng.random() < 0.3:
                    self.engine.store([key(i)], [WANTED[i]])
                else:
                    (found,) = self.engine.retrieve([key(i)])
                    if found is not None and not equal(found, WANTED[i]):
                        self._wrong.append(f"chunk {i} came back as another one")
            except BaseException as error:
                self._wrong.append(repr(error))
            self.longest = max(self.longest, time.monotonic() - start)

    def served(self, seconds: float = 10.0) -> bool:
        """Whether chunks come from the server again within so long (not from what waits to be written to it)."""
        before, end = hits(), time.monotonic() + seconds
        while time.monotonic() < end:
            if hits() > before + 10:
                return True
            time.sleep(0.02)
        return False


def hits() -> float:
    return value("lmcache_blend_hits_total", tier="redis")


def test_killed_and_restarted_empty(server):
    with engine_on(server.port) as engine, Load(engine) as load:
        assert load.served()
        server.kill()
        time.sleep(1.0)
        server.start()
        assert load.served()
    assert load.longest < TIMEOUT_S + SLACK_S


def test_hung_and_gone_on(server):
    with engine_on(server.port) as engine, Load(engine) as load:
        assert load.served()
        server.hang()
        time.sleep(2.0)
        server.go_on()
        assert load.served()
    assert load.longest < TIMEOUT_S + SLACK_S


def test_slow(server):
    with Proxy(server.port) as proxy, engine_on(proxy.port) as engine, Load(engine) as load:
        assert load.served()
        proxy.delay_s = 3 * TIMEOUT_S
        time.sleep(2.0)
        proxy.delay_s = 0.0
        assert load.served()
    assert load.longest < TIMEOUT_S + SLACK_S


def test_emptied(server):
    import redis

    client = redis.Redis(port=server.port)
    with engine_on(server.port) as engine, Load(engine) as load:
        for _ in range(20):
            assert load.served()
            client.flushall()
    assert load.longest < TIMEOUT_S + SLACK_S


def test_out_of_memory(server):
    import redis

    client = redis.Redis(port=server.port)
    with engine_on(server.port) as engine, Load(engine) as load:
        assert load.served()
        client.config_set("maxmemory", "1mb")
        time.sleep(1.0)
        client.flushall()
        # The server is full even when it is empty: its own buffers take a megabyte.
        before = value("lmcache_blend_errors_total", tier="redis", error="Full")
        assert not load.served(1.0)
        assert value("lmcache_blend_errors_total", tier="redis", error="Full") > before
        client.config_set("maxmemory", "0")
        assert load.served()
    assert load.longest < TIMEOUT_S + SLACK_S


def test_replaced_by_garbage(server):
    """What others write under our names is a miss, whatever it is."""
    import redis

    client, rng = redis.Redis(port=server.port), random.Random(0)
    with engine_on(server.port) as engine, Load(engine) as load:
        assert load.served()
        end = time.monotonic() + 2
        while time.monotonic() < end:
            for name in client.scan_iter("lmcache-blend:{*}"):
                if client.type(name) == b"string":
                    kind = rng.randrange(3)
                    if kind == 0:
                        client.setrange(name, rng.randrange(client.strlen(name) or 1), rng.randbytes(3))
                    elif kind == 1:
                        client.set(name, client.get(name) or b"")
                    else:
                        client.set(name, rng.randbytes(rng.randrange(1, 5000)))
                else:
                    fields = [f for f in client.hkeys(name) if b":" in f]
                    if fields and rng.random() < 0.5:
                        client.hdel(name, rng.choice(fields))
                    elif fields:
                        client.hset(name, rng.choice([*fields, b"size", b"part", b"mark"]), rng.randbytes(20))
        assert load.served()
