"""Boards as Markdown and as tables in the terminal."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lmcache_blend.eval.boards import COMPUTE_SLACK, Board, Row, Winner, percent
from lmcache_blend.eval.results import Estimate, Results

TERMINAL = ("rank", "method", "ratio", "quality (95 %)", "KL", "top-1", "F1", "TTFT", "compute", "n")
"""Columns that the terminal shows; the files have more."""
SECTIONS = {
    "ranked": (
        "Ranked",
        "Ranked by quality = (NLL no context - NLL method) / (NLL no context - NLL full prefill): 1 "
        "is full prefill, 0 is no context. TTFT and compute are fractions of full prefill's; compute counts "
        "selection passes. Intervals are 95 % bootstrap intervals. Bold: best of the ranked. Exact methods "
        "and bounds are not ranked.",
    ),
    "fidelity": (
        "Fidelity only",
        "No answers to score: methods are listed by KL against full prefill's own continuation, not ranked.",
    ),
    "no signal": (
        "No signal",
        "Full prefill is not better than no context here (the interval includes 0): nothing is ranked.",
    ),
}


def markdown(boards: Sequence[Board]) -> str:
    """The leaderboard as Markdown, one table per task and model."""
    lines = ["# Leaderboard", ""]
    for kind, (heading, text) in SECTIONS.items():
        chosen = [board for board in boards if board.kind == kind]
        if not chosen:
            continue
        lines += [f"## {heading}", "", text, ""]
        for board in chosen:
            columns = [column.name for column in _columns(board)]
            lines += [f"### {board.title}", "", facts(board), ""]
            lines += ["| " + " | ".join(columns) + " |", "|" + "|".join("---" for _ in columns) + "|"]
            lines += ["| " + " | ".join(f"**{c}**" if b else c for c, b in cells) + " |" for cells in _cells(board)]
            lines += ["", *(f"- {sentence(winners)}" for winners in _by_budget(board)), ""]
    return "\n".join(lines)


def print_boards(boards: Sequence[Board], console: Console | None = None) -> None:
    """The columns that matter most as tables in the terminal; a pipe gets wide lines."""
    console = console or Console(width=None if sys.stdout.isatty() else 160)
    narrow = console.width < 110
    for board in boards:
        console.print(
            f"\n[bold]{board.title}[/bold]"
            + ("" if board.kind == "ranked" else f"  ({SECTIONS[board.kind][0].lower()})")
        )
        columns = [column.name for column in _columns(board)]
        shown = [i for i, name in enumerate(columns) if name in TERMINAL]
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
        for i in shown:
            table.add_column(columns[i], justify="left" if columns[i] == "method" else "right", overflow="fold")
        for cells in _cells(board):
            texts = [(text.split(" [")[0] if narrow else text, bold) for text, bold in cells]
            table.add_row(*(Text(texts[i][0], style="bold" if texts[i][1] else "") for i in shown))
        console.print(table)
        console.print(facts(board), style="dim", highlight=False)
        if board.kind != "ranked":
            console.print(SECTIONS[board.kind][1], style="yellow", highlight=False)
        for winners in _by_budget(board):
            console.print(sentence(winners), highlight=False, markup=False)


def facts(board: Board) -> str:
    """What the table rests on, in one line."""
    r = board.best
    parts = [
        f"n = {r.n}",
        f"{r.tokens:,.0f} tokens",
        f"full prefill TTFT {r.ttft_full_ms.median:,.0f} ms (median)",
    ]
    m = r.metrics
    if m.nll_full and m.nll_no_context:
        parts.append(f"answer NLL {m.nll_full.mean:.3f} with full prefill, {m.nll_no_context.mean:.3f} without context")
    if m.f1_full:
        parts.append(f"F1 {m.f1_full.mean:.3f} with full prefill")
    if r.skipped:
        parts.append(f"{len(r.skipped)} samples skipped as too long")
    return ", ".join(parts)


def sentence(winners: Sequence[Winner]) -> str:
    """Who wins at one budget of true compute, by quality and by KL, and by how much over the next."""
    first = winners[0]
    heading = f"Equal true compute, at most {first.compute:.3f} (that of {first.budget}) + {COMPUTE_SLACK:g}: "
    parts = []
    for winner in winners:
        what, lead = ("quality", "answer NLL") if winner.by == "quality" else ("KL", "KL")
        text = f"by {what} {winner.name} ({_interval(winner.value)}"
        if winner.rival and winner.difference:
            verdict = "" if winner.clear else ", not a clear lead"
            text += f"; {lead} lower by {_interval(winner.difference)} than {winner.rival}{verdict}"
        parts.append(text + ")")
    return heading + ", ".join(parts) + "."


def _by_budget(board: Board) -> list[list[Winner]]:
    """The board's winners, those of one budget together."""
    budgets = dict.fromkeys((w.budget, w.compute) for w in board.winners)
    return [[w for w in board.winners if (w.budget, w.compute) == budget] for budget in budgets]


