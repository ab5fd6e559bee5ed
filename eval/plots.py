"""Plots of a report: quality and KL against TTFT and against true compute. Traces are drawn by plot_traces.

Colours name methods and marker shapes name ratios, the same in every plot; legends stand outside the data.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lmcache_blend.eval.boards import ANALYSIS_ONLY, EXACT, Board, Row, percent
from lmcache_blend.eval.results import Estimate, Results
from lmcache_blend.eval.writer import write_atomic, writing

COLOURS = {
    "full_recompute": "#222222",
    "prefix_cache": "#8c8c8c",
    "full_reuse": "#56b4c9",
    "random": "#b07aa1",
    "epic": "#3b6fb6",
    "cacheblend": "#d1495b",
    "query_attention": "#4a9c4f",
    "attention_value_norm": "#e8871e",
    "oracle": "#8a5a3c",
}
SPARE_COLOURS = ("#00798c", "#c9a227", "#7b3294", "#66c2a5", "#e78ac3", "#5e548e", "#9a031e", "#606c38")
MARKERS = "osD^vP*Xh<>"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 130,
}
X_AXES: dict[str, tuple[str, Callable[[Results], tuple[float, float, float]]]] = {
    "ttft": (
        "median TTFT, fraction of full prefill (log)",
        lambda r: (r.ttft_ratio.mean, r.ttft_ratio.low, r.ttft_ratio.high),
    ),
    "compute": (
        "true compute, fraction of full prefill (log)",
        lambda r: (r.compute_fraction, r.compute_fraction, r.compute_fraction),
    ),
}


def write_plots(boards: Sequence[Board], folder: Path) -> list[Path]:
    """Write every plot as PNG and return the paths. Raises ResultsError."""
    from lmcache_blend.eval.codec_plots import answers_figure
    from lmcache_blend.eval.plot_traces import deviation_figure, stages_figure

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    colours = method_colours(row.label for board in boards for row in board.rows)
    written = []
    with mpl.rc_context(STYLE):
        written += [save(scatter_figure(boards, x, colours), folder / f"quality_vs_{x}.png") for x in X_AXES]
        for board in boards:
            stem = board.best.config.folder.rsplit("__", 2)[0] + _suffix(board, boards)
            for name, figure in (
                ("stages", stages_figure(board, colours)),
                ("deviation", deviation_figure(board, colours)),
                ("codecs", answers_figure(board)),
            ):
                if figure is not None:
                    written.append(save(figure, folder / f"{name}__{stem}.png"))
    return written


def method_colours(labels: Any) -> dict[str, str]:
    """Colour of each label: a built-in method's own, others in the order of their names."""
    labels = sorted(set(labels))
    others = [label for label in labels if label not in COLOURS]
    return {**COLOURS, **{label: SPARE_COLOURS[i % len(SPARE_COLOURS)] for i, label in enumerate(others)}}


def scatter_figure(boards: Sequence[Board], axis: str, colours: dict[str, str]) -> Figure:
    """One row of panels per task and model: quality (where ranked) and KL; axis: "ttft" or "compute"."""
    label, x_of = X_AXES[axis]
    height = 3.5 * len(boards) + 0.4
    figure = Figure(figsize=(12.5, height), layout="constrained")
    panels = figure.subplots(len(boards), 2, squeeze=False)
    for line, board in zip(panels, boards, strict=True):
        markers = _markers(board)
        for ax, metric in zip(line, ("quality", "kl"), strict=True):
            if metric == "quality" and board.kind != "ranked":
                _say(
                    ax,
                    "no signal: full prefill is not\nbetter than no context"
                    if board.kind == "no signal"
                    else "no answers to score",
                )
            else:
                _scatter(ax, board, metric, x_of, colours, markers)
                _log_axis(ax)
                ax.set_xlabel(label)
            ax.set_ylabel(
                "quality (1 = full prefill, 0 = no context)" if metric == "quality" else "KL to full prefill, nats"
            )
        line[0].set_title(board.title, loc="left", fontweight="bold")
        line[1].legend(handles=_handles(board, colours, markers), loc="upper left", bbox_to_anchor=(1.02, 1.0))
    return figure


