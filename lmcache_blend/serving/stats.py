"""The connector's numbers in vLLM's /metrics."""

from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

COUNTERS = {
    "hit_tokens_prefix": ("hit_tokens", "prefix", "Prompt tokens whose KV was loaded"),
    "hit_tokens_segment": ("hit_tokens", "segment", "Prompt tokens whose KV was loaded"),
    "recomputed_tokens": ("recomputed_tokens", "", "Reused tokens whose KV was computed anew"),
    "stored_tokens": ("stored_tokens", "", "Tokens stored in prefix chunks"),
    "stored_segments": ("stored_segments", "", "Segments stored"),
    "load_ms": ("load_milliseconds", "", "Milliseconds that forwards waited for prefix chunks"),
    "decode_ms": ("decode_milliseconds", "", "Milliseconds of reading and decoding segments"),
    "blend_ms": ("blend_milliseconds", "", "Milliseconds of blending, loading included"),
    "save_ms": ("save_milliseconds", "", "Milliseconds of copying KV out of the blocks"),
    "errors": ("errors", "", "Loads and saves that failed; their tokens are computed"),
}
"""Count -> (metric, kind, help)."""


@dataclass
class BlendStats(KVConnectorStats):
    """Sums by name since the last report."""

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> "BlendStats":
        names = {**self.data, **other.data}
        return BlendStats(data={n: self.data.get(n, 0) + other.data.get(n, 0) for n in names})

    def reduce(self) -> dict[str, int | float]:
        return {name: round(value, 1) for name, value in self.data.items()}

    def is_empty(self) -> bool:
        return not self.data


class BlendPromMetrics(KVConnectorPromMetrics):
    """lmcache_blend:hit_tokens_total{kind="prefix"} and so on."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict):
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        made: dict[str, Any] = {}
        self._series: dict[int, dict[str, Any]] = {engine: {} for engine in per_engine_labelvalues}
        for count, (name, kind, text) in COUNTERS.items():
            if name not in made:
                labels = [*labelnames, "kind"] if kind else labelnames
                made[name] = self._counter_cls(name=f"lmcache_blend:{name}", documentation=text, labelnames=labels)
            for engine, values in per_engine_labelvalues.items():
                self._series[engine][count] = made[name].labels(*values, *([kind] if kind else []))

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, value in transfer_stats_data.items():
            series = self._series[engine_idx].get(name)
            if series is not None and value > 0:
                series.inc(value)


__all__ = ["COUNTERS", "BlendPromMetrics", "BlendStats"]
