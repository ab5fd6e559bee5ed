"""What the engine's tiers reach of the machine's limits: memcpy, plain file I/O, a bare Redis client, in the same run.

Engine and limit take turns, in another order each round; the median of each counts. Every limit moves the same bytes in
pieces of the same size, with the threads that do it best.
"""

import itertools
import os
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from lmcache_blend.engine import Keyer, KVEngine, values
from lmcache_blend.errors import ChunkLostError, ConfigError
from lmcache_blend.types import KVChunk

CHUNK_TOKENS = 256
PATIENT = {"timeout_s": 600.0}  # a busy machine is no fault
THREADS = (1, 2)
PIECES = (1 << 19, 1 << 30)
"""Bytes that one write of the plain files takes at most: which is faster depends on the memory that the system finds
for its cache; the fastest is the limit."""
DEPTHS = (1, 4, 16)
"""Values in one pipeline of the bare Redis client; the fastest is the limit."""
LOOKUP_CHUNKS, LOOKUP_TOKENS = 20_000, 256


class Shape(NamedTuple):
    """KV of a model: by default Llama-3.2-1B's in bfloat16, 32 KiB a token, 8 MiB a chunk."""

    layers: int = 16
    heads: int = 8
    dim: int = 64

    @property
    def chunk_bytes(self) -> int:
        return self.layers * 2 * self.heads * CHUNK_TOKENS * self.dim * 2


def bench(
    nbytes: int = 1 << 30,
    shape: Shape | None = None,
    rounds: int = 5,
    folder: Path | None = None,
    urls: Sequence[str] = (),
    peer: tuple[str, Sequence[str]] | None = None,
) -> list[dict[str, Any]]:
    """One row per tier and operation.

    folder: for the disk tier, by default a temporary one. urls: remote tiers. peer: python of an environment with
    LMCache, and tiers ("cpu", "disk") to run there. Raises ConfigError where nothing fits into nbytes.
    """
    shape = shape or Shape()
    count = nbytes // shape.chunk_bytes
    if count < 1:
        raise ConfigError(f"{nbytes} bytes hold no chunk of {shape.chunk_bytes}; take more")
    chunks = make_chunks(count, shape)
    size = values.Blank.of(bytes(32), chunks[0]).nbytes
    buffers = [np.ones(size, np.uint8) for _ in chunks]
    sources = [np.ones(size, np.uint8) for _ in chunks]
    rows = cpu(chunks, buffers, sources, rounds)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        rows += disk(Path(scratch), chunks, buffers, sources, rounds)
    for url in urls:
        rows += remote(url, chunks, buffers, rounds)
    rows.append(lookup(rounds))
    return rows + ([] if peer is None else lmcache_rows(peer[0], peer[1], nbytes, shape, rows))


def make_chunks(count: int, shape: Shape) -> list[KVChunk]:
    """Chunks of random numbers, each in memory of its own."""
    rng, out = np.random.default_rng(0), []
    noise = rng.integers(0, 1 << 16, shape.heads * CHUNK_TOKENS * shape.dim + 4096, np.uint16)
    for i in range(count):
        tokens = torch.arange(CHUNK_TOKENS * i, CHUNK_TOKENS * (i + 1))
        layers = []
        for j in range(shape.layers):
            at = (i * shape.layers + j) % 2048
            k, v = (
                torch.from_numpy(noise[a : len(noise) - 4096 + a].copy()).view(torch.bfloat16) for a in (at, at + 9)
            )
            layers.append(tuple(x.view(shape.heads, CHUNK_TOKENS, shape.dim) for x in (k, v)))
        out.append(KVChunk(tokens, tuple(layers)))
    return out


def keys_of(chunks: Sequence[KVChunk]) -> list[bytes]:
    """Hashed anew in every run that is timed: whoever asks has the tokens of a prompt, and LMCache hashes them too."""
    return Keyer("bench").prefix_keys(torch.arange(CHUNK_TOKENS * len(chunks)))


