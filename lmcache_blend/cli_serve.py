"""`lmcache-blend serve MODEL [any vllm serve flag]`."""

import argparse
from pathlib import Path
from typing import Any


def add_commands(commands: Any) -> None:
    """Add `serve` to the subparsers of the command line."""
    serve = commands.add_parser(
        "serve",
        help="vLLM with this connector",
        usage="lmcache-blend serve MODEL [options] [any `vllm serve` flag]",
        description="Print and run the `vllm serve` command that serves MODEL with reused KV.",
    )
    serve.set_defaults(command=_serve, takes_flags=True)
    serve.add_argument("model", metavar="MODEL", help="Hugging Face id, local folder, or smollm2-135m; comes first")
    serve.add_argument("--preset", choices=["offload", "blend"], default="blend", help="default blend")
    serve.add_argument("--cpu-gib", type=float, default=1.0, metavar="N", help="RAM of the first tier (default 1)")
    serve.add_argument("--disk", type=Path, metavar="DIR", help="disk tier; outlives the server")
    serve.add_argument("--remote", action="append", default=[], metavar="URL", help="remote tier; may be repeated")
    serve.add_argument("--codec", metavar="SPEC", help="of the stored KV, id or JSON (default: bit for bit)")
    serve.add_argument("--policy", metavar="METHOD", help="see `lmcache-blend ls methods`")
    serve.add_argument("--recompute-ratio", type=float, metavar="R", help="0 to 1")
    serve.add_argument("--separator", metavar="TEXT", help="ends a segment")
    serve.add_argument("--match", choices=["spans", "separator", "content"], help="how segments are found")
    serve.add_argument("--dry-run", action="store_true", help="print the command and stop")


def _serve(arguments: argparse.Namespace) -> None:
    from lmcache_blend.hf.resolve import ALIASES, resolve_model
    from lmcache_blend.serving.launch import ServeOptions, plan, require_vllm

    options = ServeOptions(
        preset=arguments.preset,
        cpu_gib=arguments.cpu_gib,
        disk=arguments.disk,
        remote=tuple(arguments.remote),
        codec=arguments.codec,
        policy=arguments.policy,
        recompute_ratio=arguments.recompute_ratio,
        separator=arguments.separator,
        match=arguments.match,
    )
    if not arguments.dry_run:
        require_vllm()
    # Names that need no hub become folders; what a hub has, vLLM finds itself.
    ours = {*ALIASES, *ALIASES.values()}
    folder = resolve_model(arguments.model) if arguments.model in ours else None
    launch = plan(arguments.model, options, arguments.flags, folder=folder)
    print(launch.shell(), flush=True)
    if not arguments.dry_run:
        launch.exec()
