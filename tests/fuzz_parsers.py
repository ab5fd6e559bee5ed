"""Damaged and hostile bytes for all parsers but the codecs' (`fuzz_codecs.py`): an answer, or the error that is meant.

    python tests/fuzz_parsers.py --cases 100000 --seed 0 [--parser resp]

Parsers: heads of stored values (by accident, and with checksums made to hold), RESP, values of Redis in parts, the
count that processes share in a directory, bodies of HTTP requests, JSON configs of codecs, engines and models, profiles
of codecs, YAML of the connector. Case n has seed SEED + n. Each has 2 seconds of processor time and 512 MiB to grow.
Exit status 1 where there was a violation.
"""

import argparse
import asyncio
import json
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
import yaml
from fuzz_codecs import DAMAGE, NUMBERS, VALUES, leaves, nested, resource_bytes, timed_out
from kv import chunk, equal, key, keys

from lmcache_blend import KVEngine, get_codec
from lmcache_blend.codecs.profile import Profile
from lmcache_blend.engine import EngineConfig, values
from lmcache_blend.engine.http import make_app
from lmcache_blend.engine.tiers.base import Miss
from lmcache_blend.engine.tiers.directory import STATE, Directory
from lmcache_blend.engine.tiers.redis_parts import get_parts
from lmcache_blend.engine.tiers.resp import ServerError, Wire
from lmcache_blend.errors import CorruptChunkError, LMCacheBlendError
from lmcache_blend.hf.layout import read_config, read_layout
from lmcache_blend.serving.config import ServingConfig

EXTRA_BYTES, CPU_SECONDS = 512 << 20, 2.0
TOKEN = "0123456789abcdef-token"
Rng = random.Random


