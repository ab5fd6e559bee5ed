"""Prometheus metrics of the engine, in the process's default registry; scrape `exposition()`, as the HTTP API does.

An engine makes one TierMetrics per tier. Two of the same tier name count into the same series.
"""

from typing import Literal, get_args

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, generate_latest

MissCause = Literal["absent", "evicted", "corrupt", "timeout", "unavailable", "full", "error"]
"""Why a chunk was not served: not stored; gone between lookup and load; bytes that fail their checks; no answer in
time; the tier's circuit breaker is open; no room to load it into; any other failure."""
Direction = Literal["read", "write"]

SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

HITS = Counter("lmcache_blend_hits", "Chunks loaded and verified", ["tier"])
MISSES = Counter("lmcache_blend_misses", "Chunks not served, by cause", ["tier", "cause"])
BYTES = Counter("lmcache_blend_transfer_bytes", "Bytes moved, as stored", ["tier", "direction"])
TRANSFER_SECONDS = Histogram(
    "lmcache_blend_transfer_seconds",
    "Seconds per transfer, failed ones included",
    ["tier", "direction"],
    buckets=SECONDS,
)
QUEUE = Gauge("lmcache_blend_queue_depth", "Operations that wait for the tier or run in it", ["tier"])
EVICTIONS = Counter("lmcache_blend_evictions", "Chunks evicted for room", ["tier"])
ERRORS = Counter("lmcache_blend_errors", "Failed operations, by the exception's class", ["tier", "error"])
RETRIES = Counter("lmcache_blend_retries", "Operations tried once more", ["tier"])
CIRCUIT_OPEN = Gauge("lmcache_blend_circuit_open", "1 while the tier is left alone after failures, else 0", ["tier"])
USED_BYTES = Gauge("lmcache_blend_used_bytes", "Bytes that the tier holds", ["tier"])
CHUNKS = Gauge("lmcache_blend_chunks", "Chunks that the tier holds", ["tier"])


class TierMetrics:
    """The series of one tier; every method is cheap and safe from any thread."""

    def __init__(self, tier: str):
        self._tier = tier
        self._hits, self._evictions, self._retries = HITS.labels(tier), EVICTIONS.labels(tier), RETRIES.labels(tier)
        self._queue, self._open = QUEUE.labels(tier), CIRCUIT_OPEN.labels(tier)
        self._used, self._chunks = USED_BYTES.labels(tier), CHUNKS.labels(tier)
        # Every cause is a series from the start, so that a rate over the first miss is not lost.
        self._misses = {cause: MISSES.labels(tier, cause) for cause in get_args(MissCause)}
        self._bytes = {way: BYTES.labels(tier, way) for way in get_args(Direction)}
        self._seconds = {way: TRANSFER_SECONDS.labels(tier, way) for way in get_args(Direction)}

    def hit(self, chunks: int = 1) -> None:
        self._hits.inc(chunks)

    def miss(self, cause: MissCause, chunks: int = 1) -> None:
        self._misses[cause].inc(chunks)

    def moved(self, direction: Direction, nbytes: int, seconds: float) -> None:
        """One finished transfer."""
        self._bytes[direction].inc(nbytes)
        self._seconds[direction].observe(seconds)

    def queued(self, change: int) -> None:
        """More (or, below 0, fewer) operations waiting or running."""
        self._queue.inc(change)

    def evicted(self, chunks: int = 1) -> None:
        self._evictions.inc(chunks)

    def error(self, error: BaseException) -> None:
        ERRORS.labels(self._tier, type(error).__name__).inc()

    def retried(self) -> None:
        self._retries.inc()

    def circuit(self, is_open: bool) -> None:
        self._open.set(is_open)

    def holds(self, nbytes: int, chunks: int) -> None:
        self._used.set(nbytes)
        self._chunks.set(chunks)


def exposition() -> bytes:
    """Every metric of this process in Prometheus's text format."""
    return generate_latest(REGISTRY)


def value(name: str, **labels: str) -> float:
    """Present value of a series, 0 where it does not exist yet.

    >>> TierMetrics("doctest").miss("corrupt", 2)
    >>> value("lmcache_blend_misses_total", tier="doctest", cause="corrupt")
    2.0
    """
    return REGISTRY.get_sample_value(name, labels) or 0.0
