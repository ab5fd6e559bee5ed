"""The codec `cachegen` against LMCache 0.5.6 itself: how many symbols, scales and values differ, and the speed of both.

Run it where `lmcache` can be imported (codecs/README.md has the commands). Exits with 1 where anything differs.

    python tests/compare_lmcache.py [--kv FILE.safetensors] [--repeats N] [--json FILE]

FILE holds tensors "k" and "v", both [layers, heads, tokens, dim]; keys as the model attends to them, after RoPE.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lmcache.storage_backend.serde.cachegen_decoder import CacheGenDeserializer, do_dequantize
from lmcache.storage_backend.serde.cachegen_encoder import CacheGenSerializer, _split_kv, torch_quant_vectorized
from safetensors.torch import load_file

from lmcache_blend.codecs.cachegen import CacheGen
from lmcache_blend.codecs.cachegen_lmcache import from_scales
from lmcache_blend.codecs.pipeline import stack
from lmcache_blend.codecs.stages import Plane
from lmcache_blend.types import KVChunk

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYERS = (1, 4, 9, 10, 12, 24, 30, 32, 40)
CHUNK = 256
"""Tokens of LMCache's default chunk, and of a stream of its coder."""
SPEEDS = ((30, 3, 64, CHUNK), (30, 3, 64, 2048), (32, 8, 128, CHUNK))
"""Layers, heads, dim and tokens of the chunks that are timed: SmolLM2-135M twice, and Llama-3.1-8B."""


def lmcache(layers: int, dtype: torch.dtype, tokens: int) -> tuple[CacheGenSerializer, CacheGenDeserializer]:
    """LMCache's own two halves for a model with that many layers and chunks of that many tokens."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": layers}))
        args: Any = (SimpleNamespace(chunk_size=tokens), SimpleNamespace(model_name=folder))
        return CacheGenSerializer(*args), CacheGenDeserializer(*args, dtype)


def tensors(kv: Path | None) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, [layers, 2, tokens, heads, dim]) in float32."""
    g = torch.Generator().manual_seed(0)
    for layers in LAYERS:
        x = torch.randn(layers, 2, 77, 3, 16, generator=g)
        yield f"normal, {layers} layers", x
        yield f"outlier channel, {layers} layers", torch.cat((x[..., :1] * 1000, x[..., 1:]), -1)
        x[:, :, ::5], x[:, :, 1::5] = 0, x[:, :, 1::5] * 1e-7
        yield f"zero and tiny tokens, {layers} layers", x
    yield "powers of two: ties", 2.0 ** torch.randint(-6, 7, (12, 2, CHUNK, 2, 64), generator=g)
    if kv is not None:
        yield kv.name, loaded(kv)[:, :, :CHUNK]


def loaded(kv: Path) -> torch.Tensor:
    """[layers, 2, tokens, heads, dim] in float32."""
    found = load_file(kv)
    return torch.stack((found["k"], found["v"]), 1).transpose(2, 3).float()


def timed(kv: Path | None) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, [layers, 2, tokens, heads, dim]) in bfloat16; made up, channels have sizes that differ as those of KV."""
    g = torch.Generator().manual_seed(0)
    for layers, heads, dim, tokens in SPEEDS:
        size = torch.exp(torch.randn(layers, 2, 1, heads, dim, generator=g) / 2)
        x = torch.randn(layers, 2, tokens, heads, dim, generator=g) * size
        yield f"{layers} layers x {heads} heads x {dim}, {tokens} tokens", x.to(torch.bfloat16)
    if kv is not None:
        x = loaded(kv).to(torch.bfloat16)
        yield from ((f"{kv.name}, {n} tokens", x[:, :, :n].contiguous()) for n in sorted({CHUNK, x.shape[2]}))


def chunk(x: torch.Tensor) -> KVChunk:
    layers = tuple((k.transpose(0, 1), v.transpose(0, 1)) for k, v in x)
    return KVChunk(torch.arange(x.shape[2]), layers)


def differences(x: torch.Tensor) -> dict[str, int]:
    """How many bins, symbols, scales and values differ; "lmcache_stream": values that LMCache's own coder got wrong."""
    layers, _, tokens, heads, dim = x.shape
    serializer, deserializer = lmcache(layers, x.dtype, tokens)
    codec, out = CacheGen(), dict.fromkeys(("bins", "symbols", "scales", "values", "lmcache_stream"), 0)
    mine = codec.decode(codec.encode(chunk(x)))
    theirs = deserializer.from_bytes(serializer.to_bytes(x))
    for place, slot, bins in ((0, "k", serializer.key_bins), (1, "v", serializer.value_bins)):
        source = _split_kv(x)[place]
        q, scale = torch_quant_vectorized(bins, source)
        values = do_dequantize(q.float(), bins, scale).to(x.dtype).view(layers, tokens, heads, dim)
        out["bins"] += sum(a != b for a, b in zip(bins.tolist(), codec.bins(slot, layers), strict=True))
        out["lmcache_stream"] += int((theirs[:, place] != values).sum())
        for i in range(layers):
            plane = Plane(slot, i, ((heads, dim, heads, dim),), layers, tokens, np.arange(tokens))
            symbols, side = codec.stages(plane)[0].encode(stack([x[i, place].transpose(0, 1)]), plane)
            out["symbols"] += int((q[i].numpy() != symbols.T).sum())
            out["scales"] += int((from_scales(memoryview(side), tokens) != scale[i, :, 0].float().numpy()).sum())
            out["values"] += int((mine.layers[i][place].transpose(0, 1) != values[i]).sum())
    return out