def _interval(e: Estimate) -> str:
    return f"{e.mean:.3f} [{e.low:.3f}, {e.high:.3f}]"


@dataclass(frozen=True)
class Column:
    """One column. show: its text. value: a number, larger is better, by which the best is bold; or None."""

    name: str
    show: Callable[[Row], str]
    value: Callable[[Results], float | None] = lambda results: None


def _metric(name: str, field: str, digits: int = 3, *, lower_is_better: bool = False) -> Column:
    def value(results: Results) -> float | None:
        estimate = getattr(results.metrics, field)
        return None if estimate is None else -estimate.mean if lower_is_better else estimate.mean

    return Column(name, lambda row: _optional(_mean(getattr(row.results.metrics, field)), digits), value)


def _mean(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate.mean


def _optional(number: float | None, digits: int) -> str:
    return "–" if number is None else f"{number:.{digits}f}"


def _quality(row: Row) -> str:
    estimate = row.results.metrics.quality
    return "–" if estimate is None else _interval(estimate)


def _percentiles(results: Results) -> str:
    """Of a serving engine only: elsewhere nothing waits in a queue."""
    times = results.ttft_ms
    if results.queries_per_second is None or times.p99 is None:
        return "–"
    return "/".join(f"{value:,.0f}" for value in (times.median, times.p95, times.p99))


def _ratio(row: Row) -> str:
    return "–" if row.results.recompute_ratio is None else percent(row.results.recompute_ratio)


COLUMNS = (
    Column("rank", lambda row: row.note or str(row.rank or "–")),
    Column("method", lambda row: row.label),
    Column("ratio", _ratio),
    Column("quality (95 %)", _quality, lambda results: _mean(results.metrics.quality)),
    _metric("NLL", "nll", lower_is_better=True),
    _metric("KL", "kl", lower_is_better=True),
    _metric("top-1", "top1_agreement"),
    _metric("flips", "flip_rate", 2, lower_is_better=True),
    _metric("F1", "f1"),
    _metric("Rouge-L", "rouge_l"),
    _metric("contains", "contains", 2),
    Column("TTFT", lambda row: f"{row.results.ttft_ratio.mean:.3f}"),
    Column("TTFT p50/p95/p99 ms", lambda row: _percentiles(row.results)),
    Column("q/s", lambda row: _optional(row.results.queries_per_second, 2)),
    Column("compute", lambda row: f"{row.results.compute_fraction:.3f}"),
    Column("rows", lambda row: f"{row.results.recomputed_fraction:.3f}"),
    Column("bits/el", lambda row: _optional(row.results.bits_per_element, 1)),
    Column("n", lambda row: str(row.results.n)),
)


def _columns(board: Board) -> list[Column]:
    """Those with something in them; quality means nothing where nothing is ranked."""
    return [
        column
        for column in COLUMNS
        if any(column.show(row) != "–" for row in board.rows)
        and (board.kind == "ranked" or "quality" not in column.name)
    ]


def _cells(board: Board) -> list[list[tuple[str, bool]]]:
    """Rows of (text, whether it is the best of its column among the ranked)."""
    ranked = [row.results for row in board.rows if row.rank is not None]
    best = [max((v for r in ranked if (v := column.value(r)) is not None), default=None) for column in _columns(board)]
    return [
        [
            (column.show(row), row.rank is not None and top is not None and column.value(row.results) == top)
            for column, top in zip(_columns(board), best, strict=True)
        ]
        for row in board.rows
    ]
