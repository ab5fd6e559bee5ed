"""Plots of where the error and the time are: deviation by layer and token, and the stages of TTFT."""

from zipfile import BadZipFile

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, to_rgba
from matplotlib.figure import Figure

from lmcache_blend.eval.boards import Board, Row
from lmcache_blend.eval.writer import TRACE

STAGES = {
    "load": "#9bc1bc",
    "place": "#5d8aa8",
    "probe": "#f2c14e",
    "select": "#f78154",
    "forward": "#4d5057",
}
OTHER = "#c9c9c9"


def stages_figure(board: Board, colours: dict[str, str]) -> Figure:
    """Mean time per stage of each combination as a stacked bar, in percent of full prefill's mean TTFT."""
    rows = sorted(board.rows, key=lambda row: row.results.ttft_ratio.mean)
    full = board.best.ttft_full_ms
    bars = [
        (row.name, {k: 100 * v / row.results.ttft_full_ms.mean for k, v in _stages(row).items()})
        for row in rows
        if row.results.method != "full_recompute"
    ]
    bars.append(("full prefill", {"forward": 100.0}))
    names = list(dict.fromkeys([*STAGES, *(stage for _, stages in bars for stage in stages)]))
    figure = Figure(figsize=(10.5, 1.5 + 0.36 * len(bars)), layout="constrained")
    ax = figure.subplots()
    left = np.zeros(len(bars))
    for stage in names:
        widths = np.array([stages.get(stage, 0.0) for _, stages in bars])
        if widths.any():
            ax.barh(range(len(bars)), widths, left=left, height=0.7, color=STAGES.get(stage, OTHER), label=stage)
        left += widths
    for i, total in enumerate(left):
        ax.text(total + 1, i, f"{total:.1f} %", va="center", fontsize=9, color="#444444")
    ax.set_yticks(range(len(bars)), [name for name, _ in bars])
    for tick, row in zip(ax.get_yticklabels(), [r for r in rows if r.results.method != "full_recompute"], strict=False):
        tick.set_color(colours[row.label])
    ax.set_ylim(len(bars) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    ax.set_xlim(0, max(left) * 1.1)
    ax.set_xlabel(f"mean TTFT, % of full prefill (its mean: {full.mean:,.0f} ms, n = {board.best.n})")
    ax.set_title(f"Stages of TTFT: {board.title}", loc="left", fontweight="bold")
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), title="stage", alignment="left")
    return figure


def deviation_figure(board: Board, colours: dict[str, str]) -> Figure | None:
    """How far reused KV is from full prefill's, by layer and token of the first sample, over methods' rows.

    Under the map one strip per combination marks the tokens that it computed, the stronger the more layers.
    None where no run kept a trace.
    """
    order = list(dict.fromkeys(row.label for row in board.rows))
    rows = sorted(board.rows, key=lambda row: (order.index(row.label), row.results.recompute_ratio or 0.0))
    traces = [(row, trace) for row in rows if (trace := _trace(row)) is not None]
    exact = next((t["deviation_exact"] for _, t in traces if t["deviation_exact"].size), None)
    if exact is None:
        return None
    spans = next(t["spans"] for _, t in traces if t["deviation_exact"].size)
    traces = [(row, t) for row, t in traces if t["rows"].shape[1] == exact.shape[1]]
    figure = Figure(figsize=(12, 3.6 + 0.3 * len(traces)), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=[3.0, 0.3 * len(traces)])
    ax = figure.add_subplot(grid[0])
    values = np.where(exact > 0, exact.astype(np.float32), np.nan)
    # Layer 0 sees no context, its error is rounding: the scale is that of the others.
    finite = values[min(1, len(values) - 1) :]
    finite = finite[np.isfinite(finite)]
    if not finite.size:
        return None
    low, high = np.percentile(finite, [1, 99.5])
    norm = LogNorm(low, max(high, 1.01 * low))
    image = ax.imshow(
        values,
        aspect="auto",
        cmap="magma",
        norm=norm,
        interpolation="nearest",
        origin="lower",
        extent=_extent(exact),
    )
    ax.set_facecolor("#dddddd")
    _span_lines(ax, spans)
    ax.set_ylabel("layer")
    ax.tick_params(labelbottom=False)
    ax.set_title(
        f"Deviation of reused KV from full prefill's: {board.title}, first sample",
        loc="left",
        fontweight="bold",
    )
    bar = figure.colorbar(image, ax=ax, pad=0.01, extend="both")
    bar.set_label("relative error of K and V\n(grey: not reused)")
    strips = figure.add_subplot(grid[1], sharex=ax)
    _strips(strips, traces, colours)
    _span_lines(strips, spans, colour="#999999")
    strips.set_xlabel("token (lines: ends of spans); strips: tokens computed anew, the stronger the more layers")
    return figure


def _strips(ax: Axes, traces: list[tuple[Row, dict[str, np.ndarray]]], colours: dict[str, str]) -> None:
    tokens = traces[0][1]["rows"].shape[1]
    picture = np.ones((len(traces), tokens, 4))
    for i, (row, trace) in enumerate(traces):
        picture[i, :, :3] = to_rgba(colours[row.label])[:3]
        picture[i, :, 3] = trace["rows"].mean(0)
    ax.imshow(picture, aspect="auto", interpolation="nearest", extent=(0, tokens, len(traces) - 0.5, -0.5))
    ax.set_yticks(range(len(traces)), [row.name for row, _ in traces])
    ax.set_yticks(np.arange(len(traces) - 1) + 0.5, minor=True)
    ax.grid(False)
    ax.grid(axis="y", which="minor", color="#dddddd")
    ax.tick_params(axis="y", which="both", length=0)


def _span_lines(ax: Axes, spans: np.ndarray, colour: str = "white") -> None:
    for end in spans[:, 1] if len(spans) else []:
        ax.axvline(end, color=colour, lw=0.6, alpha=0.8)
    ax.grid(False)


def _extent(array: np.ndarray) -> tuple[float, float, float, float]:
    return (0, array.shape[1], -0.5, array.shape[0] - 0.5)


def _stages(row: Row) -> dict[str, float]:
    """Mean ms per stage; what the stages leave of the mean TTFT is "other"."""
    stages = {stage: ms for stage, ms in row.results.stages_ms.items() if ms > 0}
    rest = row.results.ttft_ms.mean - sum(stages.values())
    return {**stages, "other": rest} if rest > 0.005 * row.results.ttft_ms.mean else stages


def _trace(row: Row) -> dict[str, np.ndarray] | None:
    path = row.folder / TRACE
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, EOFError, BadZipFile):
        return None
