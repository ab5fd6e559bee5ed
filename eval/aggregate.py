"""From samples to results.

Every number in results.json is computed from config.json and samples.jsonl alone, so that an interrupted run
can be reported and a resumed one gives the same numbers.
"""

from collections.abc import Sequence

import numpy as np

from lmcache_blend.eval import stats
from lmcache_blend.eval.results import Estimate, Metrics, Results, RunConfig, SampleResult, Skipped, Times


def aggregate(
    config: RunConfig,
    samples: Sequence[SampleResult],
    *,
    skipped: Sequence[Skipped] = (),
    complete: bool = False,
    versions: dict[str, str | int] | None = None,
) -> Results:
    """Sum samples (at least one) up; the same samples give the same numbers to the last bit."""
    none, method, full = (_column(samples, name) for name in ("nll_no_context", "nll", "nll_full"))
    answered = len(none) > 0
    metrics = {
        name: _estimate(_column(samples, name)) for name in Metrics.model_fields if name not in ("quality", "flip_rate")
    }
    metrics["flip_rate"] = _estimate(_column(samples, "flip"))
    signal = answered and bool(stats.has_signal(none, full))
    metrics["quality"] = _plain(stats.normalised_quality(none, method, full)) if answered else None
    ttft, ttft_full = _column(samples, "ttft_ms"), _column(samples, "ttft_full_ms")
    latency, burst = _column(samples, "latency_ms"), _column(samples, "burst_ms")
    loaded, loaded_kv = _column(samples, "loaded_bytes"), _column(samples, "loaded_kv_bytes")
    stages = {stage: 0.0 for sample in samples for stage in sample.stages_ms}
    return Results(
        task=config.task,
        model=config.model,
        method=config.method,
        recompute_ratio=config.recompute_ratio,
        codec=config.codec,
        backend=config.backend,
        n=len(samples),
        complete=complete,
        signal=signal,
        has_answers=answered,
        metrics=Metrics(**metrics),
        ttft_ms=_times(ttft),
        ttft_full_ms=_times(ttft_full),
        ttft_ratio=_median_ratio(ttft, ttft_full),
        compute_fraction=float(_column(samples, "compute_fraction").mean()),
        recomputed_fraction=float(_column(samples, "recomputed_fraction").mean()),
        loaded_bytes=float(loaded.mean()),
        raw_kv_bytes=float(_column(samples, "raw_kv_bytes").mean()),
        bits_per_element=float(16 * loaded.sum() / loaded_kv.sum()) if loaded_kv.sum() else None,
        stages_ms={name: float(np.mean([s.stages_ms.get(name, 0.0) for s in samples])) for name in stages},
        latency_ms=_times(latency) if len(latency) else None,
        queries_per_second=float(1e3 / burst.mean()) if len(burst) else None,
        tokens=float(_column(samples, "tokens").mean()),
        skipped=list(skipped),
        versions=versions or {},
        config=config,
    )


def _column(samples: Sequence[SampleResult], name: str) -> np.ndarray:
    """[n] float64 of one field, samples without it left out."""
    return np.array([v for s in samples if (v := getattr(s, name)) is not None], dtype=np.float64)


def _estimate(values: np.ndarray) -> Estimate | None:
    return _plain(stats.bootstrap(values)) if len(values) else None


def _plain(interval: stats.Interval) -> Estimate | None:
    """None where a number is not finite (a ratio over nothing), which JSON could not hold."""
    numbers = {"mean": float(interval.mean), "low": float(interval.low), "high": float(interval.high)}
    return Estimate(**numbers) if np.isfinite(list(numbers.values())).all() else None


def _times(values: np.ndarray) -> Times:
    median, p95, p99 = np.percentile(values, [50, 95, 99])
    return Times(mean=float(values.mean()), median=float(median), p95=float(p95), p99=float(p99))


def _median_ratio(values: np.ndarray, reference: np.ndarray) -> Estimate:
    """Ratio of medians; the interval draws samples with both their times."""
    draws = np.random.default_rng(stats.SEED).integers(0, len(values), (stats.RESAMPLES, len(values)))
    ratios = np.median(values[draws], axis=1) / np.median(reference[draws], axis=1)
    low, high = np.percentile(ratios, [2.5, 97.5])
    return Estimate(mean=float(np.median(values) / np.median(reference)), low=float(low), high=float(high))
