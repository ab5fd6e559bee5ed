"""Boards as Markdown, CSV, JSON and terminal tables, and `report`, which writes them with the plots."""

import csv
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lmcache_blend.errors import ConfigError, DataError
from lmcache_blend.eval.boards import COMPUTE_SLACK, Board, Row, Winner, make_boards, percent
from lmcache_blend.eval.results import Estimate, Metrics, Results
from lmcache_blend.eval.writer import find_folders, read_folder, write_atomic

SECTIONS = {
    "ranked": (
        "Ranked",
        "Ranked by quality = (NLL no context - NLL method) / (NLL no context - NLL full prefill): 1 is full prefill, 0 is no context. "
        "TTFT and compute are fractions of full prefill's; compute counts selection passes. Intervals are 95 % bootstrap intervals. "
        "Bold: best among the ranked.",
    ),
    "fidelity": (
        "Fidelity only",
        "These sets have no answers: methods are listed by KL against full prefill's own continuation, not ranked.",
    ),
    "no signal": (
        "No signal",
        "Full prefill is not better than no context on these samples (the interval includes 0): nothing here may be ranked.",
    ),
}


def report(root: Path, *, plots: bool = True) -> list[Board]:
    """Write leaderboard.md, leaderboard.csv and plots/*.png into `root` from every results folder below it.

    Broken folders are left out with a warning. Raises ConfigError where there are no results, ResultsError where
    nothing can be written.
    """
    found: list[tuple[Path, Results]] = []
    for folder in find_folders(root):
        try:
            results = read_folder(folder)
        except DataError as error:
            print(f"warning: {error}", file=sys.stderr)
            continue
        if results is not None:
            found.append((folder, results))
    if not found:
        raise ConfigError(f"no sample is measured below {root}; run `lmcache-blend run` with --output {root} first")
    boards = make_boards(found)
    write_atomic(root / "leaderboard.md", markdown(boards).encode())
    write_atomic(root / "leaderboard.csv", as_csv(boards).encode())
    if plots:
        # matplotlib takes a second to import and belongs to the extra `eval`.
        from lmcache_blend.eval.plots import write_plots

        write_plots(boards, root / "plots")
    return boards


def markdown(boards: Sequence[Board]) -> str:
    """The leaderboard as Markdown, one table per task and model."""
    lines = ["# Leaderboard", ""]
    for kind, (heading, text) in SECTIONS.items():
        chosen = [board for board in boards if board.kind == kind]
        if not chosen:
            continue
        lines += [f"## {heading}", "", text, ""]
        for board in chosen:
            columns = _columns(board)
            lines += [f"### {board.title}", "", facts(board), ""]
            lines += ["| " + " | ".join(columns) + " |", "|" + "|".join("---" for _ in columns) + "|"]
            lines += ["| " + " | ".join(f"**{c}**" if b else c for c, b in cells) + " |" for cells in _cells(board)]
            lines += ["", *(f"- {sentence(winner)}" for winner in board.winners)]
            lines += [""] if board.winners else []
    return "\n".join(lines)


def print_boards(boards: Sequence[Board], console: Console | None = None) -> None:
    """The same as tables in the terminal."""
    console = console or Console()
    for board in boards:
        table = Table(title=board.title, caption=facts(board), title_justify="left", caption_justify="left")
        for column in _columns(board):
            table.add_column(column, justify="left" if column == "method" else "right", no_wrap=column != "method")
        for cells in _cells(board):
            table.add_row(*(f"[bold]{c}[/bold]" if b else c for c, b in cells))
        console.print(table)
        if board.kind == "no signal":
            console.print("no signal: full prefill is not better than no context here; not ranked", style="yellow")
        for winner in board.winners:
            console.print(f"- {sentence(winner)}", highlight=False)


def as_csv(boards: Sequence[Board]) -> str:
    """One line per combination, every number with its interval, no units in the cells."""
    names = list(Metrics.model_fields)
    estimates = [f"{name}{end}" for name in [*names, "ttft_ratio"] for end in ("", "_low", "_high")]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["board", "section", "task", "model", "rank", "method", "variant", "recompute_ratio", "note", "n", "complete", "signal"]
        + ["compute_fraction", "recomputed_fraction", "ttft_ms_median", "ttft_ms_p95", "ttft_full_ms_median"]
        + ["loaded_bytes", "raw_kv_bytes", "bits_per_element", *estimates, "folder"]
    )
    for board in boards:
        for row in board.rows:
            r = row.results
            numbers = [getattr(r.metrics, name) for name in names] + [r.ttft_ratio]
            writer.writerow(
                [board.title, board.kind, r.task, r.model, row.rank, r.method, row.label, r.recompute_ratio, row.note, r.n]
                + [r.complete, r.signal, r.compute_fraction, r.recomputed_fraction, r.ttft_ms.median, r.ttft_ms.p95]
                + [r.ttft_full_ms.median, r.loaded_bytes, r.raw_kv_bytes, r.bits_per_element]
                + [value for e in numbers for value in ((e.mean, e.low, e.high) if e else ("", "", ""))]
                + [row.folder.name]
            )
    return out.getvalue()