def cpu(chunks, buffers, sources, rounds: int) -> list[dict[str, Any]]:
    """Against memcpy between buffers that were used before; so was the arena (a page's first use costs more)."""
    total = sum(b.nbytes for b in buffers)
    with KVEngine(tiers=[{"tier": "cpu", "capacity_bytes": total + (len(chunks) + 1) * 4096}]) as engine:
        engine.store(keys_of(chunks), chunks)

        def copy() -> None:
            for target, source in zip(buffers, sources, strict=True):
                target[:] = source

        def store() -> float:
            engine.clear()
            return timed(lambda: engine.store(keys_of(chunks), chunks))

        found = turns(
            rounds,
            store=store,
            retrieve=lambda: timed(lambda: served(engine, chunks, buffers)),
            copy=lambda: timed(copy),
        )
        found["retrieve in place"] = [timed(lambda: engine.retrieve(keys_of(chunks))) for _ in range(rounds)]
    operations = ("store", "retrieve", "retrieve in place")
    return [row("cpu", op, len(chunks), total, found[op], found["copy"], "memcpy") for op in operations]


def disk(folder: Path, chunks, buffers, sources, rounds: int) -> list[dict[str, Any]]:
    """Against plain files of the same sizes: written aside and renamed, read into buffers that are there."""
    total, plain = sum(b.nbytes for b in buffers), folder / "plain"
    plain.mkdir()
    with KVEngine(
        tiers=[{"tier": "disk", "path": str(folder / "tier"), "faults": PATIENT}], max_pending_bytes=2 * total
    ) as engine:

        def write() -> float:
            engine.clear()
            return timed(lambda: engine.store(keys_of(chunks), chunks, wait=True))

        def empty(threads: int, piece: int) -> float:
            for path in plain.iterdir():
                path.unlink()
            return timed(lambda: each(threads, lambda i: plain_write(plain / str(i), sources[i], piece), len(chunks)))

        timings: dict[str, Callable[[], float]] = {"write": write}
        for n, piece in itertools.product(THREADS, PIECES):
            timings[f"plain write {n} {piece}"] = lambda n=n, piece=piece: empty(n, piece)
        timings["read"] = lambda: timed(lambda: served(engine, chunks, buffers))
        for n in THREADS:
            timings[f"plain read {n}"] = lambda n=n: timed(
                lambda: each(n, lambda i: plain_read(plain / str(i), buffers[i]), len(chunks))
            )
        found = turns(rounds, **timings)
    out = []
    for op in ("write", "read"):
        limit = min((found[run] for run in timings if run.startswith(f"plain {op}")), key=statistics.median)
        out.append(row("disk", op, len(chunks), total, found[op], limit, "plain files"))
    return out


def remote(url: str, chunks, buffers, rounds: int) -> list[dict[str, Any]]:
    """Against a bare pipelined client where one is known (Redis), with values of the same size."""
    total = sum(b.nbytes for b in buffers)
    with (
        KVEngine(tiers=[{"tier": url, "faults": PATIENT}], max_pending_bytes=2 * total) as engine,
        _bare_client(url, buffers) as plain,
    ):
        name = engine.levels[0].name

        def write() -> float:
            engine.clear()
            return timed(lambda: engine.store(keys_of(chunks), chunks, wait=True))

        found = turns(rounds, write=write, read=lambda: timed(lambda: served(engine, chunks, buffers)), **plain)
        engine.clear()
    out = []
    for op in ("write", "read"):
        runs = (found[run] for run in plain if run.startswith(f"plain {op}"))
        limit = min(runs, key=statistics.median, default=None)
        out.append(row(name, op, len(chunks), total, found[op], limit, "bare pipelined client"))
    return out


@contextmanager
def _bare_client(url: str, buffers: Sequence[np.ndarray]) -> Iterator[dict[str, Callable[[], float]]]:
    """Runs "plain write N" and "plain read N" of redis-py with hiredis, N values a pipeline; none for other servers."""
    if not url.startswith("redis"):
        yield {}
        return
    import redis

    client = redis.Redis.from_url(url.replace("redis+unix:", "unix:"))
    values = {f"bare:{i}": bytes(b) for i, b in enumerate(buffers)}

    def run(depth: int, put: bool) -> float:
        began, names = time.perf_counter(), list(values)
        for at in range(0, len(names), depth):
            pipe = client.pipeline(transaction=False)
            for name in names[at : at + depth]:
                pipe.set(name, values[name]) if put else pipe.get(name)
            pipe.execute()
        return time.perf_counter() - began

    try:
        yield {f"plain {op} {n}": partial(run, n, op == "write") for n in DEPTHS for op in ("write", "read")}
    finally:
        client.delete(*values)
        client.close()


