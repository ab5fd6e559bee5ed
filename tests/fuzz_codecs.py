"""Damaged and hostile chunks: whatever the bytes, a codec gives the chunk that was encoded or CorruptChunkError.

    python tests/fuzz_codecs.py --cases 100000 --seed 0

Case n has seed SEED + n, so `--seed THAT --cases 1` runs one again. Every case damages the bytes of one small chunk: as
an accident would (checksums then tell), or as a hostile writer would, who makes every checksum hold again; the latter
may decode to anything of the shape that the header declares. Cases run in a worker process with 512 MiB to grow and 2
seconds of processor time each; a worker that dies is a violation too. Exit status 1 where there was one.
"""

import argparse
import hashlib
import json
import random
import resource
import select
import signal
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from typing import Any

import torch
from test_codec_conformance import CASES, FITTED

from lmcache_blend.codecs import Codec, PipelineCodec, get_codec
from lmcache_blend.codecs.container import FREE_ELEMENTS, MAX_ELEMENTS_PER_BYTE, PREFIX, Container, join, split
from lmcache_blend.codecs.inspect import describe
from lmcache_blend.codecs.raw import HEADER_BYTES, MAGIC
from lmcache_blend.errors import CorruptChunkError
from lmcache_blend.testing import CodecConformance, kinds, same_bits
from lmcache_blend.types import KVChunk