def as_json(boards: Sequence[Board]) -> list[dict[str, Any]]:
    """The same as one JSON value: a list of boards."""
    return [
        {
            "title": board.title,
            "section": board.kind,
            "rows": [
                {"rank": row.rank, "note": row.note, "label": row.label, "folder": row.folder.name, **row.results.model_dump(mode="json")}
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


def facts(board: Board) -> str:
    """What the table rests on, in one line."""
    r = board.best
    parts = [f"n = {r.n}", f"{r.tokens:,.0f} tokens", f"full prefill TTFT {r.ttft_full_ms.median:,.0f} ms (median)"]
    m = r.metrics
    if m.nll_full and m.nll_no_context:
        parts.append(f"answer NLL {m.nll_full.mean:.3f} with full prefill, {m.nll_no_context.mean:.3f} without context")
    if m.f1_full:
        parts.append(f"F1 {m.f1_full.mean:.3f} with full prefill")
    if r.skipped:
        parts.append(f"{len(r.skipped)} samples skipped as too long")
    return ", ".join(parts)


def sentence(winner: Winner) -> str:
    """A winner in words, with what the difference to its nearest rival is worth."""
    what = "quality" if winner.by == "quality" else "KL"
    text = f"At equal true compute (at most that of {winner.budget}, {winner.compute:.3f} + {COMPUTE_SLACK:g}), by {what}: "
    text += f"{winner.name} ({_interval(winner.value)})"
    if winner.rival is None or winner.difference is None:
        return text + ", the only one within it."
    lower = "answer NLL" if winner.by == "quality" else "KL"
    gap = _interval(winner.difference)
    if winner.clear:
        return text + f" wins; its {lower} is {gap} below that of {winner.rival}."
    return text + f" leads, not clearly: {winner.rival}'s {lower} minus its own is {gap}, an interval that includes 0."


def _interval(e: Estimate) -> str:
    return f"{e.mean:.3f} [{e.low:.3f}, {e.high:.3f}]"


Column = tuple[str, Callable[[Row], str], Callable[[Results], float | None] | None]


def _metric(name: str, digits: int = 3, sign: int = 1, interval: bool = False) -> tuple[Callable[[Row], str], Callable[[Results], float | None]]:
    def show(row: Row) -> str:
        e = getattr(row.results.metrics, name)
        return "–" if e is None else _interval(e) if interval else f"{e.mean:.{digits}f}"

    def value(results: Results) -> float | None:
        e = getattr(results.metrics, name)
        return None if e is None else sign * e.mean

    return show, value


def _table_columns(board: Board) -> list[Column]:
    """Columns that hold at least one number on this board. The last part says what is best: larger values."""
    ratio: Callable[[Row], str] = lambda row: "–" if row.results.recompute_ratio is None else percent(row.results.recompute_ratio)  # noqa: E731
    bits: Callable[[Row], str] = lambda row: "–" if row.results.bits_per_element is None else f"{row.results.bits_per_element:.4g}"  # noqa: E731
    wanted: list[Column] = [
        ("rank", lambda row: row.note or str(row.rank or "–"), None),
        ("method", lambda row: row.label, None),
        ("ratio", ratio, None),
        ("quality (95 %)", *_metric("quality", interval=True)),
        ("NLL", *_metric("nll", sign=-1)),
        ("KL", *_metric("kl", sign=-1)),
        ("top-1", *_metric("top1_agreement")),
        ("flips", *_metric("flip_rate", 2, sign=-1)),
        ("F1", *_metric("f1")),
        ("Rouge-L", *_metric("rouge_l")),
        ("contains", *_metric("contains", 2)),
        ("TTFT", lambda row: f"{row.results.ttft_ratio.mean:.3f}", None),
        ("compute", lambda row: f"{row.results.compute_fraction:.3f}", None),
        ("rows", lambda row: f"{row.results.recomputed_fraction:.3f}", None),
        ("bits/el", bits, None),
        ("n", lambda row: str(row.results.n), None),
    ]
    dropped = {"quality (95 %)"} if board.kind != "ranked" else set()
    return [c for c in wanted if c[0] not in dropped and (c[2] is None or any(c[2](r.results) is not None for r in board.rows))]


def _columns(board: Board) -> list[str]:
    return [name for name, _, _ in _table_columns(board)]


def _cells(board: Board) -> list[list[tuple[str, bool]]]:
    """Rows of (text, whether it is the best of its column among the ranked)."""
    columns = _table_columns(board)
    best = [
        max((v for row in board.rows if row.rank is not None and (v := value(row.results)) is not None), default=None) if value else None
        for _, _, value in columns
    ]
    return [
        [
            (show(row), value is not None and row.rank is not None and top is not None and value(row.results) == top)
            for (_, show, value), top in zip(columns, best, strict=True)
        ]
        for row in board.rows
    ]