def _scatter(
    ax: Axes,
    board: Board,
    metric: str,
    x_of: Callable,
    colours: dict[str, str],
    markers: dict[float | None, str],
) -> None:
    points: list[tuple[float, float]] = []
    for label in dict.fromkeys(row.label for row in _drawn_rows(board)):
        rows = sorted((r for r in board.rows if r.label == label), key=lambda r: r.results.recompute_ratio or 0.0)
        drawn = [(row, x_of(row.results), e) for row in rows if (e := _estimate(row, metric)) is not None]
        ax.plot(
            [x[0] for _, x, _ in drawn],
            [e.mean for _, _, e in drawn],
            color=colours[label],
            lw=1,
            alpha=0.5,
            zorder=2,
        )
        for row, (x, x_low, x_high), e in drawn:
            ax.errorbar(
                x,
                e.mean,
                xerr=[[max(0.0, x - x_low)], [max(0.0, x_high - x)]],
                yerr=[[max(0.0, e.mean - e.low)], [max(0.0, e.high - e.mean)]],
                fmt=markers[row.results.recompute_ratio],
                color=colours[label],
                ms=7,
                mec="white",
                mew=0.7,
                elinewidth=1.1,
                alpha=1.0 if row.rank is not None or row.results.method in EXACT else 0.55,
                zorder=3,
            )
            points.append((x, e.mean if metric == "quality" else -e.mean))
    front = pareto_front(points)
    if front:
        xs, ys = np.array(front).T
        ax.plot(
            xs,
            ys if metric == "quality" else -ys,
            color="#444444",
            lw=1.4,
            ls=(0, (4, 3)),
            drawstyle="steps-post",
            zorder=1,
        )
    frame(ax, [y if metric == "quality" else -y for _, y in points])


def frame(ax: Axes, means: Sequence[float]) -> None:
    """Frame the means; an interval of a few samples may be so wide that it leaves the panel."""
    if not means:
        return
    room = 0.4 * max(0.1, max(means) - min(means))
    low, high = ax.get_ylim()
    ax.set_ylim(max(low, min(means) - room), min(high, max(means) + room))


def _drawn_rows(board: Board) -> list[Row]:
    """Without the oracles: they run full prefill first, so that their cost says nothing."""
    return [row for row in board.rows if row.results.method not in ANALYSIS_ONLY]


def _log_axis(ax: Axes) -> None:
    """A logarithmic axis up to full prefill with plain numbers: what is cheap lies far apart."""
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ticks = [t for t in (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0) if low <= t <= high]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (x, y) that no other one beats with less or equal x and greater or equal y, by x.

    >>> pareto_front([(0.2, 0.5), (0.1, 0.4), (0.3, 0.45), (0.2, 0.3)])
    [(0.1, 0.4), (0.2, 0.5)]
    """
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def _handles(board: Board, colours: dict[str, str], markers: dict[float | None, str]) -> list[Line2D]:
    labels = list(dict.fromkeys(row.label for row in _drawn_rows(board)))
    handles = [Line2D([], [], color=colours[label], marker="o", ls="", ms=7, label=label) for label in labels]
    ratios = [r for r in markers if r is not None]
    handles += [
        Line2D([], [], color="#777777", marker=markers[r], ls="", ms=6, label=f"ratio {percent(r)}") for r in ratios
    ]
    return [*handles, Line2D([], [], color="#444444", lw=1.4, ls=(0, (4, 3)), label="Pareto front")]


def _markers(board: Board) -> dict[float | None, str]:
    ratios = sorted({r for row in board.rows if (r := row.results.recompute_ratio) is not None})
    return {None: "o", **{ratio: MARKERS[(i + 1) % len(MARKERS)] for i, ratio in enumerate(ratios)}}


def _estimate(row: Row, metric: str) -> Estimate | None:
    return getattr(row.results.metrics, metric)


def _say(ax: Axes, text: str) -> None:
    ax.text(0.5, 0.5, text, ha="center", va="center", transform=ax.transAxes, color="#777777")
    ax.set(xticks=[], yticks=[])
    ax.grid(False)


def _suffix(board: Board, boards: Sequence[Board]) -> str:
    """Sets boards of the same task and model apart."""
    twins = [b for b in boards if (b.best.task, b.best.model) == (board.best.task, board.best.model)]
    return f"__{twins.index(board) + 1}" if len(twins) > 1 else ""


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, whole or not at all. Raises ResultsError."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    write_atomic(path, buffer.getvalue())
    return path