def seconds(calls: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Median seconds of each call, in turns; the first round warms up."""
    taken: list[list[float]] = [[] for _ in calls]
    for round_ in range(repeats + 1):
        for call, times in zip(calls, taken, strict=True):
            start = time.perf_counter()
            call()
            times += [time.perf_counter() - start] * (round_ > 0)
    return [statistics.median(times) for times in taken]


def speed(kv: Path | None, repeats: int) -> list[dict[str, Any]]:
    """Whole-codec MB/s of 16-bit KV, in turns in one process."""
    rows = []
    for name, x in timed(kv):
        (serializer, deserializer), codec, c = lmcache(len(x), x.dtype, x.shape[2]), CacheGen(), chunk(x)
        theirs, mine = serializer.to_bytes(x), codec.encode(c)
        taken = seconds(
            [
                lambda s=serializer, x=x: s.to_bytes(x),
                lambda k=codec, c=c: k.encode(c),
                lambda d=deserializer, b=theirs: d.from_bytes(b),
                lambda k=codec, b=mine: k.decode(b),
            ],
            repeats,
        )
        mb = x.numel() * 2 / 1e6
        rows.append(
            {
                "data": name,
                "threads": torch.get_num_threads(),
                "lmcache_bits_per_element": 8 * len(theirs) / x.numel(),
                "bits_per_element": 8 * len(mine) / x.numel(),
                "lmcache_encode_mb_s": mb / taken[0],
                "encode_mb_s": mb / taken[1],
                "encode_ratio": taken[0] / taken[1],
                "lmcache_decode_mb_s": mb / taken[2],
                "decode_mb_s": mb / taken[3],
                "decode_ratio": taken[2] / taken[3],
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv", type=Path, help='safetensors file with "k" and "v" [layers, heads, tokens, dim]')
    parser.add_argument("--repeats", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument("--json", type=Path, help="write the results there as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    total: dict[str, int] = {}
    for name, x in tensors(args.kv):
        for dtype in DTYPES:
            found = differences(x.to(dtype))
            total = {key: total.get(key, 0) + n for key, n in found.items()}
            if any(found.values()):
                print(f"{name}, {dtype}: {found}")
    print("differing: " + ", ".join(f"{key} {n}" for key, n in total.items()))
    rows = speed(args.kv, args.repeats)
    for row in rows:
        print(f"{row['data']}, LMCache -> here:")
        for what in ("encode", "decode"):
            theirs, mine, ratio = (row[name.format(what)] for name in ("lmcache_{}_mb_s", "{}_mb_s", "{}_ratio"))
            print(f"    {what} {theirs:.1f} -> {mine:.0f} MB/s ({ratio:.0f} x)")
        print(f"    {row['lmcache_bits_per_element']:.2f} -> {row['bits_per_element']:.2f} bits per element")
    if args.json:
        args.json.write_text(json.dumps({"differing": total, "speed": rows}, indent=1))
    return int(any(n for key, n in total.items() if key != "lmcache_stream"))


if __name__ == "__main__":
    sys.exit(main())
