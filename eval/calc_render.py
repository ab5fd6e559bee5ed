"""The calculator's figures as tables, and the growth of KV over context length and users as a plot."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmcache_blend.errors import ConfigError
from lmcache_blend.eval.calc import DTYPE_BYTES, CalcRequest, calculate, kv_size
from lmcache_blend.eval.writer import write_atomic
from lmcache_blend.hf.layout import read_config, read_layout

USERS = (1, 8, 64)
LENGTHS = (1024, 8192, 65_536)
COLOURS = ("#3b6fb6", "#e8871e", "#4a9c4f", "#8a5a3c")
SOURCES = {
    "exact": "",
    "gaussian": " for Gaussian KV",
    "measured": " as given",
}


def print_calc(result: dict[str, Any]) -> None:
    """The figures for people."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"{result['model']} ({result['model_type']}), {result['tokens']:,} tokens, KV in {result['dtype']}")
    console.print(f"  {result['kv_bytes_per_token']:,} B per token, {size(result['kv_bytes'])} per context")
    if result["users"] > 1:
        console.print(f"  {size(result['total_kv_bytes'])} for {result['users']:,} users")
    if result["state_bytes"] != 0:
        known = "unknown" if result["state_bytes"] is None else size(result["state_bytes"])
        console.print(f"  recurrent state per context: {known}, in none of the figures of KV below")
    if result["codec"] is not None:
        bits, source = result["codec_bits_per_element"], SOURCES[result["codec_size_source"]]
        console.print(f"  {size(result['codec_bytes'])} coded, {bits:.2f} bits per element{source}")
        if result["codec_size_source"] == "gaussian":
            console.print("  (real KV differs; --bits-per-element takes what `codec bench` measured)")
    # The names are short, so that a table fits into 80 columns.
    layers = _table("layers", "kind", "type", "heads", "dims", "window", "B/token", "KV", left=("kind",))
    for kind, row in result["by_layer_kind"].items():
        dims = "+".join(str(d) for d in dict.fromkeys(row["head_dims"]) if d)
        window = "" if row["window_tokens"] is None else f"{row['window_tokens']:,}"
        numbers = [f"{row['kv_bytes_per_token']:,}", size(row["kv_bytes"])]
        layers.add_row(str(row["layers"]), kind, row["attention"], str(row["kv_heads"] or ""), dims, window, *numbers)
    console.print(layers)
    tiers = _table("tier", "holds", "contexts", left=("tier",))
    for row in result["tiers"]:
        tiers.add_row(
            row["tier"], size(row["capacity_bytes"]), "" if row["contexts"] is None else f"{row['contexts']:,}"
        )
    console.print(tiers)
    links = _table("Gbit/s", "load ms", "prefill ms", "prefill / load")
    prefill = result["prefill_ms"]
    for row in result["links"]:
        ratio = "" if row["speedup"] is None else f"{row['speedup']:.2f}"
        links.add_row(
            f"{row['gbit_s']:g}", f"{row['load_ms']:,.1f}", "" if prefill is None else f"{prefill:,.1f}", ratio
        )
    console.print(links)
    if prefill is None:
        console.print("prefill time unknown: transformers cannot build this model; give --prefill-tokens-per-s")
    else:
        console.print(f"loading beats prefilling above {result['break_even_gbit_s']:.2f} Gbit/s")


def write_growth(request: CalcRequest, path: Path, longest: int) -> None:
    """Plot of KV bytes over context length up to `longest` and over the number of users, as stored and coded.

    Raises ConfigError for a file name whose ending names no format of pictures.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    if path.suffix not in ("", ".png", ".svg", ".pdf"):
        raise ConfigError(f"plot = {str(path)!r}: pictures end in .png, .svg or .pdf")
    result = calculate(request)
    model, width = read_layout(read_config(request.model)), DTYPE_BYTES[result["dtype"]]
    lengths = [1 << i for i in range(8, longest.bit_length()) if 1 << i < longest] + [longest]
    share = None if result["codec"] is None else result["codec_bits_per_element"] / (8 * width)
    with mpl.rc_context(
        {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4"}
    ):
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        figure.suptitle(f"{Path(result['model']).name}, KV in {result['dtype']}")
        left, right = figure.subplots(1, 2, sharey=True)
        by_users = {
            f"{users:,} user{'s' * (users > 1)}": [users * kv_size(model, n, width) for n in lengths]
            for users in sorted({*USERS, request.users})
        }
        _panel(left, "context length in tokens", lengths, by_users, share)
        many = [1 << i for i in range(max(10, request.users.bit_length()) + 1)]
        by_length = {
            f"{n:,} tokens": [users * kv_size(model, n, width) for users in many]
            for n in sorted({*LENGTHS, request.tokens})
        }
        _panel(right, "users at the same time", many, by_length, share)
        left.set_ylabel("GB of KV")
        for axes, start in ((left, lengths[0]), (right, 1)):
            for name, room in request.tiers.items():
                axes.axhline(room / 1e9, color="#8c8c8c", lw=0.8, ls=":")
                axes.annotate(f"{name} {size(room)}", (start, room / 1e9), fontsize=8, va="bottom")
        out = io.BytesIO()
        figure.savefig(out, format=path.suffix.removeprefix(".") or "png", dpi=130)
    write_atomic(path, out.getvalue())


def _panel(axes: Any, label: str, x: Sequence[int], lines: dict[str, list[int]], share: float | None) -> None:
    """A solid line per name, and where the KV is coded a dashed one; share: of the raw size."""
    for (name, raw), colour in zip(lines.items(), COLOURS, strict=False):
        axes.plot(x, [b / 1e9 for b in raw], color=colour, label=name)
        if share is not None:
            axes.plot(x, [b * share / 1e9 for b in raw], color=colour, ls="--")
    if share is not None:
        axes.plot([], [], color="#404040", ls="--", label="the same, coded")
    axes.set(xscale="log", yscale="log", xlabel=label)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    axes.legend(fontsize=8, frameon=False)


def size(nbytes: float) -> str:
    """Bytes in the largest unit that leaves at least 1, rounded.

    >>> size(131072), size(999_999), size(2_500_000_000), size(12)
    ('131.1 kB', '1.0 MB', '2.5 GB', '12 B')
    """
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= 0.99995 * one:
            return f"{nbytes / one:,.1f} {unit}"
    return f"{nbytes:.0f} B"


def _table(*heads: str, left: Sequence[str] = ()) -> Any:
    from rich.table import Table

    table = Table(box=None)
    for head in heads:
        table.add_column(head, justify="left" if head in left else "right", no_wrap=True)
    return table