def lookup(rounds: int) -> dict[str, Any]:
    """20,000 chunks of one prompt, from token ids to tiers, all of them stored."""
    keyer, tokens = Keyer("bench"), torch.arange(LOOKUP_CHUNKS * LOOKUP_TOKENS) % 50_000
    tiny = KVChunk(torch.arange(1), ((torch.zeros(1, 1, 8), torch.zeros(1, 1, 8)),))
    with KVEngine(tiers=[{"tier": "cpu", "capacity_bytes": LOOKUP_CHUNKS * 8192}]) as engine:
        keys = keyer.prefix_keys(tokens)
        engine.store(keys, [tiny] * len(keys))

        def look() -> None:
            assert engine.lookup(keyer.prefix_keys(tokens)).prefix == LOOKUP_CHUNKS

        seconds = statistics.median(timed(look) for _ in range(rounds))
    return {"tier": "cpu", "operation": "lookup", "chunks": LOOKUP_CHUNKS, "chunks_per_s": LOOKUP_CHUNKS / seconds}


def lmcache_rows(python: str, tiers: Sequence[str], nbytes: int, shape: Shape, mine) -> list[dict[str, Any]]:
    """LMCache's engine on the same data sizes, in its own process and environment, against the same limits."""
    import json

    script = Path(__file__).with_name("lmcache_engine_peer.py")
    command = [python, str(script), str(nbytes), *map(str, shape), *tiers]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"LMCache did not run in {python}: {done.stderr.strip().splitlines()[-1:]}")
    limits = {(r["tier"], r["operation"]): r.get("limit_bytes_per_s") for r in mine}
    out = []
    for found in json.loads(done.stdout.strip().splitlines()[-1]):
        if "bytes_per_s" in found:
            same = {"store": "write", "retrieve": "read"}
            op = found["operation"] if found["tier"] == "cpu" else same[found["operation"]]
            limit = limits[found["tier"], op]
            found = {**found, "operation": op, "limit_bytes_per_s": limit, "ratio": found["bytes_per_s"] / limit}
        out.append({**found, "peer": "lmcache 0.5.6"})
    return out


def row(
    tier: str, op: str, chunks: int, nbytes: int, spent: Sequence[float], limits: Sequence[float] | None, name: str
) -> dict[str, Any]:
    """spent: seconds of each round. limits: seconds that the limit `name` takes for the same bytes in each round.

    The medians count; ratio_min and ratio_max are those of single rounds.
    """
    seconds, limit = statistics.median(spent), None if limits is None else statistics.median(limits)
    each_round = [] if limits is None else [a / b for a, b in zip(limits, spent, strict=True)]
    return {
        "tier": tier,
        "operation": op,
        "chunks": chunks,
        "bytes": nbytes,
        "bytes_per_s": nbytes / seconds,
        "limit": name,
        "limit_bytes_per_s": None if limit is None else nbytes / limit,
        "ratio": None if limit is None else limit / seconds,
        "ratio_min": min(each_round, default=None),
        "ratio_max": max(each_round, default=None),
        "peer": None,
    }


def served(engine: KVEngine, chunks: Sequence[KVChunk], buffers: Sequence[np.ndarray]) -> None:
    """Everything read, checked, and there. Raises ChunkLostError."""
    keys = keys_of(chunks)
    for key, chunk in zip(keys, engine.retrieve(keys, into=buffers), strict=True):
        if chunk is None:
            raise ChunkLostError(key, f"tier {engine.top.name} lost a chunk that it had stored; is it full?")


def plain_write(path: Path, data: np.ndarray, piece: int) -> None:
    aside = f"{path}.new"
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    left = data.data
    while left:
        left = left[os.write(fd, left[:piece]) :]
    os.close(fd)
    os.replace(aside, path)


def plain_read(path: Path, buffer: np.ndarray) -> None:
    fd = os.open(path, os.O_RDONLY)
    left = buffer.data
    while left:
        left = left[os.readv(fd, [left]) :]
    os.close(fd)


def each(threads: int, work: Callable[[int], None], count: int) -> None:
    if threads == 1:
        for i in range(count):
            work(i)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(count)))


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def turns(rounds: int, **runs: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each, measured in turns after one uncounted round.

    Each round has an order of its own: whoever comes second finds buffers and files warmer than who comes first.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name in random.Random(i).sample(list(runs), len(runs)) if i else runs:
            spent = runs[name]()
            if i:
                seconds[name].append(spent)
    return seconds
