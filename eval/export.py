"""Boards as CSV and JSON: every number, for other programs."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from lmcache_blend.eval.boards import Board
from lmcache_blend.eval.results import Metrics


def as_csv(boards: Sequence[Board]) -> str:
    """One line per combination, every number with its interval, no units in the cells."""
    names = list(Metrics.model_fields)
    estimates = [f"{name}{end}" for name in [*names, "ttft_ratio"] for end in ("", "_low", "_high")]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        [
            *("board", "section", "task", "model", "rank", "method", "variant", "recompute_ratio", "note"),
            *("n", "complete", "signal", "compute_fraction", "recomputed_fraction"),
            *("backend", "ttft_ms_median", "ttft_ms_p95", "ttft_ms_p99", "ttft_full_ms_median", "queries_per_second"),
            *("loaded_bytes", "raw_kv_bytes", "bits_per_element", *estimates, "folder"),
        ]
    )
    for board in boards:
        for row in board.rows:
            r = row.results
            numbers = [*(getattr(r.metrics, name) for name in names), r.ttft_ratio]
            writer.writerow(
                [
                    *(board.title, board.kind, r.task, r.model, row.rank, r.method, row.label),
                    *(r.recompute_ratio, row.note, r.n, r.complete, r.signal),
                    *(r.compute_fraction, r.recomputed_fraction),
                    *(r.backend, r.ttft_ms.median, r.ttft_ms.p95, r.ttft_ms.p99, r.ttft_full_ms.median),
                    r.queries_per_second,
                    *(r.loaded_bytes, r.raw_kv_bytes, r.bits_per_element),
                    *(value for e in numbers for value in ((e.mean, e.low, e.high) if e else ("", "", ""))),
                    row.folder.name,
                ]
            )
    return out.getvalue()


def as_json(boards: Sequence[Board]) -> list[dict[str, Any]]:
    """The same as one JSON value: a list of boards."""
    return [
        {
            "title": board.title,
            "section": board.kind,
            "rows": [
                {
                    "rank": row.rank,
                    "note": row.note,
                    "label": row.label,
                    "folder": row.folder.name,
                    **row.results.model_dump(mode="json"),
                }
                for row in board.rows
            ],
            "winners": [
                {
                    "by": w.by,
                    "budget": w.budget,
                    "compute_fraction": w.compute,
                    "winner": w.name,
                    "value": w.value.model_dump(),
                    "rival": w.rival,
                    "difference": w.difference.model_dump() if w.difference else None,
                    "clear": w.clear,
                }
                for w in board.winners
            ],
        }
        for board in boards
    ]
