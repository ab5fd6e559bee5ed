"""`lmcache-blend calc`."""

import argparse
from pathlib import Path
from typing import Any

from lmcache_blend import errors

TIER_HELP = "room for KV, e.g. cpu=64GiB; may be given again (default cpu=64GiB, disk=1TiB)"


def add_commands(commands: Any, write_json: Any) -> None:
    """Add `calc` to the subparsers of the command line."""
    calc = commands.add_parser(
        "calc",
        help="size of KV, and load time against prefill time",
        description="KV bytes of a model from its config.json: per token, context, layer kind and tier.",
    )
    calc.set_defaults(command=lambda arguments: _calc(arguments, write_json))
    calc.add_argument("--model", required=True, metavar="M", help="folder, config.json, or Hugging Face id")
    calc.add_argument("--tokens", required=True, type=int, metavar="N", help="length of a context")
    calc.add_argument("--users", type=int, default=1, metavar="U", help="contexts at the same time (default 1)")
    calc.add_argument("--codec", metavar="SPEC", help="id or JSON of the codec of stored KV")
    calc.add_argument("--bits-per-element", type=float, metavar="B", help="of the codec, as `codec bench` measured")
    calc.add_argument(
        "--dtype", metavar="D", help="of the KV: float32, bfloat16, float16 or fp8 (default: the config's)"
    )
    calc.add_argument("--tier", action="append", metavar="NAME=SIZE", help=TIER_HELP)
    calc.add_argument("--bandwidth", metavar="G[,G...]", help="Gbit/s of links or disks (default 1,5,20,100)")
    calc.add_argument("--tflops", type=float, default=400.0, metavar="F", help="sustained, of the device (default 400)")
    calc.add_argument("--prefill-tokens-per-s", type=float, metavar="R", help="measured, instead of --tflops")
    calc.add_argument("--plot", type=Path, metavar="FILE", help="growth over context and users: .png, .svg or .pdf")
    calc.add_argument(
        "--longest", type=int, default=131_072, metavar="N", help="end of the plot's axis (default 131072)"
    )
    calc.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write the figures as JSON, - for stdout")


def _calc(arguments: argparse.Namespace, write_json: Any) -> None:
    from lmcache_blend.eval.calc import CalcRequest, calculate, parse_size
    from lmcache_blend.eval.calc_render import print_calc, write_growth

    given: dict[str, Any] = {}
    if arguments.tier:
        pairs = [text.partition("=") for text in arguments.tier]
        given["tiers"] = {name: parse_size(room) for name, _, room in pairs}
        if len(given["tiers"]) < len(pairs):
            raise errors.ConfigError("a tier is given twice; give each a name of its own")
    if arguments.bandwidth:
        given["bandwidths_gbit_s"] = tuple(_number(text) for text in arguments.bandwidth.split(","))
    names = ("model", "tokens", "users", "codec", "bits_per_element", "dtype", "tflops", "prefill_tokens_per_s")
    request = CalcRequest(**{name: getattr(arguments, name) for name in names}, **given)
    if arguments.longest < 512:
        raise errors.ConfigError(f"longest = {arguments.longest}: the plot begins at 256 tokens, so at least 512")
    result = calculate(request)
    if arguments.plot:
        write_growth(request, arguments.plot, arguments.longest)
    if arguments.json:
        write_json(result, arguments.json)
    if arguments.json != "-":
        print_calc(result)
        if arguments.plot:
            print(f"written: {arguments.plot}")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise errors.ConfigError(f"bandwidth {text!r} is no number of Gbit/s") from None
