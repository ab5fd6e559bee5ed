"""Measure codecs on a model's own KV: size of real containers, KL of what follows, speed."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lmcache_blend.blend.chunks import read_layers, rotated, write_chunk
from lmcache_blend.blend.runner import Plan
from lmcache_blend.codecs import PipelineCodec, Profile, get_codec, short_name
from lmcache_blend.codecs.container import Container
from lmcache_blend.errors import ConfigError, CorruptChunkError, DataError
from lmcache_blend.eval.coder_bench import bench_coders
from lmcache_blend.eval.texts import documents, windows
from lmcache_blend.hf.calibrate import text_digest
from lmcache_blend.types import KVChunk

CONTINUATION = 96
SWEPT = ("step", "budget", "bits", "level", "bits_k", "bits_v", "k_bins", "v_bins")
"""Settings that move a codec along its curve of rate and distortion."""


class Document:
    """A context, its KV and what the model says after it. window: [T + n] int64; context: T."""

    def __init__(self, runner: Any, window: Tensor, context: int):
        self.window, self.context = window, context
        positions = torch.arange(context)
        kv = runner.new_kv(context, len(window))
        runner.forward([window[:context]], [kv], Plan([positions]))
        layers = read_layers(runner, kv, 0, context, runner.rotary.at(positions))
        self.chunk = KVChunk(window[:context], layers)
        self.log_p = self.continue_from(runner, kv)

    def continue_from(self, runner: Any, kv: Any) -> Tensor:
        """Log probabilities [n, V] of the rows behind the context."""
        kv.extend(len(self.window))
        rows = torch.arange(self.context, len(self.window))
        out = runner.forward([self.window], [kv], Plan([rows]), 0).logits
        kv.length = self.context
        return out[0].log_softmax(-1)


def measure(runner: Any, codec: Any, document: Document, repeat: int = 1) -> dict[str, Any]:
    """bits per element, kl, top1_agreement, delta_nll, encode_mb_s and decode_mb_s (MB of 16-bit KV) of one document.

    By layer, as arrays [L]: layer_bits per element, layer_error_k and layer_error_v, root-mean-square error over
    root-mean-square value.
    """
    post = getattr(codec, "keys", "pre_rope") == "post_rope"
    chunk = rotated(runner, document.chunk) if post else document.chunk
    elements = sum(k.numel() + v.numel() for k, v in chunk.layers)
    encode, data = _timed(lambda: codec.encode(chunk), repeat)
    decode, out = _timed(lambda: codec.decode(data), repeat)
    layers = _layers(data, chunk, out)
    out = rotated(runner, out, inverse=True) if post else out
    log_q = document.continue_from(runner, write_chunk(runner, out, len(document.window)))
    p, targets = document.log_p, document.window[document.context + 1 :, None]
    return {
        "bits": 8 * len(data) / elements,
        "kl": float((p.exp() * (p - log_q)).sum(-1).mean()),
        "top1_agreement": float((p.argmax(-1) == log_q.argmax(-1)).float().mean()),
        "delta_nll": float((p[:-1] - log_q[:-1]).gather(1, targets).mean()),
        "encode_mb_s": 2e-6 * elements / encode,
        "decode_mb_s": 2e-6 * elements / decode,
        **layers,
    }


def _layers(data: bytes, chunk: KVChunk, out: KVChunk) -> dict[str, np.ndarray]:
    elements = np.array([k.numel() + v.numel() for k, v in chunk.layers])
    try:
        container = Container(data)
        groups = zip(container.sizes[1:], container.header.groups, strict=True)
        share = np.concatenate([np.full(n, size / n) for size, n in groups])
    except CorruptChunkError:  # a format of a codec's own, of equal layers
        share = np.full(len(elements), len(data) / len(elements))
    errors = [
        [
            float((a - b).square().sum().sqrt() / a.square().sum().sqrt().clamp_min(1e-30))
            for a, b in zip(x, y, strict=True)
        ]
        for x, y in zip(chunk.layers, out.layers, strict=True)
    ]
    k, v = np.array(errors).T
    return {"layer_bits": 8 * share / elements, "layer_error_k": k, "layer_error_v": v}


def bench(
    runner: Any,
    sources: Sequence[str | Path],
    specs: Sequence[Any],
    context_tokens: int,
    limit: int = 4,
    repeat: int = 3,
) -> list[dict[str, Any]]:
    """Every codec on `limit` windows of every source, in turns; a row per source and codec.

    A row's "coders" are the speeds of entropy coders on the first window (coder_bench.py), the same in every row.
    Text that a profile was fitted on is left out. Raises ConfigError, DataError.
    """
    codecs = []
    for spec in specs:
        codec = get_codec(spec)
        if isinstance(codec, PipelineCodec):
            codec.check_model(runner.fingerprint, runner.model_id)
        codecs.append((spec, codec))
    if context_tokens < 1 or context_tokens + CONTINUATION > runner.max_tokens:
        raise ConfigError(f"context_tokens = {context_tokens}: choose 1 to {runner.max_tokens - CONTINUATION}")
    fitted = {t for _, c in codecs if getattr(c, "profile", None) for t in Profile.load(c.profile).texts}
    rows, coders = [], []
    for source in sources:
        found = windows(documents(source), runner.tokenizer, context_tokens + CONTINUATION, 8 * limit)
        fresh = [w for w in found if text_digest(w) not in fitted][:limit]
        if not fresh:
            raise DataError(f"every window of {source} was in the text of a profile; measure on other text")
        seen: list[list[dict[str, Any]]] = [[] for _ in codecs]
        for window in tqdm(fresh, desc=Path(source).stem, unit="window"):
            document = Document(runner, window, context_tokens)
            coders = coders or bench_coders(document.chunk)
            for (_, codec), into in zip(codecs, seen, strict=True):
                into.append(measure(runner, codec, document, repeat))
        for (_, codec), into in zip(codecs, seen, strict=True):
            mean = {name: sum(r[name] for r in into) / len(into) for name in into[0]}
            rows.append(
                {
                    "codec": codec.get_config(),
                    "model": runner.model_id,
                    "data": Path(source).stem,
                    "context_tokens": context_tokens,
                    "documents": len(into),
                    "bits_per_element": mean.pop("bits"),
                    **{name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in mean.items()},
                    "threads": torch.get_num_threads(),
                    "coders": coders,
                }
            )
    return rows


def family(config: dict[str, Any]) -> str:
    """What all settings along one codec's curve share, as a name.

    >>> family({"id": "kivi", "bits_k": 2, "bits_v": 2, "sinks": 4})
    'kivi sinks=4'
    """
    return short_name({k: v for k, v in config.items() if k not in SWEPT})


def rates(rows: Sequence[dict[str, Any]], kl: float) -> dict[str, dict[str, float]]:
    """{codec: {text: bits per element}} at a KL, log-linear between the measured settings of one codec.

    Only where settings lie on both sides. "mean" is over the texts, where all have a figure.
    """
    families: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        families.setdefault(family(row["codec"]), {}).setdefault(row["data"], []).append(
            (row["kl"], row["bits_per_element"])
        )
    out: dict[str, dict[str, float]] = {}
    for name, texts in families.items():
        found = {}
        for text, points in texts.items():
            seen, bits = np.array(sorted(points)).T
            if seen[0] <= kl <= seen[-1] and seen[0] > 0:
                found[text] = float(np.interp(np.log(kl), np.log(seen), bits))
        if len(found) == len(texts):
            found["mean"] = sum(found.values()) / len(found)
        if found:
            out[name] = found
    return out


def _timed(work: Any, repeat: int) -> tuple[float, Any]:
    """Shortest wall time of `repeat` calls in seconds, and the result."""
    out, best = None, float("inf")
    for _ in range(repeat):
        began = time.perf_counter()
        out = work()
        best = min(best, time.perf_counter() - began)
    return best, out
