"""The command line: `lmcache-blend run`, `report`, `codec`, `calc`, `engine`, `kernels`, `serve`, `store` and `ls`.

Exit status: 0 done; 2 bad arguments or input (one line on stderr, no traceback); 130 interrupted; 1 else.
"""

import argparse
import inspect
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from lmcache_blend import cli_calc, cli_codec, cli_engine, cli_kernels, cli_serve, cli_store, errors

BAD_INPUT = (
    errors.ConfigError,
    errors.UnknownNameError,
    errors.DataError,
    errors.SegmentError,
    errors.ContextLengthError,
    errors.UnsupportedModelError,
    errors.ModelNotFoundError,
)

OPTION_HELP = (
    "a setting of a policy, the task or the run loop (chunk_tokens, max_new_tokens, generate=false, "
    "long_context=skip|truncate), with --backend vllm also concurrency, server=URL, warmup, enforce_eager"
)
ENCODE_HELP = "before a passage whose KV is computed for the store: nothing, BOS, or the instruction prefix"


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line and without abbreviations."""

    def __init__(self, **settings: Any):
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"lmcache-blend: {' '.join(message.split())} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    root = parser()
    arguments, arguments.flags = root.parse_known_args(argv)
    if arguments.flags and not getattr(arguments, "takes_flags", False):
        root.error(f"unrecognized arguments: {' '.join(arguments.flags)}")
    try:
        arguments.command(arguments)
        sys.stdout.flush()
    except BAD_INPUT as error:
        return _fail(2, error)
    except errors.LMCacheBlendError as error:
        return _fail(1, error)
    except KeyboardInterrupt:
        return _fail(130, "interrupted; run the same command again to go on where it stopped")
    except BrokenPipeError:
        # The reader (head, less) is gone; without this Python complains once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def parser() -> Parser:
    """The whole command line."""
    root = Parser(
        prog="lmcache-blend",
        description="Reuse cached KV at any position in a prompt, and measure what that costs.",
    )
    commands = root.add_subparsers(metavar="COMMAND", required=True)

    run = commands.add_parser(
        "run", help="measure methods on a task", description="Measure methods on a task with a model."
    )
    run.set_defaults(command=_run)
    run.add_argument("--model", required=True, metavar="M", help="Hugging Face id, local folder, or smollm2-135m")
    run.add_argument(
        "--task", required=True, metavar="T", help="a task of `lmcache-blend ls tasks`; any name with --data"
    )
    run.add_argument("--data", type=Path, metavar="FILE.jsonl", help="local samples, one JSON object a line")
    run.add_argument(
        "--method",
        required=True,
        type=_words,
        metavar="METHOD[,METHOD...]",
        help="see `lmcache-blend ls methods`",
    )
    run.add_argument(
        "--recompute-ratio", type=_words, default=["0.15"], metavar="R[,R...]", help="0 to 1 (default 0.15)"
    )
    run.add_argument(
        "--codec",
        default=["raw"],
        type=cli_codec.split_specs,
        metavar="SPEC[,SPEC...]",
        help="id or JSON of the stored KV's codec (default raw)",
    )
    run.add_argument("--backend", choices=["hf", "vllm"], default="hf", help="engine that runs the model")
    run.add_argument("--limit", type=int, default=50, metavar="N", help="at most so many samples (default 50)")
    run.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="of generated samples and random policies (default 0)",
    )
    run.add_argument("--option", action="append", default=[], metavar="key=value", help=OPTION_HELP)
    run.add_argument("--encode", choices=["alone", "bos", "prefix"], default="alone", help=ENCODE_HELP)
    run.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of weights and KV (default float32)",
    )
    run.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="results go below it; a rerun goes on there"
    )

    report = commands.add_parser(
        "report", help="leaderboard and plots", description="Leaderboard and plots of results."
    )
    report.set_defaults(command=_report)
    report.add_argument("directory", type=Path, metavar="DIR", help="--output folder of runs")
    report.add_argument(
        "--json", metavar="FILE", help="write the leaderboard as JSON, - for stdout (instead of the table)"
    )

    cli_codec.add_commands(commands, _write_json, _ls)
    cli_calc.add_commands(commands, _write_json)
    cli_engine.add_commands(commands, _write_json)
    cli_store.add_commands(commands, _write_json)
    cli_kernels.add_commands(commands, _write_json)
    cli_serve.add_commands(commands)

    ls = commands.add_parser("ls", help="what is registered", description="Names of tasks, methods, codecs or tiers.")
    ls.set_defaults(command=_ls)
    ls.add_argument("kind", choices=["tasks", "methods", "codecs", "tiers"])
    ls.add_argument("--json", nargs="?", const="-", metavar="FILE", help="a list of {name, description} as JSON")
    return root


def _run(arguments: argparse.Namespace) -> None:
    from lmcache_blend.eval.options import RunRequest, check_ratio, parse_option

    ratios = tuple(check_ratio(_number(text)) for text in arguments.recompute_ratio)
    request = RunRequest(
        model=arguments.model,
        task=arguments.task,
        data=arguments.data,
        methods=tuple(arguments.method),
        recompute_ratios=ratios,
        codecs=tuple(arguments.codec),
        limit=arguments.limit,
        seed=arguments.seed,
        options=dict(parse_option(text) for text in arguments.option),
        encode=arguments.encode,
        dtype=arguments.dtype,
        backend=arguments.backend,
        output=arguments.output,
    )
    from transformers.utils import logging

    from lmcache_blend.eval.boards import make_boards
    from lmcache_blend.eval.harness import run
    from lmcache_blend.eval.render import print_boards

    # Bad input is one line on stderr; our own bars tell how far a run is.
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    results = run(request)
    print_boards(make_boards([(request.output / r.config.folder, r) for r in results]))
    print(f"results: {request.output} (lmcache-blend report {request.output})")


def _report(arguments: argparse.Namespace) -> None:
    from lmcache_blend.eval.export import as_json
    from lmcache_blend.eval.render import print_boards
    from lmcache_blend.eval.report import report

    boards = report(arguments.directory)
    if arguments.json:
        _write_json(as_json(boards), arguments.json)
    if arguments.json != "-":
        print_boards(boards)
        print(f"written: {arguments.directory}/leaderboard.md, leaderboard.csv, plots/")


def _ls(arguments: argparse.Namespace) -> None:
    registry = _registry(arguments.kind)
    rows = [{"name": name, "description": _summary(registry.get(name))} for name in registry]
    if arguments.json:
        _write_json(rows, arguments.json)
        return
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        print(f"{row['name']:<{width}}  {row['description']}".rstrip())


def _registry(kind: str) -> Any:
    if kind == "tasks":
        from lmcache_blend.eval.tasks import tasks

        return tasks
    if kind == "methods":
        from lmcache_blend.blend.policies import policies

        return policies
    if kind == "codecs":
        from lmcache_blend.codecs import codecs

        return codecs
    from lmcache_blend.engine import tiers

    return tiers


def _summary(item: Callable[..., Any]) -> str:
    """First paragraph of an object's docstring, in one line."""
    return " ".join((inspect.getdoc(item) or "").split("\n\n")[0].split())


def _write_json(value: Any, target: str) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    from lmcache_blend.eval.writer import write_atomic

    write_atomic(Path(target), text.encode())


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise argparse.ArgumentTypeError("is empty")
    return words


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise errors.ConfigError(f"recompute ratio {text!r} is not a number; it lies in [0, 1]") from None


def _fail(status: int, error: object) -> int:
    print(f"lmcache-blend: {' '.join(str(error).split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
