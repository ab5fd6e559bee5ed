"""The calculator: bytes of KV per token and context, what tiers hold, and when loading beats prefilling.

Everything but a codec's size follows from config.json. A codec's size is found by running it: exact where it does not
depend on the data, else a figure for Gaussian KV, said to be one, unless the caller gives what `codec bench` measured.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pydantic
import torch

from lmcache_blend.codecs import get_codec
from lmcache_blend.config import Config
from lmcache_blend.errors import ConfigError
from lmcache_blend.hf.layout import LayerKV, ModelKV, prefill_flops, read_config, read_layout
from lmcache_blend.types import KVChunk

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}
SAMPLE_TOKENS = 256
MOST = 10**9
"""Tokens of a context, and users."""
UNITS = {
    "": 1,
    "K": 1000,
    "M": 1000**2,
    "G": 1000**3,
    "T": 1000**4,
    "KI": 1 << 10,
    "MI": 1 << 20,
    "GI": 1 << 30,
    "TI": 1 << 40,
}


class CalcRequest(Config):
    """What `lmcache-blend calc` is asked. bandwidths_gbit_s: of the links or disks that KV is loaded over."""

    model: str
    tokens: int
    users: int = 1
    codec: str | None = None
    dtype: str | None = None
    """Of the KV; null: what the config names."""
    bits_per_element: float | None = None
    """Measured size of the codec (`lmcache-blend codec bench`), instead of running it on Gaussian KV."""
    tiers: dict[str, int] = pydantic.Field(default={"cpu": 64 << 30, "disk": 1 << 40})
    """Bytes by name of the tier."""
    bandwidths_gbit_s: tuple[float, ...] = (1.0, 5.0, 20.0, 100.0)
    tflops: float = 400.0
    """Sustained compute of the device in TFLOP/s; 400 is some 40 % of an H100's 989 in bfloat16."""
    prefill_tokens_per_s: float | None = None
    """Measured prefill speed, instead of FLOPs over `tflops`."""

    def model_post_init(self, context: Any) -> None:
        if self.dtype is not None and self.dtype not in DTYPE_BYTES:
            raise ConfigError(f"dtype = {self.dtype!r}; known: {', '.join(DTYPE_BYTES)}")
        if self.bits_per_element is not None and self.codec is None:
            raise ConfigError("bits_per_element is the size of a codec; name it too")
        positive = {
            "tokens": self.tokens,
            "users": self.users,
            "bits_per_element": self.bits_per_element,
            "tflops": self.tflops,
            "prefill_tokens_per_s": self.prefill_tokens_per_s,
            **{f"bandwidth {b:g}": b for b in self.bandwidths_gbit_s},
            **{f"tier {name}": size for name, size in self.tiers.items()},
        }
        for name, value in positive.items():
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} = {value}: it must be above 0")
        for name, value in (("tokens", self.tokens), ("users", self.users)):
            if value > MOST:
                raise ConfigError(f"{name} = {value}: at most {MOST:,}")
        if not all(self.tiers):
            raise ConfigError("a tier has no name; write e.g. cpu=64GiB")


@dataclass(frozen=True)
class CodecSize:
    """Bits per element of a codec and where the figure is from: "exact", "gaussian" or "measured"."""

    bits_per_element: float
    source: str


