"""Metrics: Prometheus's text format, every cause a series from the start, counted by tier."""

from prometheus_client.parser import text_string_to_metric_families

from lmcache_blend.metrics import MissCause, TierMetrics, exposition, value


def series() -> dict[tuple[str, frozenset], float]:
    families = text_string_to_metric_families(exposition().decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def test_every_cause_of_a_miss_is_a_series_before_the_first_miss():
    TierMetrics("fresh")
    found = {
        dict(labels)["cause"]
        for (name, labels) in series()
        if name == "lmcache_blend_misses_total" and ("tier", "fresh") in labels
    }
    assert found == set(MissCause.__args__)


def test_what_is_counted_can_be_read_back():
    metrics = TierMetrics("counted")
    metrics.hit(3)
    metrics.miss("corrupt")
    metrics.moved("read", 4096, 0.02)
    metrics.queued(2)
    metrics.queued(-1)
    metrics.evicted(5)
    metrics.retried()
    metrics.error(TimeoutError())
    metrics.circuit(True)
    metrics.holds(10, 2)
    got = {
        name: v
        for (name, labels), v in series().items()
        if ("tier", "counted") in labels and v and "created" not in name
    }
    wanted = {
        "hits_total": 3, "misses_total": 1, "transfer_bytes_total": 4096, "transfer_seconds_count": 1,
        "transfer_seconds_sum": 0.02, "queue_depth": 1, "evictions_total": 5, "retries_total": 1, "errors_total": 1,
        "circuit_open": 1, "used_bytes": 10, "chunks": 2,
    }  # fmt: skip
    assert {k.removeprefix("lmcache_blend_"): v for k, v in got.items() if not k.endswith("_bucket")} == wanted
    assert value("lmcache_blend_transfer_seconds_bucket", tier="counted", direction="read", le="0.025") == 1
    assert value("lmcache_blend_errors_total", tier="counted", error="TimeoutError") == 1
    assert value("lmcache_blend_hits_total", tier="never") == 0
