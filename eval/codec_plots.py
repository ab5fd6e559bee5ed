"""Plots of codecs: rate against KL, bits and error per layer (of `codec bench`), rate against answers (of `run`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lmcache_blend.codecs import short_name
from lmcache_blend.eval.boards import Board, Row
from lmcache_blend.eval.codec_bench import family
from lmcache_blend.eval.plots import MARKERS, SPARE_COLOURS, STYLE, frame, save
from lmcache_blend.eval.results import Estimate
from lmcache_blend.eval.writer import writing

TARGET_KL = 0.005
"""About half a percent of perplexity."""
COLOURS = {
    "raw": "#222222",
    "lossless": "#8c8c8c",
    "zstd": "#b5b5b5",
    "fp8": "#c9a227",
    "int8": "#8a5a3c",
    "int4": "#c08457",
    "kivi": "#e8871e",
    "cachegen": "#3b6fb6",
    "hadamard": "#56b4c9",
    "kvtc": "#b07aa1",
    "fisher_diagonal": "#4a9c4f",
    "fisher_klt": "#d1495b",
}


def write_codec_plots(rows: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Write rate_kl.png and layers.png from rows of `codec_bench.bench`; returns the paths. Raises ResultsError."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        return [save(rate_figure(rows), folder / "rate_kl.png"), save(layers_figure(rows), folder / "layers.png")]


def rate_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """A panel per text: bits per element against KL; the settings of one codec are joined."""
    texts = list(dict.fromkeys(row["data"] for row in rows))
    columns = min(2, len(texts))
    lines = -(-len(texts) // columns)
    figure = Figure(figsize=(5.2 * columns + 2.6, 3.9 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for ax, text in zip(panels, texts, strict=False):
        for name, (colour, dashes, marker) in _looks(rows).items():
            own = [r for r in rows if r["data"] == text and family(r["codec"]) == name and r["kl"] > 0]
            own.sort(key=lambda r: r["bits_per_element"])
            x, y = [r["bits_per_element"] for r in own], [r["kl"] for r in own]
            ax.plot(x, y, ls=dashes, marker=marker, color=colour, lw=1.3, ms=5, label=name)
        ax.set(yscale="log", title=text)
        ax.axhline(TARGET_KL, color="#999999", lw=0.8, ls=":")
    for ax in panels[len(texts) :]:
        ax.set_axis_off()
    for ax in panels[max(0, len(texts) - columns) : len(texts)]:
        ax.set_xlabel("bits per element, whole files")
    for ax in panels[::columns]:
        ax.set_ylabel("KL, nats per token")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def layers_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Bits per element, and relative error of K and of V, by layer; means over the texts.

    Of the settings of one codec, the one whose KL is nearest to TARGET_KL.
    """
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    for name, (colour, dashes, _) in _looks(rows).items():
        settings: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if family(row["codec"]) == name:
                settings.setdefault(short_name(row["codec"]), []).append(row)
        kl = {label: np.mean([r["kl"] for r in own]) for label, own in settings.items()}
        label = min(settings, key=lambda x: abs(np.log(max(kl[x], 1e-9) / TARGET_KL)))
        for ax, field in zip(panels, ("layer_bits", "layer_error_k", "layer_error_v"), strict=True):
            line = np.mean([r[field] for r in settings[label]], 0)
            ax.plot(line, ls=dashes, color=colour, lw=1.4, label=f"{label} (KL {kl[label]:.4f})")
    for ax, title in zip(panels, ("bits per element", "relative error of K", "relative error of V"), strict=True):
        ax.set(xlabel="layer", title=title, ylim=(0, None))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=2, fontsize=9)
    figure.set_figheight(4.2 + 0.22 * -(-len(labels) // 2))
    return figure


def _looks(rows: Sequence[dict[str, Any]]) -> dict[str, tuple[str, Any, str]]:
    """Colour, dashes and marker of each family of settings: the id gives the colour."""
    palette, used, out = _colours(row["codec"]["id"] for row in rows), {}, {}
    for row in rows:
        kind, name = row["codec"]["id"], family(row["codec"])
        if name not in out:
            i = used[kind] = used.get(kind, -1) + 1
            out[name] = (palette[kind], ("-", (0, (4, 2)), ":", (0, (5, 1, 1, 1)))[i % 4], MARKERS[i % len(MARKERS)])
    return out


def answers_figure(board: Board) -> Figure | None:
    """Bits per element against quality, F1 and KL of a board whose rows used several codecs; None where they did not.

    The settings of one codec are joined; the shape of a point names the method.
    """
    rows = [row for row in board.rows if row.results.bits_per_element is not None]
    if len({str(row.results.codec) for row in rows}) < 2:
        return None
    palette = _colours(row.results.codec["id"] for row in rows)
    methods = list(dict.fromkeys(row.results.method for row in rows))
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    for ax, metric in zip(panels, ("quality", "f1", "kl"), strict=True):
        for mark, method in zip(MARKERS, methods, strict=False):
            for name, colour in palette.items():
                own = [r for r in rows if r.results.method == method and r.results.codec["id"] == name]
                _estimates(ax, own, metric, mark + "-", colour, f"{name}, {method}" if len(methods) > 1 else name)
        ax.set(xlabel="bits per element (log)", title=metric if metric != "kl" else "KL to full prefill, nats")
        ax.set_xscale("log")
        ax.set_xticks([x for x in (0.5, 1, 2, 4, 8, 16, 32) if ax.get_xlim()[0] <= x <= ax.get_xlim()[1]])
        ax.xaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
        frame(ax, [e.mean for r in rows if (e := getattr(r.results.metrics, metric)) is not None])
    figure.suptitle(board.title, x=0.01, ha="left", fontweight="bold")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def _estimates(ax: Axes, rows: Sequence[Row], metric: str, fmt: str, colour: str, label: str) -> None:
    found: list[tuple[float, Estimate]] = []
    for row in rows:
        value = getattr(row.results.metrics, metric)
        if value is not None and row.results.bits_per_element is not None:
            found.append((row.results.bits_per_element, value))
    found.sort(key=lambda pair: pair[0])
    if found:
        mean = [e.mean for _, e in found]
        bars = [[m - e.low for m, (_, e) in zip(mean, found, strict=True)],
                [e.high - m for m, (_, e) in zip(mean, found, strict=True)]]  # fmt: skip
        ax.errorbar(
            [x for x, _ in found], mean, np.maximum(bars, 0), fmt=fmt, color=colour, ms=5, lw=1.2, elinewidth=0.7,
            label=label,
        )  # fmt: skip


def _colours(names: Any) -> dict[str, str]:
    names = list(dict.fromkeys(names))
    spare = iter(SPARE_COLOURS * (1 + len(names) // len(SPARE_COLOURS)))
    return {name: COLOURS.get(name) or next(spare) for name in names}