EXTRA_BYTES, CPU_SECONDS, DEAD_SECONDS = 512 << 20, 2.0, 60
NUMBERS = (0, 1, 2, 3, 31, 32, 255, 256, 1 << 12, 1 << 16, 1 << 20, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
VALUES = (
    None,
    True,
    -1,
    0,
    1,
    2,
    7,
    1 << 20,
    1 << 24,
    1 << 40,
    1 << 70,
    0.5,
    1e308,
    float("nan"),
    "",
    "x",
    [],
    [[]],
    {},
)
Rng = random.Random


# Damage to bytes


def flip(rng: Rng, data: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def run(rng: Rng, data: bytearray) -> None:
    at, size = rng.randrange(len(data) + 1), rng.choice((1, 4, 16, 200))
    new = rng.choice((b"\0", b"\xff", b"\x80", rng.randbytes(1))) * size if rng.random() < 0.6 else rng.randbytes(size)
    data[at : at + size] = new[: len(data) - at]


def truncate(rng: Rng, data: bytearray) -> None:
    del data[rng.randrange(len(data) + 1) :]


def insert(rng: Rng, data: bytearray) -> None:
    at = rng.randrange(len(data) + 1)
    data[at:at] = rng.choice((bytes(rng.choice((1, 4, 300))), rng.randbytes(rng.choice((1, 2, 4, 64)))))


def duplicate(rng: Rng, data: bytearray) -> None:
    at, size, to = rng.randrange(len(data) + 1), rng.choice((1, 4, 32, 500)), rng.randrange(len(data) + 1)
    data[to:to] = data[at : at + size]


def huge(rng: Rng, data: bytearray) -> None:
    """A 32-bit number that is declared somewhere becomes another one."""
    if len(data) >= 4:
        struct.pack_into("<I", data, rng.randrange(min(len(data) - 3, 400)), rng.choice(NUMBERS))


DAMAGE: tuple[Callable[[Rng, bytearray], None], ...] = (flip, run, truncate, insert, duplicate, huge)


# Hostile writers


def sealed(raw: dict[str, Any] | bytes, parts: Sequence[bytes], padding: int = 0) -> bytes:
    """A container in which every checksum holds. raw: header, or its text where it is no JSON any more."""
    if isinstance(raw, dict):
        raw = {**raw, "segments": [[len(p), hashlib.sha256(p).digest()[:16].hex()] for p in parts]}
        text = json.dumps(raw).encode()
    else:
        text = raw
    start = PREFIX.pack(b"LMCB", 1, 0, len(text)) + text
    return b"".join((start, hashlib.sha256(start).digest(), *parts, bytes(padding)))


def opened(data: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Header and segments of a container."""
    container = Container(data)
    raw = json.loads(data[PREFIX.size : PREFIX.size + PREFIX.unpack_from(data)[3]])
    return raw, [bytes(container.segment(i)) for i in range(len(container.sizes))]


def hostile_segment(rng: Rng, data: bytes) -> bytes:
    raw, parts = opened(data)
    at = rng.randrange(len(parts))
    part = bytearray(parts[at])
    rng.choice(DAMAGE)(rng, part)
    parts[at] = bytes(part)
    return sealed(raw, parts)


def hostile_part(rng: Rng, data: bytes) -> bytes:
    """Damage deep inside: lengths around it are made right again, and so is DEFLATE."""
    raw, parts = opened(data)
    at = rng.randrange(1, len(parts)) if len(parts) > 1 else 0
    parts[at] = deep(rng, parts[at])
    return sealed(raw, parts)


def deep(rng: Rng, data: bytes) -> bytes:
    mark = data[:1] if data[:1] in (b"\0", b"\1") else b""
    for head in {b"", mark}:
        if inner := parts_of(data[len(head) :]):
            if rng.random() < 0.1:
                rng.shuffle(inner)
            at = rng.randrange(len(inner))
            inner[at] = deep(rng, inner[at])
            return head + join(inner)
    try:
        plain = bytearray(zlib.decompress(data))
        rng.choice(DAMAGE)(rng, plain)
        return zlib.compress(bytes(plain), 9)
    except zlib.error:
        out = bytearray(data)
        rng.choice(DAMAGE)(rng, out)
        return bytes(out)


def parts_of(data: bytes) -> list[bytes]:
    for count in range(1, 9):
        try:
            return [bytes(p) for p in split(data, count)]
        except CorruptChunkError:
            continue
    return []


def hostile_header(rng: Rng, data: bytes) -> bytes:
    """Values in the header become others; now and then the text itself is damaged, or padding is thrown in."""
    raw, parts = opened(data)
    if rng.random() < 0.15:
        text = bytearray(
            json.dumps({**raw, "segments": [[len(p), hashlib.sha256(p).hexdigest()[:32]] for p in parts]}), "utf8"
        )
        rng.choice(DAMAGE)(rng, text)
        return sealed(bytes(text), parts)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(leaves(raw))
        holder, key = rng.choice(places)
        old = holder[key]
        if isinstance(old, str) and rng.random() < 0.5:
            holder[key] = rng.choice(
                (old[:-1], old + "x", old.upper(), rng.choice(places)[1], "rans", "deflate", "mean")
            )
        elif type(old) is int and rng.random() < 0.5:
            holder[key] = rng.choice((old + 1, old - 1, old * 2, -old, old << 20, rng.choice(NUMBERS)))
        elif isinstance(holder, list) and rng.random() < 0.3:
            holder.insert(key, deepcopy(old)) if rng.random() < 0.5 else holder.pop(key)
        elif isinstance(holder, dict) and rng.random() < 0.3:
            holder[rng.choice(("self", "profile", "id", "x", "k", "v", "cls"))] = holder.pop(key)
        else:
            holder[key] = deepcopy(rng.choice(VALUES))
    if rng.random() < 0.1:
        holder, key = rng.choice(list(leaves(raw)))
        holder[key] = nested(rng.choice((20, 300, 900)))
    if rng.random() < 0.3 and len(parts) > 1:
        parts[rng.randrange(len(parts))] = rng.choice((b"", bytes(rng.choice((1, 9, 64))), rng.choice(parts)))
    return sealed(raw, parts, rng.choice((0, 0, 1, 100, 4000)))


def hostile_claims(rng: Rng, data: bytes) -> bytes:
    """A chunk of a few KB that claims as many elements as a container may, in one direction or another."""
    raw, parts = opened(data)
    tokens = rng.choice((0, 1, 2, 256, 3000))
    heads, dim = rng.choice(
        ((1, 1), (1, 255), (4, 64), (1 << 10, 1), (1, 1 << 10), (1, 1 << 18), (1 << 18, 1), (1, 1 << 20))
    )
    layers = rng.choice((sum(n for n, _ in raw["layers"]), 100, 4000))
    raw["layers"] = [[layers, [[heads, dim, heads, dim], ["bfloat16", "bfloat16"]]]]
    if rng.random() < 0.5:
        raw["groups"], parts = [[1, layers]], parts[:2]
    raw["tokens"], parts[0] = tokens, bytes(4 * tokens)
    size = len(sealed(raw, parts))
    padding = (2 * heads * dim * layers * max(tokens, 1) - FREE_ELEMENTS) // MAX_ELEMENTS_PER_BYTE + 1 - size
    return sealed(raw, parts, min(max(padding, 0), 4096))


def leaves(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value in JSON."""
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(item, dict | list):
            yield from leaves(item)


def nested(depth: int) -> list[Any]:
    out: list[Any] = []
    for _ in range(depth):
        out = [out]
    return out


def swap(rng: Rng, data: bytes) -> bytes:
    raw, parts = opened(data)
    rng.shuffle(parts)
    return sealed(raw, parts)


def swap_unsealed(rng: Rng, data: bytes) -> bytes:
    _, parts = opened(data)
    start = len(data) - sum(map(len, parts))
    rng.shuffle(parts)
    return data[:start] + b"".join(parts)


def wrong_codec(rng: Rng, data: bytes) -> bytes:
    raw, parts = opened(data)
    return sealed({**raw, "codec": {**raw["codec"], "id": rng.choice(("another", "raw", "", "x" * 5000))}}, parts)


def wrong_profile(rng: Rng, data: bytes) -> bytes:
    raw, parts = opened(data)
    return sealed({**raw, "profile": rng.choice(("", "0" * 64, "\ud800", "x" * 9000))}, parts)


def hostile_raw(rng: Rng, data: bytes) -> bytes:
    """A raw chunk: its body damaged, most often the JSON header in it, and the checksum made to hold."""
    body = bytearray(data[HEADER_BYTES:])
    size = 8 + struct.unpack_from("<Q", body)[0] if rng.random() < 0.8 else len(body)
    part = body[:size]
    rng.choice(DAMAGE)(rng, part)
    body[:size] = part
    return MAGIC + hashlib.sha256(body).digest() + bytes(body)


ACCIDENTS: dict[str, Callable[[Rng, bytes], bytes]] = {
    d.__name__: lambda rng, data, d=d: (d(rng, out := bytearray(data)), bytes(out))[1] for d in DAMAGE
}
CONTAINER = {"swap": swap_unsealed}
HOSTILE = {
    "segment": hostile_segment,
    "part": hostile_part,
    "header": hostile_header,
    "claims": hostile_claims,
    "swapped": swap,
}
WRONG = {"wrong codec": wrong_codec, "wrong profile": wrong_profile}


# One case


class Target:
    """A codec with a few coded chunks."""

    def __init__(self, name: str):
        self.name = name
        self.codec: Codec = get_codec(CASES[name].config())
        made = CodecConformance()
        shapes = [((2, 4, 2, 4),) * 2, ((1, 8, 2, 3),) * 3, ((1, 16, 0, 0),), ((1, 16, 1, 16),)]
        if CASES[name].fitted:
            shapes = [FITTED] * 4
        dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float16)
        chunks = [made.chunk(*case) for case in zip(shapes, (7, 40, 1, 130), dtypes, strict=True)]
        chunks[0].layers[1][0][0, 0, 0] = float("inf")
        self.good: list[tuple[bytes, KVChunk]] = []
        for chunk in chunks:
            data = self.codec.encode(chunk)
            self.good.append((data, self.codec.decode(data)))
        self.contained = self.good[0][0].startswith(b"LMCB\1")

    def mutations(self) -> list[tuple[str, Callable[[Rng, bytes], bytes], str]]:
        """(name, function, what must come of it) of every kind of damage."""
        out = [(name, f, "same") for name, f in {**ACCIDENTS, **(CONTAINER if self.contained else {})}.items()]
        if self.contained:
            out += [(name, f, "any") for name, f in HOSTILE.items() for _ in range(3)]
            out += [(name, f, "none") for name, f in WRONG.items()]
        elif self.good[0][0].startswith(MAGIC):
            out += [("raw body", hostile_raw, "any")] * 6
        return out


def one(seed: int, targets: list[Target]) -> dict[str, Any]:
    """Runs the case of a seed. problem: what went wrong, None if nothing did."""
    rng = Rng(f"case {seed}")
    target = rng.choice(targets)
    data, original = rng.choice(target.good)
    name, change, expected = rng.choice(target.mutations())
    bad = change(rng, data)
    if expected == "same" and rng.random() < 0.05:
        bad, name, expected = rng.choice(targets).good[0][0], "foreign", "foreign"
    facts: dict[str, Any] = {"seed": seed, "codec": target.name, "mutation": name, "problem": None, "bytes": len(bad)}
    started = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        facts["outcome"], facts["problem"] = judge(target, bad, original, expected)
    except TimeoutError:
        facts |= {"outcome": "violation", "problem": f"more than {CPU_SECONDS} s"}
    except BaseException as error:
        facts |= {"outcome": "violation", "problem": f"{type(error).__name__}: {error}"[:300]}
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return facts | {"seconds": time.process_time() - started}


def judge(target: Target, bad: bytes, original: KVChunk, expected: str) -> tuple[str, str | None]:
    with suppress(CorruptChunkError):
        json.dumps(describe(bad))
    if isinstance(target.codec, PipelineCodec):
        with suppress(CorruptChunkError):
            target.codec.decode_layers(bad, 0)
    try:
        out = target.codec.decode(bad)
    except CorruptChunkError:
        return "corrupt", None
    if expected == "any":
        return "decoded", None if not target.contained or declared(bad, out) else "other shapes than the header's"
    if expected == "none":
        return "violation", "decoded what is not its own"
    if expected == "foreign":
        mine = Container(bad).header.codec["id"] if target.contained else "raw"
        return "decoded", None if mine == CASES[target.name].id else f"decoded a chunk of {mine}"
    same = same_bits(out, original) and torch.equal(out.tokens, original.tokens)
    return "same", None if same and out.exact_after == original.exact_after else "decoded to something else"


def declared(data: bytes, out: KVChunk) -> bool:
    header = Container(data).header
    return out.shapes == header.shapes and len(out) == header.tokens and len(kinds(out)) == 2 * len(header.shapes)


# Worker and parent


def work(names: list[str], first: int, last: int) -> None:
    """Runs the cases first..last - 1; a line before each ("seed") and after each (its facts)."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    targets = [Target(name) for name in names]
    signal.signal(signal.SIGPROF, timed_out)
    for target in targets:  # compiles what is compiled on first use, before memory is counted
        for data, _ in target.good:
            judge(target, data, target.good[0][1], "any")
    grown = resource_bytes()
    resource.setrlimit(resource.RLIMIT_AS, (grown + EXTRA_BYTES, grown + EXTRA_BYTES))
    for seed in range(first, last):
        print(seed, flush=True)
        print(
            json.dumps({**one(seed, targets), "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10}),
            flush=True,
        )


def timed_out(*_: Any) -> None:
    raise TimeoutError


def resource_bytes() -> int:
    """Address space of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def fuzz(cases: int, seed: int, names: Sequence[str] = tuple(CASES)) -> list[dict[str, Any]]:
    """Facts of every case, in order. A worker that dies is replaced, and its case is a violation."""
    found: list[dict[str, Any]] = []
    while len(found) < cases:
        at = seed + len(found)
        command = [sys.executable, __file__, "--worker", json.dumps([list(names), at, seed + cases])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
            assert worker.stdout is not None
            running, count = None, len(found)
            while True:
                if running is not None and not select.select([worker.stdout], [], [], DEAD_SECONDS)[0]:
                    worker.kill()
                    break
                line = worker.stdout.readline()
                if not line:
                    break
                if line.startswith("{"):
                    found.append(json.loads(line))
                    running = None
                else:
                    running = int(line)
        if running is not None:
            problem = f"the worker died with status {worker.returncode}"
            found.append({"seed": running, "codec": "?", "mutation": "?", "outcome": "violation", "problem": problem})
        elif len(found) == count:
            raise RuntimeError(f"the worker does not start: status {worker.returncode}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--codec", action="append", choices=list(CASES), help="only these; by default all")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(*json.loads(args.worker))
        return 0
    found = fuzz(args.cases, args.seed, args.codec or tuple(CASES))
    for (codec, mutation, outcome), count in sorted(
        Counter((f["codec"], f["mutation"], f["outcome"]) for f in found).items()
    ):
        print(f"{codec:<20} {mutation:<14} {outcome:<10} {count:>8,}")
    bad = [f for f in found if f["problem"]]
    slowest = max(found, key=lambda f: f.get("seconds", 0.0))
    print(f"{len(found):,} cases, {len(bad)} violations")
    print(
        f"slowest: {slowest.get('seconds', 0):.3f} s, seed {slowest['seed']} ({slowest['codec']} {slowest['mutation']})"
    )
    print(f"peak memory of a worker: {max(f.get('peak', 0) for f in found) >> 20} MiB")
    for f in bad[:40]:
        print(f"VIOLATION seed {f['seed']} {f['codec']} {f['mutation']}: {f['problem']}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
