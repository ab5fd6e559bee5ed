"""Compare results: one board per task and model, ranked by quality, with the winner at equal true compute."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lmcache_blend.codecs import short_name
from lmcache_blend.eval import stats
from lmcache_blend.eval.results import Estimate, Results
from lmcache_blend.eval.writer import SAMPLES, read_samples

EXACT = ("full_recompute", "prefix_cache")
"""Methods that reuse nothing approximate: references, not rivals."""
ANALYSIS_ONLY = ("oracle",)
"""Methods that know full prefill's KV: bounds, not rivals."""
COMPUTE_SLACK = 0.02
"""True compute fractions this far apart count as equal."""


@dataclass(frozen=True)
class Row:
    """One combination. rank: 1 is best; None where `note` says why it is not ranked."""

    folder: Path
    results: Results
    rank: int | None = None
    note: str = ""

    @property
    def label(self) -> str:
        """Method with everything that sets it apart, but the ratio."""
        config = self.results.config
        variant = [f"{k}={v}" for k, v in config.policy_options.items() if k != "seed"]
        variant += [
            f"{k}={v}"
            for k, v in (("encode", config.encode), ("chunk_tokens", config.chunk_tokens))
            if v not in ("alone", 512)
        ]
        variant += [] if config.backend == "hf" else [config.backend]
        variant += [f"{k}={v}" for k, v in config.serving.items()]
        codec = short_name(config.codec)
        variant += [] if codec == "raw" else [f"codec={codec}"]
        return config.method + (f" ({', '.join(variant)})" if variant else "")

    @property
    def name(self) -> str:
        """Label and ratio, e.g. "epic 15 %"."""
        return (
            self.label
            if self.results.recompute_ratio is None
            else f"{self.label} {percent(self.results.recompute_ratio)}"
        )


@dataclass(frozen=True)
class Winner:
    """The best policy among those whose true compute is at most `compute`, that of the row named `budget`.

    by: quality or kl. value: the winner's own. rival: the next best other policy within the budget, or None.
    difference: the rival's minus the winner's answer NLL (by quality) or KL, paired over samples; above 0 the
    winner is better. clear: whether its interval excludes 0.
    """

    by: str
    budget: str
    compute: float
    name: str
    value: Estimate
    rival: str | None = None
    difference: Estimate | None = None

    @property
    def clear(self) -> bool:
        return self.difference is not None and self.difference.low > 0


@dataclass(frozen=True)
class Board:
    """Everything measured on one task with one model. kind: ranked, no signal, or fidelity (no answers)."""

    title: str
    kind: str
    rows: tuple[Row, ...]
    winners: tuple[Winner, ...]

    @property
    def best(self) -> Results:
        """The results that rest on the most samples: what is said about full prefill comes from there."""
        return max((row.results for row in self.rows), key=lambda r: r.n)


def make_boards(found: Sequence[tuple[Path, Results]]) -> list[Board]:
    """Group folders by what must be equal for a comparison, rank each group. Ranked boards come first."""
    groups: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for folder, results in found:
        groups[_key(results)].append(Row(folder, results))
    titles = _titles({key: rows[0].results for key, rows in groups.items()})
    boards = [_board(titles[key], rows) for key, rows in groups.items()]
    return sorted(boards, key=lambda b: (("ranked", "fidelity", "no signal").index(b.kind), b.title))


def percent(ratio: float) -> str:
    return f"{100 * ratio:g} %"


def _key(results: Results) -> tuple[str, ...]:
    c = results.config
    options = json.dumps(c.task_options, sort_keys=True)
    return (
        c.task,
        c.fingerprint,
        c.data_sha256 or "",
        options,
        c.dtype,
        c.device,
        str(c.seed),
        c.long_context,
    )


def _titles(groups: dict[tuple[str, ...], Results]) -> dict[tuple[str, ...], str]:
    """ "task x model", and what differs between groups of the same task and model."""
    names = ("task", "model", "data", "options", "dtype", "device", "seed", "long_context")
    titles = {}
    for key, results in groups.items():
        title = f"{results.task} × {results.model}"
        twins = [k for k, r in groups.items() if k != key and (r.task, r.model) == (results.task, results.model)]
        differs = [i for i in range(1, len(key)) if any(k[i] != key[i] for k in twins)]
        extra = [f"{names[i]} {key[i][:8] if i in (1, 2) else key[i]}" for i in differs]
        titles[key] = title + (f" ({', '.join(extra)})" if extra else "")
    return titles


def _board(title: str, rows: list[Row]) -> Board:
    most = max(rows, key=lambda row: row.results.n).results
    kind = "fidelity" if not most.has_answers else "ranked" if most.signal else "no signal"
    noted = [Row(r.folder, r.results, note=_note(r.results, most.n)) for r in rows]
    noted.sort(key=lambda r: (r.note.startswith("n "), *_order(r.results, kind)))
    if kind != "ranked":
        return Board(title, kind, tuple(noted), ())
    rank, ranked = 0, []
    for row in noted:
        rank += not row.note
        ranked.append(row if row.note else Row(row.folder, row.results, rank))
    return Board(title, kind, tuple(ranked), tuple(_winners(ranked)))


def _note(results: Results, most: int) -> str:
    if results.n < most:
        return f"n {results.n} of {most}"
    return "exact" if results.method in EXACT else "bound" if results.method in ANALYSIS_ONLY else ""


def _order(results: Results, kind: str) -> tuple[float, float]:
    quality, kl = results.metrics.quality, results.metrics.kl
    return (-quality.mean if quality and kind == "ranked" else 0.0, kl.mean if kl else 0.0)


def _winners(rows: Sequence[Row]) -> list[Winner]:
    """By quality and by KL, at the true compute that cacheblend, else the costliest, has at each ratio."""
    ranked = [r for r in rows if r.rank is not None]
    winners = []
    for ratio in sorted({r.results.recompute_ratio for r in ranked if r.results.recompute_ratio is not None}):
        rung = [r for r in ranked if r.results.recompute_ratio == ratio]
        own = [r for r in rung if r.results.method == "cacheblend"]
        budget = max(own or rung, key=lambda r: r.results.compute_fraction)
        within = [r for r in ranked if r.results.compute_fraction <= budget.results.compute_fraction + COMPUTE_SLACK]
        for by in ("quality", "kl"):
            # KL is negated, so that larger is better for both.
            scored = [
                (e.mean if by == "quality" else -e.mean, r) for r in within if (e := getattr(r.results.metrics, by))
            ]
            order = [r for _, r in sorted(scored, key=lambda pair: -pair[0])]
            if order:
                rivals = [r for r in order if r.label != order[0].label]
                winners.append(_winner(by, budget, order[0], rivals[0] if rivals else None))
    return winners


def _winner(by: str, budget: Row, best: Row, rival: Row | None) -> Winner:
    value = getattr(best.results.metrics, by)
    compute = budget.results.compute_fraction
    if rival is None:
        return Winner(by, budget.name, compute, best.name, value)
    field = "nll" if by == "quality" else "kl"
    mine, theirs = (read_samples(row.folder / SAMPLES)[0] for row in (best, rival))
    ids = [i for i in mine if i in theirs]
    a, b = (np.array([getattr(s[i], field) for i in ids], dtype=np.float64) for s in (theirs, mine))
    gap = stats.paired_difference(a, b)
    difference = Estimate(mean=float(gap.mean), low=float(gap.low), high=float(gap.high))
    return Winner(by, budget.name, compute, best.name, value, rival.name, difference)
