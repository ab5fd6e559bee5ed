"""`lmcache-blend store ls | usage | lookup | pin | unpin | move | compress | verify | clear | serve`.

TARGET is a directory of a disk tier, the URL of a remote tier, or the http(s):// URL of a running engine's API, whose
token is in LMCACHE_BLEND_TOKEN.
"""

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from lmcache_blend import errors

TOKEN = "LMCACHE_BLEND_TOKEN"
TARGET_HELP = "directory, tier URL (redis://, rediss://, s3://, file://) or http(s):// API of an engine"
TIER = "store"
"""What the tier of TARGET is called here."""
TIMEOUT_S = 30.0


def add_commands(commands: Any, write_json: Any) -> None:
    """Add `store` to the subparsers of the command line."""
    store = commands.add_parser(
        "store", help="look after stored KV", description="Chunks in a directory or behind a URL."
    )
    group = store.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, help_text: str, keys: str | None = None) -> argparse.ArgumentParser:
        parser = group.add_parser(name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
        parser.set_defaults(command=lambda arguments: _run(name, arguments, write_json))
        parser.add_argument("target", metavar="TARGET", help=TARGET_HELP)
        if keys is not None:
            parser.add_argument("keys", nargs=keys, metavar="KEY", help="of a chunk: 64 hex digits")
        parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="the answer as JSON")
        return parser

    ls = add("ls", "chunks that are stored")
    ls.add_argument("--salt", help="of one tenant only")
    ls.add_argument("--limit", type=int, default=10_000, metavar="N", help="default 10000")
    add("usage", "bytes, chunks and capacity")
    lookup = add("lookup", "which chunks are there, by key or by tokens", "*")
    lookup.add_argument("--tokens", metavar="FILE", help="JSON list of token ids, - for stdin: chunks of this prefix")
    lookup.add_argument("--fingerprint", default="", help="of the model, as the engine's keys are made with")
    lookup.add_argument("--salt", default="", help="of the tenant")
    lookup.add_argument("--layout", default="pre_rope", help="default pre_rope")
    lookup.add_argument("--chunk-tokens", type=int, default=256, metavar="N", help="default 256")
    pin = add("pin", "keep chunks from eviction", "+")
    pin.add_argument("--seconds", type=float, metavar="S", help="default: until unpinned")
    add("unpin", "end pins", "+")
    move = add("move", "move chunks into another store", "*")
    move.add_argument("--to", required=True, metavar="TARGET2", help="another target; of an API: a tier of the engine")
    move.add_argument("--codec", metavar="SPEC", help="of the chunks there (default: as they decode)")
    move.add_argument("--keep", action="store_true", help="copy")
    compress = add("compress", "recode chunks in their place", "*")
    compress.add_argument("--codec", required=True, metavar="SPEC", help="id or JSON; none stores them as they decode")
    for parser in (move, compress):
        parser.add_argument("--all", action="store_true", help="instead of keys")
    add("verify", "read and decode all chunks; damaged ones are deleted")
    clear = add("clear", "delete chunks")
    clear.add_argument("--salt", help="of one tenant only")
    clear.add_argument("--force", action="store_true", help="pinned ones too")
    for parser in (ls, compress, move, clear, group.choices["verify"]):
        parser.add_argument("--tier", metavar="NAME", help="of an API: this tier of the engine only")

    serve = group.add_parser("serve", help="HTTP API of a store", description=f"HTTP API; the token is in {TOKEN}.")
    serve.set_defaults(command=_serve)
    serve.add_argument("target", metavar="TARGET", help=TARGET_HELP)
    serve.add_argument("--host", default="127.0.0.1", help="default 127.0.0.1; others need a certificate")
    serve.add_argument("--port", type=int, default=8900, help="default 8900; 0 takes a free one")
    serve.add_argument("--certificate", type=Path, metavar="PEM", help="for https")
    serve.add_argument("--key", type=Path, metavar="PEM", help="of the certificate")


