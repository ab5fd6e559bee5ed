"""`lmcache-blend engine bench | blend`."""

import argparse
from collections.abc import Sequence
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

    blend = group.add_parser(
        "blend",
        help="TTFT of blending from each tier",
        description="TTFT of blending from each tier, raw and compressed, over simulated links.",
    )
    blend.set_defaults(command=lambda arguments: _blend(arguments, write_json))
    blend.add_argument("--model", default="smollm2-135m", metavar="M", help="default smollm2-135m")
    blend.add_argument("--task", default="people_qa", metavar="T", help="of `lmcache-blend ls tasks`")
    blend.add_argument("--data", type=Path, metavar="FILE", help="JSONL of prompts, e.g. squad_rag10.jsonl")
    blend.add_argument("--tier", action="append", metavar="T", help="cpu, disk, URL; may be repeated (default both)")
    blend.add_argument("--codec", default="fisher_klt", metavar="SPEC", help="against raw (default fisher_klt)")
    blend.add_argument("--links", default="1,5,20", metavar="G[,G...]", help="Gbit/s (default 1,5,20)")
    blend.add_argument("--policy", default="query_attention", metavar="P", help="default query_attention")
    blend.add_argument("--recompute-ratio", type=float, default=0.15, metavar="R", help="default 0.15")
    blend.add_argument("--tokens", type=int, default=1800, metavar="N", help="prompts nearest to it (default 1800)")
    blend.add_argument("--limit", type=int, default=1, metavar="N", help="prompts (default 1)")
    blend.add_argument("--rounds", type=int, default=5, metavar="N", help="the median counts (default 5)")
    blend.add_argument("--plot", type=Path, metavar="FILE", help="write TTFT against bandwidth there")
    blend.add_argument("--json", metavar="OUT", help="write the rows as JSON, - for stdout (instead of the table)")


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


def _blend(arguments: argparse.Namespace, write_json: Any) -> None:
    from lmcache_blend.codecs import get_codec
    from lmcache_blend.errors import ConfigError
    from lmcache_blend.eval.tasks import load_task, nearest_prompts
    from lmcache_blend.eval.tier_bench import RAW, bench, write_plot
    from lmcache_blend.hf import load_runner

    try:
        links = [float(x) for x in arguments.links.split(",")]
    except ValueError:
        raise ConfigError(f"links = {arguments.links!r}: give Gbit/s as numbers, e.g. 1,5,20") from None
    for name, value in (("limit", arguments.limit), ("rounds", arguments.rounds), *(("links", x) for x in links)):
        if not value > 0:
            raise ConfigError(f"{name} = {value:g}: must be above 0")
    runner = load_runner(arguments.model, dtype="float32")
    task = load_task(arguments.task, arguments.data, 100, 0)
    prompts = nearest_prompts(task, runner, arguments.tokens, arguments.limit)
    codecs = [RAW, get_codec(arguments.codec).get_config()]
    how = (arguments.policy, arguments.recompute_ratio, arguments.rounds)
    rows = bench(runner, prompts, arguments.tier or ["cpu", "disk"], codecs, links, *how)
    if arguments.plot:
        write_plot(rows, arguments.plot)
    if arguments.json:
        write_json(rows, arguments.json)
    if arguments.json != "-":
        print_blend(rows)


def print_blend(rows: Sequence[dict[str, Any]]) -> None:
    """A line per tier and codec, TTFT over full prefill at each speed."""
    from lmcache_blend.eval.tier_bench import crossings

    speeds = list(dict.fromkeys(row["gbit_s"] for row in rows))
    print(f"TTFT over full prefill ({rows[0]['ttft_full_ms']:.0f} ms, {rows[0]['tokens']:.0f} tokens), simulated links")
    heads = ["no link" if s is None else f"{s:g} Gbit/s" for s in speeds]
    width = max(len(row["codec"]) for row in rows)
    print(f"{'tier':<7}{'codec':<{width}}{'MB':>8}" + "".join(f"{h:>12}" for h in heads))
    for tier, codec in dict.fromkeys((row["tier"], row["codec"]) for row in rows):
        mine = {r["gbit_s"]: r for r in rows if (r["tier"], r["codec"]) == (tier, codec)}
        cells = "".join(f"{mine[s]['ttft_ratio']:>12.3f}" for s in speeds)
        print(f"{tier:<7}{codec:<{width}}{mine[speeds[0]]['loaded_bytes'] / 1e6:>8.1f}{cells}")
    for tier, found in crossings(rows).items():
        text = found if isinstance(found, str) else "crossing at " + ", ".join(f"{x:.2g} Gbit/s" for x in found)
        print(f"{tier}: {text}")
