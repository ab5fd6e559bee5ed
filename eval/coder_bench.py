"""Speeds of entropy coders on one chunk's symbols: our rANS next to torchac, constriction and zstd, in one run.

The symbols are those of CacheGen's quantiser as LMCache sets it (level 2), a matrix [C, T] per layer and slot, so that
torchac codes what it codes in LMCache: with a table per channel. Only coding is timed, not the making of tables.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import zstandard
from filelock import FileLock

from lmcache_blend.codecs import rans
from lmcache_blend.codecs.cachegen import CacheGen
from lmcache_blend.codecs.cachegen_lmcache import TokenAbsmax
from lmcache_blend.codecs.pipeline import stack
from lmcache_blend.codecs.stages import Plane
from lmcache_blend.codecs.tables import byte_frequencies, exact, histogram, laplace_bank
from lmcache_blend.config import cache_dir
from lmcache_blend.types import KVChunk

TOKENS = 256
"""Of the chunk: what LMCache codes as one stream."""
Job = tuple[Callable[[], Any], Callable[[Any], list[np.ndarray]], Callable[[Any], int]]
"""Encode everything, decode what it returned, its bytes."""


def bench_coders(chunk: KVChunk, repeat: int = 5) -> list[dict[str, Any]]:
    """A row per coder: bits_per_symbol, encode_mb_s and decode_mb_s (of 8-bit symbols, one thread), decode_ratio.

    decode_ratio: decode speed of our rANS with shared tables over the coder's; median over the rounds, in each of which
    all coders run in turns. A coder that is not installed has a `note` instead of figures.
    """
    planes = symbols(chunk)
    total = sum(p.size for p in planes)
    made: dict[str, Job] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, make in CODERS.items():
        rows[name] = {"coder": name}
        try:
            made[name] = make(planes)
        except (ImportError, OSError, RuntimeError) as error:
            rows[name]["note"] = f"not run: {str(error).splitlines()[0][:200]}"
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
    for turn in range(repeat + 1):
        for name, (encode, decode, size) in made.items():
            began = time.perf_counter()
            data = encode()
            middle = time.perf_counter()
            out = decode(data)
            ended = time.perf_counter()
            if turn:  # the first turn compiles
                seconds[name].append((middle - began, ended - middle))
                continue
            for plane, back in zip(planes, out, strict=True):
                if not np.array_equal(plane, back):
                    raise AssertionError(f"{name} does not decode what it encoded")
            rows[name]["bits_per_symbol"] = 8 * size(data) / total
    ours = np.array([d for _, d in seconds["rans, shared tables"]])
    for name, times in seconds.items():
        e, d = np.array(times).T
        rows[name] |= {
            "encode_mb_s": total / 1e6 / float(np.median(e)),
            "decode_mb_s": total / 1e6 / float(np.median(d)),
            "decode_ratio": float(np.median(d / ours)),
        }
    return list(rows.values())


def symbols(chunk: KVChunk) -> list[np.ndarray]:
    """[C, T] uint8-sized symbols, as int16, of each layer and slot of the first TOKENS tokens."""
    codec, count, out = CacheGen(), len(chunk.layers), []
    for i, pair in enumerate(chunk.layers):
        for slot, part in zip("kv", pair, strict=True):
            if part.numel():
                h, d = part.shape[0], part.shape[2]
                plane = Plane(slot, i, ((h, d, h, d),), count, min(TOKENS, part.shape[1]), np.zeros(0, np.int64), None)
                stage = TokenAbsmax(bins=codec.bins(slot, count)[i])
                out.append(stage.encode(stack([part[:, :TOKENS]]), plane)[0])
    return out


def _rans_shared(planes: list[np.ndarray]) -> Job:
    tables = laplace_bank()
    # Around each channel's median, as the stage `rans_smallest` does it.
    centres = [np.median(p, 1).astype(np.int16)[:, None] for p in planes]
    centred = [p - c for p, c in zip(planes, centres, strict=True)]
    ids = [tables.choose(q) for q in centred]

    def decode(data: list[bytes]) -> list[np.ndarray]:
        parts = zip(data, ids, planes, centres, strict=True)
        return [rans.decode(d, i, p.shape[1], tables) + c for d, i, p, c in parts]

    return lambda: [rans.encode(q, i, tables) for q, i in zip(centred, ids, strict=True)], decode, _size


def _rans_exact(planes: list[np.ndarray]) -> Job:
    tables = [exact(_counts(p), 8) for p in planes]
    packed = [byte_frequencies(t.freq[:, : int(p.max()) + 1]) for t, p in zip(tables, planes, strict=True)]
    rows = [np.arange(len(p)) for p in planes]

    def encode() -> list[bytes]:
        return [rans.encode(p, r, t) for p, r, t in zip(planes, rows, tables, strict=True)]

    def decode(data: list[bytes]) -> list[np.ndarray]:
        return [rans.decode_exact(d, f, p.shape[1]) for d, f, p in zip(data, packed, planes, strict=True)]

    return encode, decode, _size


def _torchac(planes: list[np.ndarray]) -> Job:
    import torch

    torchac = _import_torchac()

    cdfs, syms = [], []
    for p in planes:
        counts = _counts(p)
        cdf = np.concatenate((np.zeros((len(p), 1)), np.cumsum(counts, 1)), 1) / p.shape[1]
        # torchac reads a table for every symbol: views of one per channel.
        cdfs.append(torch.from_numpy(cdf).float()[:, None].expand(-1, p.shape[1], -1))
        syms.append(torch.from_numpy(p))

    def encode() -> list[bytes]:
        return [torchac.encode_float_cdf(c, s) for c, s in zip(cdfs, syms, strict=True)]

    def decode(data: list[bytes]) -> list[np.ndarray]:
        return [torchac.decode_float_cdf(c, d).numpy() for c, d in zip(cdfs, data, strict=True)]

    return encode, decode, _size


def _import_torchac() -> Any:
    """torchac compiles itself at its first import. torch guards that with a file that a killed process leaves behind
    and that every later one then waits for without end: here a lock that dies with its holder stands before it.
    """
    import torch

    folder = cache_dir() / "torchac" / torch.__version__
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "compile.lock"), mock.patch.dict(os.environ, TORCH_EXTENSIONS_DIR=str(folder)), _silence():
        (folder / "torchac_backend" / "lock").unlink(missing_ok=True)
        import torchac  # pyright: ignore[reportMissingImports]
    return torchac


def _constriction(planes: list[np.ndarray]) -> Job:
    import constriction

    stream: Any = constriction.stream  # pyright: ignore[reportAttributeAccessIssue]  # a compiled module
    ans, family = stream.stack.AnsCoder, stream.model.Categorical
    models = [family(_counts(p).sum(0).astype(np.float32) + 1e-9, perfect=False) for p in planes]
    flat = [p.ravel().astype(np.int32) for p in planes]

    def encode() -> list[np.ndarray]:
        out = []
        for s, m in zip(flat, models, strict=True):
            coder = ans()
            coder.encode_reverse(s, m)
            out.append(coder.get_compressed())
        return out

    def decode(data: list[np.ndarray]) -> list[np.ndarray]:
        parts = zip(data, models, planes, strict=True)
        return [ans(d).decode(m, p.size).reshape(p.shape) for d, m, p in parts]

    return encode, decode, lambda data: sum(d.nbytes for d in data)


def _zstd(planes: list[np.ndarray]) -> Job:
    raw, back = zstandard.ZstdCompressor(level=3), zstandard.ZstdDecompressor()
    narrow = [p.astype(np.uint8).tobytes() for p in planes]

    def decode(data: list[bytes]) -> list[np.ndarray]:
        parts = zip(data, planes, strict=True)
        return [np.frombuffer(back.decompress(d), np.uint8).reshape(p.shape) for d, p in parts]

    return lambda: [raw.compress(n) for n in narrow], decode, _size


@contextmanager
def _silence() -> Iterator[None]:
    """Nothing on stdout, not even from processes started here: it may be somebody's JSON."""
    sys.stdout.flush()
    saved, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    try:
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(null)


def _counts(plane: np.ndarray) -> np.ndarray:
    """[C, T] -> [C, A], how often each symbol occurs in each channel."""
    top = int(plane.max())
    return histogram(plane, top)[:, top:]


def _size(data: list[bytes]) -> int:
    return sum(map(len, data))


CODERS: dict[str, Callable[[list[np.ndarray]], Job]] = {
    "rans, shared tables": _rans_shared,
    "rans, table per channel": _rans_exact,
    "torchac, table per channel": _torchac,
    "constriction, table per layer": _constriction,
    "zstd -3": _zstd,
}