def calculate(request: CalcRequest) -> dict[str, Any]:
    """The figures as one JSON object. Raises ConfigError, ModelNotFoundError or UnsupportedModelError."""
    model = read_layout(read_config(request.model))
    dtype = request.dtype or model.dtype
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"the config's dtype {dtype!r} is none of {', '.join(DTYPE_BYTES)}; name the KV's dtype")
    width = DTYPE_BYTES[dtype]
    kinds = _by_kind(model.layers, request.tokens, width)
    kv_bytes = kv_size(model, request.tokens, width)
    size = codec_size(model, request, dtype) if request.codec is not None else None
    codec_bytes = None if size is None else math.ceil(kv_bytes * size.bits_per_element / (8 * width))
    stored = kv_bytes if codec_bytes is None else codec_bytes
    states = [layer.state for layer in model.layers]
    return {
        "model": request.model,
        "model_type": model.model_type,
        "tokens": request.tokens,
        "users": request.users,
        "dtype": dtype,
        "kv_bytes_per_token": sum(layer.elements_per_token for layer in model.layers) * width,
        "kv_bytes": kv_bytes,
        "total_kv_bytes": kv_bytes * request.users,
        "state_bytes": None if None in states else sum(s or 0 for s in states) * width,
        "by_layer_kind": kinds,
        "codec": request.codec,
        "codec_bytes": codec_bytes,
        "codec_bits_per_element": None if size is None else size.bits_per_element,
        "codec_size_source": None if size is None else size.source,
        "tiers": [
            {"tier": name, "capacity_bytes": room, "contexts": room // stored if stored else None}
            for name, room in request.tiers.items()
        ],
        **_load_or_prefill(model, request, kv_bytes, codec_bytes),
    }


def kv_size(model: ModelKV, tokens: int, width: int) -> int:
    """Bytes of KV of one context: a sliding or chunked layer keeps its window only."""
    return sum(layer.kept_tokens(tokens) * layer.elements_per_token for layer in model.layers) * width


def codec_size(model: ModelKV, request: CalcRequest, dtype: str) -> CodecSize:
    """Bits per element of the codec on this model's shapes, container included. Raises ConfigError."""
    assert request.codec is not None
    codec = get_codec(request.codec)
    if request.bits_per_element is not None:
        return CodecSize(request.bits_per_element, "measured")
    shapes = [layer.shape for layer in model.layers if layer.attention != "none"]
    if not shapes:
        raise ConfigError(f"{request.model} keeps no KV that a codec could code")
    tokens = min(request.tokens, SAMPLE_TOKENS)
    # fp8 KV is coded from the 16-bit numbers that it was rounded from.
    torch_dtype = getattr(torch, "bfloat16" if dtype == "fp8" else dtype)
    sizes, elements = [], tokens * sum(h * d + h2 * d2 for h, d, h2, d2 in shapes)
    for heavy_tails in (False, True):
        random = torch.Generator().manual_seed(0)
        drawn = [torch.randn(h, tokens, d, generator=random) for s in shapes for h, d in (s[:2], s[2:])]
        drawn = [(x * x.abs() if heavy_tails else x).to(torch_dtype) for x in drawn]
        ids = torch.randint(0, 1000, (tokens,), generator=random)
        sizes.append(len(codec.encode(KVChunk(ids, tuple(zip(drawn[::2], drawn[1::2], strict=True))))))
    return CodecSize(8 * sizes[0] / elements, "exact" if sizes[0] == sizes[1] else "gaussian")


def _by_kind(layers: Sequence[LayerKV], tokens: int, width: int) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for layer in layers:
        row = found.setdefault(
            layer.kind,
            {"layers": 0, "attention": layer.attention, "kv_heads": layer.shape[0],
             "head_dims": list(layer.shape[1::2]), "window_tokens": layer.window, "kv_bytes_per_token": 0,
             "kv_bytes": 0, "state_bytes": 0},
        )  # fmt: skip
        row["layers"] += 1
        row["kv_bytes_per_token"] += layer.elements_per_token * width
        row["kv_bytes"] += layer.elements_per_token * layer.kept_tokens(tokens) * width
        if layer.state is None or row["state_bytes"] is None:
            row["state_bytes"] = None
        else:
            row["state_bytes"] += layer.state * width
    return found


def _load_or_prefill(model: ModelKV, request: CalcRequest, kv_bytes: int, codec_bytes: int | None) -> dict[str, Any]:
    if request.prefill_tokens_per_s is not None:
        prefill = request.tokens / request.prefill_tokens_per_s
    else:
        flops = prefill_flops(model, request.tokens)
        prefill = None if flops is None else flops / (request.tflops * 1e12)
    stored = kv_bytes if codec_bytes is None else codec_bytes
    return {
        "prefill_ms": None if prefill is None else prefill * 1e3,
        "break_even_gbit_s": None if prefill is None else stored * 8 / prefill / 1e9,
        "links": [
            {
                "gbit_s": speed,
                "load_ms": stored * 8 / speed / 1e6,
                "raw_load_ms": kv_bytes * 8 / speed / 1e6,
                "speedup": None if prefill is None or not stored else prefill / (stored * 8 / speed / 1e9),
            }
            for speed in request.bandwidths_gbit_s
        ],
    }


def parse_size(text: str) -> int:
    """Bytes of "64GiB", "1.5TB" or "4096".

    >>> parse_size("64GiB"), parse_size("1.5TB"), parse_size("4096")
    (68719476736, 1500000000000, 4096)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ConfigError(f"{text!r} is no size; write e.g. 64GiB or 1.5TB")
    return int(float(match[1]) * UNITS[(match[2] or "").upper()])