def damaged(rng: Rng, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        rng.choice(DAMAGE)(rng, out)
    return bytes(out)


def damaged_json(rng: Rng, data: bytes) -> Any:
    """Values become others, names move, and now and then something is deeply nested."""
    raw = [json.loads(data)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        holder, name = rng.choice(list(leaves(raw)))
        what = rng.random()
        if what < 0.6:
            # A copy: what is put in may be damaged next.
            holder[name] = deepcopy(rng.choice((*VALUES, *NUMBERS, -1, "\ud800", [0] * 50, {"x": 1}, "1" * 5000)))
        elif what < 0.7:
            holder[name] = nested(rng.choice((20, 300)))
        elif isinstance(holder, dict):
            holder[rng.choice((*holder, "self", "x", "", "id", "tiers"))] = holder.pop(name)
        else:
            holder.append(deepcopy(holder[name]))
    return raw[0] if raw else None


def damaged_text(rng: Rng, data: bytes) -> bytes:
    """JSON whose values were changed, or whose text was."""
    return damaged(rng, data) if rng.random() < 0.4 else json.dumps(damaged_json(rng, data)).encode()


class Feed:
    """A socket that answers with given bytes, in pieces, and hangs up."""

    def __init__(self, data: bytes, rng: Rng):
        self.left, self._rng = data, rng

    def settimeout(self, seconds: float) -> None:
        pass

    def sendall(self, data: Any) -> None:
        pass

    def recv_into(self, target: memoryview) -> int:
        n = min(len(target), len(self.left), self._rng.choice((1, 7, 4096, 1 << 20)))
        target[:n] = self.left[:n]
        self.left = self.left[n:]
        return n


class Values:
    """Heads of stored values."""

    def __init__(self) -> None:
        self.good = []
        for codec in (None, "int8", "cachegen", "zstd"):
            coder = None if codec is None else get_codec(codec)
            data = b"".join(values.encode(key(0), chunk(0), coder))
            head = values.parse(memoryview(data), key(0), len(data))
            self.good.append((data, coder, head.chunk(memoryview(data), coder)))

    def case(self, rng: Rng) -> str:
        data, coder, wanted = rng.choice(self.good)
        hostile = rng.random() < 0.7
        bad = memoryview(bytearray(self.sealed(rng, data) if hostile else damaged(rng, data)))
        try:
            arriving, there = values.Incoming(key(0), bad), 0
            while there < len(bad):
                there = min(arriving.reached(there), len(bad))
            out = arriving.whole().chunk(bad, coder)
            for group in range(len(arriving.whole().meta.groups)):
                arriving.whole().group(bad, group, coder)
        except CorruptChunkError:
            return "refused"
        assert hostile or equal(out, wanted), "damage was served"
        return "served"

    @staticmethod
    def sealed(rng: Rng, data: bytes) -> bytes:
        """Damage in the head, whose checksum is made to hold again."""
        end = values.head_bytes(memoryview(data)) - values.DIGEST
        magic, name, total, _, rows = values.PREFIX.unpack_from(data)
        at = values.PREFIX.size + rows * values.ROW.size
        table, text = data[values.PREFIX.size : at], data[at:end]
        if rng.random() < 0.6:
            text = damaged_text(rng, text)
        else:
            table = damaged(rng, table)
        if rng.random() < 0.2:
            total, rows = rng.choice(NUMBERS), rng.choice(NUMBERS)
        start = values.PREFIX.pack(magic, name, total, len(text), rows) + table + text
        return start + xxhash.xxh3_128_digest(start) + data[end + values.DIGEST :]


class Resp:
    """Replies of a Redis server."""

    GOOD = (
        b"+OK\r\n:12\r\n$3\r\nabc\r\n$-1\r\n-ERR no\r\n",
        b"*3\r\n$1\r\n0\r\n*2\r\n$2\r\nab\r\n:5\r\n*-1\r\n",
        b"$10\r\n0123456789\r\n$0\r\n\r\n",
    )

    def case(self, rng: Rng) -> str:
        wire = Wire(Feed(damaged(rng, rng.choice(self.GOOD)), rng), time.monotonic() + 60)
        try:
            while True:
                if rng.random() < 0.5:
                    got = wire.value_into(memoryview(bytearray(5)))
                    assert got is None or isinstance(got, int | ServerError)
                else:
                    wire.reply()
        except OSError:
            return "refused"


class Parts:
    """Values of Redis in parts."""

    GOOD = b"*3\r\n$2\r\n10\r\n$2\r\nmm\r\n$1\r\n4\r\n$4\r\nabcd\r\n$4\r\nefgh\r\n$2\r\nij\r\n"

    def case(self, rng: Rng) -> str:
        wire = Wire(Feed(damaged(rng, self.GOOD), rng), time.monotonic() + 60)
        start = rng.choice((0, 3, 8))
        try:
            out = get_parts(wire, "n", memoryview(bytearray(rng.choice((10, 2, 7)))), start)
        except OSError:
            return "refused"
        assert out is None or isinstance(out, int | Miss | ServerError)
        return "served"


class Index:
    """The count that processes share, beside files that are there."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        with KVEngine(tiers=[{"tier": "disk", "path": self.folder.name}]) as engine:
            engine.store(keys(3), [chunk(i) for i in range(3)], wait=True)
        self.directory = Directory(Path(self.folder.name))
        self.truth = self.directory.recount()

    def case(self, rng: Rng) -> str:
        state = Path(self.folder.name, "state")
        good = STATE.pack(*STATE.unpack(state.read_bytes()[: STATE.size]))
        bad = damaged(rng, good[:16])
        state.write_bytes(bad + good[16 : rng.choice((16, 32))])
        with self.directory.locked():
            assert self.directory.count() == self.truth
        return "served"


class Http:
    """Bodies of requests, straight into the application; a route, a token and a query now and then."""

    GOOD = (
        ("lookup", {"keys": [key(0).hex()], "segments": [key(1).hex()]}),
        ("lookup", {"tokens": [1, 2, 3], "segment_tokens": [[4]], "fingerprint": "m", "salt": "s", "chunk_tokens": 2}),
        ("ls", {"tier": "cpu", "salt": "x", "limit": 3}),
        ("usage", {}),
        ("pin", {"keys": [key(0).hex()], "seconds": 1.5}),
        ("unpin", {"keys": [key(0).hex()]}),
        ("move", {"keys": [key(0).hex()], "source": "cpu", "target": "cpu", "keep": True}),
        ("compress", {"keys": [key(0).hex()], "tier": "cpu", "codec": {"id": "int8"}}),
        ("verify", {"tier": "cpu"}),
        ("clear", {"tier": "cpu", "salt": "x", "force": False}),
    )

    token = TOKEN

    def __init__(self) -> None:
        self.engine = KVEngine(tiers=[{"tier": "cpu", "capacity_bytes": 1 << 22}])
        self.engine.store(keys(2), [chunk(0), chunk(1)], wait=True)
        self.app = make_app(self.engine, TOKEN)
        self.loop = asyncio.new_event_loop()

    def case(self, rng: Rng) -> str:
        operation, request = rng.choice(self.GOOD)
        body = damaged_text(rng, json.dumps(request).encode())
        path = f"/v1/{operation}" if rng.random() < 0.95 else damaged(rng, b"/v1/lookup").decode("latin-1")
        token = TOKEN if rng.random() < 0.97 else damaged(rng, TOKEN.encode()).decode("latin-1")
        status = self.loop.run_until_complete(self.ask(path, token, body))
        assert status in (200, 307, 400, 401, 404, 405), f"status {status}"
        assert status in (401, 404, 307, 405) or token == TOKEN
        return "served" if status == 200 else "refused"

    async def ask(self, path: str, token: str, body: bytes, method: str = "POST") -> int:
        headers = [(b"authorization", b"Bearer " + token.encode("latin-1")), (b"host", b"h")]
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
            "raw_path": path.encode("latin-1"), "root_path": "", "query_string": b"", "scheme": "http",
            "headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
        }  # fmt: skip
        status = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                status.append(message["status"])

        with suppress(Exception):  # starlette raises it again after it has answered 500
            await self.app(scope, receive, send)
        return status[0]


class Files:
    """A file that is read by a call, which may raise errors of ours only. make: damages the text."""

    def __init__(self, good: list[bytes], call: Callable[[str], Any], name: str = "config.json", make: Any = None):
        self.folder = tempfile.TemporaryDirectory()
        self.path, self.good, self.call = Path(self.folder.name, name), good, call
        self.make = make or damaged_text

    def case(self, rng: Rng) -> str:
        self.path.write_bytes(self.make(rng, rng.choice(self.good)))
        try:
            self.call(str(self.path))
        except LMCacheBlendError as error:
            text = str(error)
        else:
            return "served"
        assert len(text) < 2000, f"an error of {len(text)} characters"
        return "refused"


def codec_config(path: str) -> None:
    text = Path(path).read_bytes().decode("utf-8", "surrogateescape")
    get_codec(text)
    with suppress(ValueError, RecursionError):
        get_codec(json.loads(text))


def engine_config(path: str) -> None:
    raw = None
    with suppress(ValueError, RecursionError):
        raw = json.loads(Path(path).read_bytes())
    if isinstance(raw, dict):
        EngineConfig(**raw)


def model_config(path: str) -> None:
    layout = read_layout(read_config(path))
    sum(layer.kept_tokens(1000) * layer.elements_per_token for layer in layout.layers)


def damaged_yaml(rng: Rng, data: bytes) -> bytes:
    what = rng.random()
    if what < 0.4:
        return damaged(rng, data)
    if what < 0.5:
        return rng.choice(
            (
                b"[" * 5000,
                b"a: " * 300,
                b"a: 2001-99-99",
                b"a: &a [*a]",
                b"a: &a {b: *a}",
                b"!!python/object/apply:os.system [x]",
                b"\xff\xfe\0a",
                b"a: !!binary x",
                b"? [a]\n: b",
                b"1: 2",
                b"salt: " + b"1" * 6000,
                b"salt: 1:" + b"59:" * 900 + b"1",
                b"a: &a [x,x,x,x,x,x,x,x,x]\n"
                + b"".join(b"%c: &%c [%s]\n" % (i, i, b",".join([b"*%c" % (i - 1)] * 9)) for i in range(98, 110))
                + b"salt: *m\n",
            )
        )
    changed = damaged_json(rng, json.dumps(yaml.safe_load(data)).encode())
    try:
        return yaml.safe_dump(changed).encode("utf-8", "replace")
    except RecursionError:  # of PyYAML's writer; JSON is YAML, too
        return json.dumps(changed).encode()


def parsers() -> dict[str, Callable[[], Any]]:
    """Makers of what has a `case`, by name."""
    from test_calc import DEEPSEEK_V3, GEMMA_3_4B, JAMBA, LLAMA_3_8B, QWEN3_NEXT_80B

    codecs = [b'{"id":"int8"}', b'{"id":"cachegen","mode":"lmcache","level":2}', b'{"id":"kivi"}', b"fisher_klt"]
    engines = [
        b'{"tiers":[{"tier":"cpu","capacity_bytes":1024},{"tier":"disk","path":"/kv","codec":"int8",'
        b'"write":"back","quotas":{"a":1},"faults":{"timeout_s":1.0}}],"threads":2,"high_water":0.5}'
    ]
    served = [
        b"tiers:\n- tier: cpu\n  capacity_bytes: 1024\ncodec: int8\nchunk_tokens: 256\nsalt: x\n"
        b"blend: {policy: epic, recompute_ratio: 0.1}\n",
        b"chunk_size: 256\nlocal_cpu: true\nmax_local_cpu_size: 1.5\nenable_blending: true\nblend_special_str: ' # '\n",
    ]
    models = [json.dumps(c).encode() for c in (LLAMA_3_8B, GEMMA_3_4B, DEEPSEEK_V3, JAMBA, QWEN3_NEXT_80B)]
    return {
        "value": Values,
        "resp": Resp,
        "redis parts": Parts,
        "index": Index,
        "http": Http,
        "codec config": lambda: Files([c for c in codecs if c[:1] == b"{"], codec_config),
        "engine config": lambda: Files(engines, engine_config),
        "model config": lambda: Files(models, model_config),
        "profile": lambda: Files([profile()], Profile.load, "profile", damaged),
        "yaml": lambda: Files(served, lambda path: ServingConfig.read({"config_file": path}), "c.yaml", damaged_yaml),
    }


def profile() -> bytes:
    """The bytes of a small one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "profile")
        tensors = {"k.0": np.ones((3, 4), np.float32)}
        Profile("kvtc", "m", "f" * 64, ((2, 4, 2, 4),), tensors, {"a": 1}, frozenset({"t"})).save(path)
        return path.read_bytes()


def fuzz(cases: int, seed: int, names: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Facts of every case. problem: what went wrong, None if nothing did."""
    made = {name: make() for name, make in parsers().items() if not names or name in names}
    found = []
    previous = signal.signal(signal.SIGPROF, timed_out)
    try:
        for n in range(seed, seed + cases):
            rng = Rng(f"case {n}")
            name = rng.choice(list(made))
            facts: dict[str, Any] = {"seed": n, "parser": name, "problem": None}
            began = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            try:
                facts["outcome"] = made[name].case(rng)
            except BaseException as error:
                facts |= {"outcome": "violation", "problem": f"{type(error).__name__}: {str(error)[:300]}"}
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            found.append(facts | {"seconds": time.process_time() - began})
    finally:
        signal.signal(signal.SIGPROF, previous)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parser", action="append", choices=list(parsers()), help="only these; by default all")
    given = parser.parse_args()
    fuzz(50, 0)  # what is compiled and imported at the first use is not counted
    limit = resource_bytes() + EXTRA_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    found = fuzz(given.cases, given.seed, tuple(given.parser or ()))
    for (name, outcome), count in sorted(Counter((f["parser"], f["outcome"]) for f in found).items()):
        print(f"{name:<14} {outcome:<10} {count:>8,}")
    bad = [f for f in found if f["problem"]]
    slowest = max(found, key=lambda f: f["seconds"])
    print(f"{len(found):,} cases, {len(bad)} violations; slowest {slowest['seconds']:.3f} s ({slowest['parser']})")
    for f in bad[:40]:
        print(f"VIOLATION seed {f['seed']} {f['parser']}: {f['problem']}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
