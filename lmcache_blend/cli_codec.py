"""`lmcache-blend codec fit | bench | inspect | ls`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmcache_blend import errors

KLS = (0.001, 0.005, 0.02)


def add_commands(commands: Any, write_json: Any, list_kind: Any) -> None:
    """Add `codec` to the subparsers of the command line."""
    codec = commands.add_parser("codec", help="fit, measure and look at codecs", description="Codecs of KV chunks.")
    codecs = codec.add_subparsers(metavar="COMMAND", required=True)

    fit = codecs.add_parser("fit", help="fit a codec to a model", description="Fit a codec's profile to a model.")
    fit.set_defaults(command=_fit)
    fit.add_argument("--model", required=True, metavar="M", help="Hugging Face id, local folder, or smollm2-135m")
    fit.add_argument(
        "--data",
        default=["default"],
        type=_list,
        metavar="TEXT[,TEXT...]",
        help=".jsonl, text file, folder, or default",
    )
    fit.add_argument("--codec", default="fisher_klt", metavar="ID", help="fisher_klt, fisher_diagonal, kvtc, cachegen")
    fit.add_argument("--tokens", type=int, default=24_576, metavar="N", help="of calibration, at most (default 24576)")
    fit.add_argument("--context-tokens", type=int, default=1024, metavar="N", help="of a window (default 1024)")
    fit.add_argument("--option", action="append", default=[], metavar="key=value", help="group, rank, token_rank, ...")
    fit.add_argument("--output", required=True, type=Path, metavar="PROFILE", help="file to write")

    bench = codecs.add_parser("bench", help="measure codecs", description="Bits, KL and speed of codecs on real KV.")
    bench.set_defaults(command=lambda arguments: _bench(arguments, write_json))
    bench.add_argument("--model", required=True, metavar="M", help="Hugging Face id, local folder, or smollm2-135m")
    bench.add_argument(
        "--data", required=True, type=_list, metavar="FILE[,FILE...]", help=".jsonl, text file or folder"
    )
    bench.add_argument("--codecs", required=True, type=split_specs, metavar="a,b,c", help="ids or JSON configs")
    bench.add_argument("--context-tokens", type=int, default=2048, metavar="N", help="default 2048")
    bench.add_argument("--limit", type=int, default=4, metavar="N", help="windows of each file (default 4)")
    bench.add_argument("--repeat", type=int, default=1, metavar="N", help="time each codec N times, take the best")
    bench.add_argument("--json", metavar="OUT", help="write the rows as JSON, - for stdout (instead of the table)")
    bench.add_argument("--plots", type=Path, metavar="DIR", help="write rate_kl.png and layers.png (needs matplotlib)")

    look = codecs.add_parser("inspect", help="what is in a file", description="Header, sizes and tables of a chunk.")
    look.set_defaults(command=lambda arguments: _inspect(arguments, write_json))
    look.add_argument("file", type=Path, metavar="FILE")
    look.add_argument("--profile", metavar="PROFILE", help="names the stages of a codec that was fitted to a model")
    look.add_argument("--json", nargs="?", const="-", metavar="OUT", help="as JSON")

    ls = codecs.add_parser("ls", help="what is registered", description="Registered codecs.")
    ls.set_defaults(command=list_kind, kind="codecs")
    ls.add_argument("--json", nargs="?", const="-", metavar="FILE", help="a list of {name, description} as JSON")


def split_specs(text: str) -> list[str]:
    """Ids and JSON configs at the commas between them.

    >>> split_specs('raw,{"id": "cachegen", "level": 3},zstd')
    ['raw', '{"id": "cachegen", "level": 3}', 'zstd']
    """
    out, depth = [""], 0
    for letter in text:
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            out.append("")
        else:
            out[-1] += letter
    return [spec.strip() for spec in out if spec.strip()]


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _runner(model: str) -> Any:
    from transformers.utils import logging

    from lmcache_blend.hf import load_runner

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    return load_runner(model, dtype="float32")


def _fit(arguments: argparse.Namespace) -> None:
    from lmcache_blend.codecs.fisher_fit import FitConfig
    from lmcache_blend.eval.codec_fit import fit_profile
    from lmcache_blend.eval.options import parse_option

    options = FitConfig(**dict(parse_option(text) for text in arguments.option))
    profile = fit_profile(
        _runner(arguments.model),
        arguments.output,
        codec=arguments.codec,
        data=arguments.data,
        tokens=arguments.tokens,
        context_tokens=arguments.context_tokens,
        options=options,
    )
    for point in profile.settings.get("curve", []):
        print(f"step {point['step']:<5g} {point['bits']:.3f} bits per element, KL {point['kl']:.5f}")
    config = json.dumps({"id": profile.codec, "profile": str(arguments.output)})
    print(f"written: {arguments.output}, digest {profile.digest[:12]}; use it as --codec '{config}'")


def _bench(arguments: argparse.Namespace, write_json: Any) -> None:
    from lmcache_blend.eval.codec_bench import bench

    if arguments.limit < 1 or arguments.repeat < 1:
        raise errors.ConfigError(f"limit = {arguments.limit}, repeat = {arguments.repeat}: at least 1 each")
    runner = _runner(arguments.model)
    rows = bench(runner, arguments.data, arguments.codecs, arguments.context_tokens, arguments.limit, arguments.repeat)
    if arguments.json:
        write_json(rows, arguments.json)
    if arguments.json != "-":
        print_table(rows)
        print_rates(rows)
        print_coders(rows[0]["coders"])
    if arguments.plots:
        from lmcache_blend.eval.codec_plots import write_codec_plots

        for path in write_codec_plots(rows, arguments.plots):
            print(f"written: {path}", file=sys.stderr)


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """The rows of a benchmark, a line each."""
    from lmcache_blend.codecs import short_name

    lines = []
    for row in rows:
        numbers = [f"{row['bits_per_element']:.3f}", f"{row['kl']:.5f}", f"{row['top1_agreement']:.3f}"]
        numbers += [f"{row['delta_nll']:+.4f}", f"{row['encode_mb_s']:.0f}", f"{row['decode_mb_s']:.0f}"]
        lines.append([row["data"], short_name(row["codec"]), *numbers])
    # Short heads, so that a terminal of 80 columns has room for the codecs' names.
    heads = ("data", "codec", "bits", "KL", "top-1", "dNLL", "encode", "decode")
    _print(heads, lines, "bits: per element; encode, decode: MB/s of 16-bit KV")


def print_rates(rows: Sequence[dict[str, Any]]) -> None:
    """Bits per element at three KLs, for codecs of which several settings were measured."""
    from lmcache_blend.eval.codec_bench import rates

    texts = [*dict.fromkeys(row["data"] for row in rows), "mean"]
    found = {kl: rates(rows, kl) for kl in KLS}
    lines = []
    for name in dict.fromkeys(name for per_codec in found.values() for name in per_codec):
        lines += [
            [name, f"{kl:g}", *(f"{bits[t]:.2f}" if t in bits else "-" for t in texts)]
            for kl in KLS
            if (bits := found[kl].get(name))
        ]
    if lines:
        _print(("codec", "KL", *texts), lines, "bits per element at a KL, between the settings measured")


def print_coders(coders: Sequence[dict[str, Any]]) -> None:
    """Speeds of entropy coders on the same symbols, a line each."""
    lines = []
    for row in coders:
        if "note" in row:
            lines.append([row["coder"], row["note"]])
            continue
        numbers = [f"{row['bits_per_symbol']:.3f}", f"{row['encode_mb_s']:.0f}", f"{row['decode_mb_s']:.0f}"]
        lines.append([row["coder"], *numbers, f"{row['decode_ratio']:.1f}"])
    caption = "entropy coders alone, one thread; MB/s of 8-bit symbols; ratio: decode speed of rans over the coder's"
    _print(("coder", "bits/symbol", "encode", "decode", "ratio"), lines, caption)


def _print(heads: Sequence[str], lines: Sequence[Sequence[str]], caption: str) -> None:
    """One table: names to the left, numbers to the right."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, caption=caption, caption_justify="left")
    for head in heads:
        table.add_column(head, overflow="fold", justify="left" if head in ("data", "codec", "coder") else "right")
    for line in lines:
        table.add_row(*line)
    Console().print(table)


def _inspect(arguments: argparse.Namespace, write_json: Any) -> None:
    from lmcache_blend.codecs import PipelineCodec, Profile, get_codec
    from lmcache_blend.codecs.container import Container
    from lmcache_blend.codecs.inspect import describe, render

    try:
        data = arguments.file.read_bytes()
    except OSError as error:
        raise errors.DataError(f"cannot read {arguments.file}: {error.strerror or error}") from None
    try:
        codec = None
        if arguments.profile:
            header, digest = Container(data).header, Profile.load(arguments.profile).digest
            if digest != header.profile:
                raise errors.ConfigError(
                    f"{arguments.file} was coded with profile {str(header.profile)[:12]}, "
                    f"{arguments.profile} is {digest[:12]}; name the one of the chunk, or none"
                )
            codec = get_codec({**header.codec, "profile": arguments.profile})
        description = describe(data, codec if isinstance(codec, PipelineCodec) else None)
    except errors.CorruptChunkError as error:
        raise errors.DataError(f"{arguments.file}: {error}") from None
    if arguments.json:
        write_json(description, arguments.json)
    else:
        print(render(description))
