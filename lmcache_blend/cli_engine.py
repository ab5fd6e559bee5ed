"""`lmcache-blend engine bench`."""

import argparse
from pathlib import Path
from typing import Any


def add_commands(commands: Any, write_json: Any) -> None:
    """Add `engine` to the subparsers of the command line."""
    engine = commands.add_parser("engine", help="measure the KV engine", description="The KV engine.")
    group = engine.add_subparsers(metavar="COMMAND", required=True)
    bench = group.add_parser(
        "bench", help="tiers against the machine's limits", description="Speed of the tiers against what is possible."
    )
    bench.set_defaults(command=lambda arguments: _bench(arguments, write_json))
    bench.add_argument("--bytes", type=int, default=1 << 30, metavar="N", help="of KV (default 1 GiB)")
    bench.add_argument("--layers", type=int, default=16, metavar="L", help="default 16")
    bench.add_argument("--heads", type=int, default=8, metavar="H", help="KV heads (default 8)")
    bench.add_argument("--dim", type=int, default=64, metavar="D", help="of a head (default 64)")
    bench.add_argument("--rounds", type=int, default=5, metavar="N", help="the median counts (default 5)")
    bench.add_argument("--folder", type=Path, metavar="DIR", help="where the disk tier goes (default: temporary)")
    bench.add_argument("--url", action="append", default=[], metavar="URL", help="a remote tier; may be repeated")
    bench.add_argument("--lmcache-python", metavar="PYTHON", help="of an environment with LMCache, as the peer")
    bench.add_argument("--json", metavar="OUT", help="write the rows as JSON, - for stdout (instead of the table)")


def _bench(arguments: argparse.Namespace, write_json: Any) -> None:
    from lmcache_blend.eval.engine_bench import Shape, bench

    shape = Shape(arguments.layers, arguments.heads, arguments.dim)
    peer = (arguments.lmcache_python, ("cpu", "disk")) if arguments.lmcache_python else None
    rows = bench(arguments.bytes, shape, arguments.rounds, arguments.folder, arguments.url, peer)
    if arguments.json:
        write_json(rows, arguments.json)
    if arguments.json != "-":
        for row in rows:
            print(_line(row))


def _line(row: dict[str, Any]) -> str:
    name = f"{row.get('peer') or 'lmcache-blend':<14} {row['tier']:<6} {row['operation']:<18}"
    if "chunks_per_s" in row:
        return f"{name} {row['chunks_per_s']:>10,.0f} chunks/s"
    if row["ratio"] is None:
        return f"{name} {row['bytes_per_s'] / 1e9:>6.2f} GB/s"
    share = f"{row['ratio']:>5.0%} of {row['limit_bytes_per_s'] / 1e9:.2f} ({row.get('limit') or 'the same limit'})"
    return f"{name} {row['bytes_per_s'] / 1e9:>6.2f} GB/s  {share}"