def _run(name: str, arguments: argparse.Namespace, write_json: Any) -> None:
    answer = _ask(name, arguments, _request(name, arguments))
    if arguments.json:
        write_json(answer, arguments.json)
    if arguments.json != "-":
        _print(name, answer)
    if name == "verify":
        corrupt, kept, unread = (sum(row[what] for row in answer.values()) for what in ("corrupt", "kept", "unread"))
        wrong = [f"{_chunks(corrupt - kept)} damaged and deleted"] if corrupt > kept else []
        wrong += [f"{_chunks(kept)} damaged and not deleted: pinned, or the store takes no changes"] if kept else []
        wrong += [f"{_chunks(unread)} not read: no answer, or a codec or profile that is not at hand"] if unread else []
        if wrong:
            raise errors.TierError("; ".join(wrong))


def _request(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    remote = _is_api(arguments.target)
    given = getattr(arguments, "tier", None)
    if given and not remote:
        raise errors.ConfigError("--tier chooses a tier of an engine's API; a directory or tier URL is one tier")
    tier = given if remote else TIER
    if name in ("move", "compress") and bool(arguments.keys) == arguments.all:
        raise errors.ConfigError(f"{name} needs keys, or --all")
    keys = getattr(arguments, "keys", None) or None
    if name == "move" and remote and arguments.codec:
        raise errors.ConfigError("an engine's tiers have their own codecs: move without --codec, or `store compress`")
    if name in ("move", "compress") and tier is None:
        raise errors.ConfigError(f"{name} on an engine's API needs --tier")
    match name:
        case "ls":
            return {"tier": tier, "salt": arguments.salt, "limit": arguments.limit}
        case "lookup":
            tokens = _tokens(arguments.tokens) if arguments.tokens else []
            names = ("fingerprint", "salt", "layout", "chunk_tokens")
            return {"keys": keys or [], "tokens": tokens, **{n: getattr(arguments, n) for n in names}}
        case "pin":
            return {"keys": keys, "seconds": arguments.seconds}
        case "unpin":
            return {"keys": keys}
        case "move":
            return {
                "keys": keys,
                "source": tier,
                "target": arguments.to if remote else "target",
                "keep": arguments.keep,
            }
        case "compress":
            return {"keys": keys, "tier": tier, "codec": None if arguments.codec == "none" else arguments.codec}
        case "verify":
            return {"tier": tier}
        case "clear":
            return {"tier": tier, "salt": arguments.salt, "force": arguments.force}
    return {}


def _ask(name: str, arguments: argparse.Namespace, request: dict[str, Any]) -> Any:
    if _is_api(arguments.target):
        return _post(arguments.target, name, request)
    from lmcache_blend.engine.admin import Admin
    from lmcache_blend.engine.tiers.base import PinningTier

    second = {"target": (arguments.to, arguments.codec)} if name == "move" else {}
    if name == "move" and _place(arguments.to) == _place(arguments.target):
        raise errors.ConfigError(f"{arguments.to} is the store itself; `store compress` recodes chunks in their place")
    with _engine({TIER: (arguments.target, None), **second}) as engine:
        if name in ("pin", "unpin") and not isinstance(engine.top.tier, PinningTier):
            raise errors.ConfigError(
                f"{arguments.target} keeps no pins: pin through the API of the engine that uses it"
            )
        admin = Admin(engine, own_files=True)
        admin.answers(TIER)
        answer = admin.run(name, request)
    if name == "usage" and answer[TIER] is None:
        raise errors.TierError(f"{arguments.target} does not answer")
    return answer


@contextmanager
def _engine(targets: dict[str, tuple[str, str | None]]) -> Iterator[Any]:
    """An engine over the targets, each a tier that stands alone: nothing is promoted, evicted or written through."""
    from lmcache_blend.engine import KVEngine

    tiers = []
    for name, (target, codec) in targets.items():
        settings = {"name": name, "codec": codec, "promote": False, "write": "back", "faults": {"timeout_s": TIMEOUT_S}}
        folder = _folder(target)
        if folder is not None and name == TIER:
            _check_store(target, folder)
        tiers.append({"tier": target, **settings} if "://" in target else {"tier": "disk", "path": target, **settings})
    try:
        engine = KVEngine(tiers=tiers)
    except OSError as error:
        raise errors.ConfigError(f"no store can be opened there: {error}") from None
    with engine:
        yield engine


def _folder(target: str) -> Path | None:
    """The directory that a target names; None for a service."""
    if target.startswith("file://"):
        return Path(unquote(urlsplit(target).path))
    return None if "://" in target else Path(target)


def _place(target: str) -> str:
    """The same for two names of one store, as far as names tell."""
    folder = _folder(target)
    return target.rstrip("/") if folder is None else os.path.realpath(folder)


def _check_store(target: str, folder: Path) -> None:
    """Raises ConfigError for what is no store, so that a wrong name neither seems an empty one nor becomes one."""
    try:
        if not folder.is_dir():
            raise errors.ConfigError(f"{target!r} is no directory and no URL of a store")
        if not (folder / "chunks").is_dir() and any(folder.iterdir()):
            raise errors.ConfigError(f"{target!r} is no store: there are other files in it, and no folder 'chunks'")
    except OSError as error:
        raise errors.ConfigError(f"{target!r} cannot be read: {error.strerror}") from None


def _serve(arguments: argparse.Namespace) -> None:
    from lmcache_blend.engine.http import serve

    if _is_api(arguments.target):
        raise errors.ConfigError(f"{arguments.target} is an API already; give a directory or the URL of a tier")
    token = _token()
    with _engine({TIER: (arguments.target, None)}) as engine:
        where = (arguments.host, arguments.port, arguments.certificate, arguments.key)
        serve(engine, token, *where, ready=lambda url: print(url, flush=True))


def _is_api(target: str) -> bool:
    return target.startswith(("http://", "https://"))


def _token() -> str:
    token = os.environ.get(TOKEN, "")
    if not token:
        raise errors.ConfigError(f"set {TOKEN}, e.g. to $(openssl rand -hex 32)")
    return token


def _post(target: str, operation: str, request: dict[str, Any]) -> Any:
    import urllib.error
    import urllib.request

    headers = {"Authorization": f"Bearer {_token()}", "Content-Type": "application/json"}
    url = f"{target.rstrip('/').removesuffix('/v1')}/v1/{operation}"
    call = urllib.request.Request(url, json.dumps(request).encode(), headers)
    try:
        with urllib.request.urlopen(call, timeout=600) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        try:
            message = json.load(error)["error"]
        except (ValueError, KeyError, TypeError):
            message = error.reason
        kind = errors.ConfigError if error.code in (400, 401, 404, 413) else errors.TierError
        raise kind(f"{target}: {message}") from None
    except (OSError, ValueError) as error:
        raise errors.TierError(f"{target} does not answer: {error}") from None


def _tokens(file: str) -> Any:
    import sys

    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text()
        tokens = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise errors.DataError(f"{file} is no JSON list of token ids: {error}") from None
    if not isinstance(tokens, list):
        raise errors.DataError(f"{file} is no JSON list of token ids")
    return tokens


def _print(name: str, answer: Any) -> None:
    from lmcache_blend.eval.calc_render import size

    match name:
        case "ls":
            tiers = {row["tier"]: [] for row in answer["chunks"]}
            for row in answer["chunks"]:
                tiers[row["tier"]].append(row)
            for tier, rows in tiers.items():
                if set(tiers) != {TIER}:
                    print(f"{tier}:")
                for row in rows:
                    print(f"{row['key']} {size(row['nbytes']):>8}{' pinned' if row['pinned'] else ''}")
            more = "" if answer["complete"] else " shown, there are more: --limit N"
            print(f"{_chunks(len(answer['chunks']))}{more}")
        case "lookup":
            for key, tier in zip(answer["keys"], answer["tiers"], strict=True):
                print(f"{key}  {tier or 'absent'}")
            tokens = "" if answer["prefix_tokens"] is None else f", {answer['prefix_tokens']:,} tokens"
            print(f"prefix: {_chunks(answer['prefix_chunks'])}{tokens}")
        case "usage":
            for tier, row in answer.items():
                room = "" if row is None or row["capacity_bytes"] is None else f" of {row['capacity_bytes']:,}"
                print(
                    f"{tier}: "
                    + ("no answer" if row is None else f"{_chunks(row['chunks'])}, {row['nbytes']:,}{room} B")
                )
        case "verify":
            for tier, row in answer.items():
                print(f"{tier}: {_chunks(row['checked'])} read, {row['corrupt']:,} damaged")
        case _:
            for word, value in answer.items():
                if isinstance(value, list):
                    value = (
                        f"{sum(map(bool, value)):,} of {len(value):,}"
                        if word != "missed"
                        else " ".join(value) or "none"
                    )
                print(f"{word}: {value}")


def _chunks(n: int) -> str:
    return f"{n:,} chunk{'s' * (n != 1)}"
