"""Conformance suites: what every implementation of an interface promises, as tests that third parties subclass.

Nothing here imports pytest; any runner that calls `test_*` methods will do.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmcache_blend.codecs import Codec, PipelineCodec, get_codec
from lmcache_blend.codecs.container import FREE_ELEMENTS, MAX_ELEMENTS_PER_BYTE, Container, Header, Shape, pack
from lmcache_blend.errors import ConfigError, CorruptChunkError
from lmcache_blend.tier_conformance import TierConformance
from lmcache_blend.types import KVChunk

__all__ = ["CodecConformance", "TierConformance", "matrix", "noise"]

Shapes = tuple[Shape, ...]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES: tuple[Shapes, ...] = (
    ((2, 64, 2, 64),) * 3,
    ((1, 80, 1, 80),) * 2,
    ((3, 4, 3, 6), (1, 8, 1, 8)),
    ((1, 64, 2, 16),) * 2,
    ((1, 48, 0, 0),) * 2,
)
"""Per layer (H, Dk, H', Dv): plain heads, one head, layers that differ, MLA, a layer whose second tensor is empty."""


class CodecConformance:
    """What every codec promises: round trip, bounded error, and CorruptChunkError for bytes that are not its own.

    The attributes say what the codec claims; `codec` gives the object, an id, a config, or a list of these. `chunk`
    may be overridden where a codec needs data of a certain kind, `shapes` where it takes no others (a profile).

    A whole use, in a file that pytest collects:

        from lmcache_blend.testing import CodecConformance

        class TestMine(CodecConformance):
            max_relative_error = 0.05

            def codec(self):
                return {"id": "mine", "step": 0.1}
    """

    lossless: bool = False
    """Decoding gives the same bits."""
    max_relative_error: float = 0.0
    """Most that the root mean square of the error may be, over that of the input, for K and for V; unless lossless."""
    shapes: Sequence[Shapes] = SHAPES
    """Chunks to code; the first one is used where one is enough."""
    tokens: Sequence[int] = (1, 2, 5, 37, 256)
    dtypes: Sequence[torch.dtype] = DTYPES
    golden: Path | None = None
    """A file with `golden_chunk` as bytes, made by `write_golden`; beside it, as .npy, what it decodes to."""
    stable_bytes: bool = True
    """Encoding gives the golden bytes, not only bytes that decode; no where a library's compressor may change."""

    def codec(self) -> Any:
        """A codec, the id or config of one, or a list of these."""
        raise NotImplementedError("override codec() with the codec to test")

    def chunk(self, shapes: Shapes, tokens: int, dtype: torch.dtype, seed: int = 0) -> KVChunk:
        """Made of integers, so that it is the same everywhere: channels of four scales, some with an offset."""
        ids = torch.from_numpy(noise(tokens, seed).astype(np.int64) % 50_000)
        layers = []
        for i, (h, d, h2, d2) in enumerate(shapes):
            pair = (matrix(h, tokens, d, 2 * i + 99 * seed + 1), matrix(h2, tokens, d2, 2 * i + 99 * seed + 2))
            layers.append(tuple(torch.from_numpy(x).to(dtype) for x in pair))
        return KVChunk(ids, tuple(layers), bytes(range(seed, seed + 32)))

    def golden_chunk(self) -> KVChunk:
        """7 tokens, 2 layers, 2 heads, dim 4; small enough that the file is under 2 KB."""
        return self.chunk(((2, 4, 2, 4),) * 2, 7, torch.float32)

    # Round trip

    def test_tokens_types_and_shapes_come_back(self) -> None:
        for codec, chunk, case in self._cases():
            out = codec.decode(codec.encode(chunk))
            assert torch.equal(out.tokens, chunk.tokens), f"{case}: token ids differ"
            assert out.tokens.dtype == torch.int64, f"{case}: token ids are {out.tokens.dtype}"
            assert kinds(out) == kinds(chunk), f"{case}: {kinds(out)} is not {kinds(chunk)}"

    def test_the_digest_of_what_stood_before_comes_back(self) -> None:
        for codec in self._codecs():
            for digest in (bytes(range(32)), b"", None):
                chunk = replace(self.chunk(self.shapes[0], 5, self.dtypes[0]), exact_after=digest)
                out = codec.decode(codec.encode(chunk))
                assert out.exact_after == digest, f"{codec!r}: exact_after is {out.exact_after!r}, not {digest!r}"

    def test_error_is_bounded(self) -> None:
        for codec, chunk, case in self._cases():
            self._check_error(chunk, codec.decode(codec.encode(chunk)), case)

    def test_zeros(self) -> None:
        """Channels of zeros, and a chunk of nothing else."""
        for codec, chunk, case in self._cases(self.tokens[-1:]):
            for which in (slice(0, 2), slice(None)):
                mine = altered(chunk, lambda x, which=which: x[:, :, which].zero_())
                out = codec.decode(codec.encode(mine))
                self._check_error(mine, out, f"{case}, zeros in {which}", unit=rms(chunk))

    def test_an_outlier_channel_leaves_the_others_finite(self) -> None:
        for codec, chunk, case in self._cases(self.tokens[-1:]):
            mine = altered(chunk, lambda x: x[:1, :, :1].mul_(1000))
            out = codec.decode(codec.encode(mine))
            for i, x in tensors(out):
                assert x.isfinite().all(), f"{case}: one channel x 1,000 makes layer {i} not finite"

    def test_nan_and_infinities_come_back(self) -> None:
        """Exactly, in their places, and none besides; or ConfigError that names the layer."""
        for codec, chunk, case in self._cases(self.tokens[-1:]):
            last = len(chunk.layers) - 1
            for value in (float("nan"), float("inf"), -float("inf")):
                special = chunk.layers[last][0].clone()
                special[0, -1, :2] = value
                mine = replace(chunk, layers=(*chunk.layers[:-1], (special, chunk.layers[last][1])))
                try:
                    out = codec.decode(codec.encode(mine))
                except ConfigError as error:
                    if f"layer {last}" in str(error):
                        continue
                    raise AssertionError(f"{case}: {error} does not name layer {last}") from error
                for (i, a), (_, b) in zip(tensors(mine), tensors(out), strict=True):
                    same = torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf() * a.sign(), b.isinf() * b.sign())
                    assert same, f"{case}: {value} in layer {last} comes back changed in layer {i}"
                    assert not self.lossless or torch.equal(bits(a), bits(b)), f"{case}: layer {i} has other bits"

    # Purity

    def test_threads_do_not_change_the_result(self) -> None:
        before = torch.get_num_threads()
        for codec, chunk, case in self._cases(self.tokens[-1:]):
            try:
                seen = []
                for threads in (1, 2, 3, 1):
                    torch.set_num_threads(threads)
                    seen.append((data := codec.encode(chunk), codec.decode(data)))
            finally:
                torch.set_num_threads(before)
            for data, out in seen[1:]:
                assert data == seen[0][0], f"{case}: encoding depends on the number of threads, or on chance"
                assert same_bits(out, seen[0][1]), f"{case}: decoding depends on the number of threads, or on chance"

    def test_one_codec_serves_many_threads(self) -> None:
        for codec, chunk, case in self._cases(self.tokens[-2:-1]):
            chunks = [self.chunk(chunk.shapes, len(chunk), chunk.layers[0][0].dtype, seed) for seed in range(4)]
            alone = [codec.encode(c) for c in chunks]
            with ThreadPoolExecutor(4) as pool:
                together = list(pool.map(codec.encode, chunks * 2))
                decoded = list(pool.map(codec.decode, alone * 2))
            assert together == alone * 2, f"{case}: threads disturb each other's encoding"
            for out, data in zip(decoded, alone * 2, strict=True):
                assert same_bits(out, codec.decode(data)), f"{case}: threads disturb each other's decoding"

    def test_encode_takes_views_and_does_not_change_them(self) -> None:
        for codec, chunk, case in self._cases(self.tokens[-2:-1]):
            views = tuple(
                tuple(x.permute(1, 2, 0).contiguous().permute(2, 0, 1) for x in pair) for pair in chunk.layers
            )
            mine = replace(chunk, layers=views)  # type: ignore[arg-type]
            assert codec.encode(mine) == codec.encode(chunk), f"{case}: strides change the bytes"
            assert same_bits(mine, chunk), f"{case}: encode changes its input"

    def test_config_round_trips_through_json(self) -> None:
        for codec in self._codecs():
            again = get_codec(json.loads(json.dumps(codec.get_config())))
            assert again.get_config() == codec.get_config(), f"{codec!r} is not rebuilt from its config"
            chunk = self.chunk(self.shapes[0], 5, self.dtypes[0])
            assert again.encode(chunk) == codec.encode(chunk), f"{codec!r}: its rebuilt copy codes otherwise"

    def test_layers_of_one_segment_alone(self) -> None:
        for codec, chunk, case in self._cases(self.tokens[-2:-1]):
            if not isinstance(codec, PipelineCodec):
                continue
            data, alone = codec.encode(chunk), []
            for group in range(len(Container(data).header.groups)):
                alone += codec.decode_layers(data, group)
            assert same_bits(replace(chunk, layers=tuple(alone)), codec.decode(data)), f"{case}: segments differ"

    # Trust

    def test_damage_is_found(self) -> None:
        for codec, chunk, case in self._cases(self.tokens[2:3]):
            data = codec.encode(chunk)
            for at in range(0, len(data), max(1, len(data) // 150)):
                bad = bytearray(data)
                bad[at] ^= 1 << at % 8
                raises(CorruptChunkError, codec.decode, bytes(bad), f"{case}: bit flipped in byte {at}")
            for size in (*range(0, len(data), max(1, len(data) // 50)), len(data) - 1):
                raises(CorruptChunkError, codec.decode, data[:size], f"{case}: cut to {size} of {len(data)} bytes")
            for more in (b"\0", b"\0" * 4096, b"x", data):
                raises(CorruptChunkError, codec.decode, data + more, f"{case}: {len(more)} bytes appended")

    def test_other_codecs_chunks_are_refused(self) -> None:
        for codec, chunk, case in self._cases(self.tokens[2:3]):
            data = codec.encode(chunk)
            count = len(chunk.layers)
            types = tuple(("float32", "float32") for _ in range(count))
            header, segments = Header({"id": "another"}, len(chunk), chunk.shapes, types, (count,)), [b""]
            if data.startswith(b"LMCB\1"):
                mine = Container(data)
                header = replace(mine.header, codec={**mine.header.codec, "id": "another"})
                segments = [bytes(mine.segment(1 + i)) for i in range(len(mine.header.groups))]
                other = pack(replace(mine.header, profile="0" * 64), chunk.tokens, segments)
                raises(CorruptChunkError, codec.decode, other, f"{case}: another profile")
            raises(CorruptChunkError, codec.decode, pack(header, chunk.tokens, segments), f"{case}: codec 'another'")
            if codec.get_config()["id"] != "raw":
                raises(CorruptChunkError, codec.decode, get_codec("raw").encode(chunk), f"{case}: a raw chunk")

    def test_size_bounds_what_decoding_allocates(self) -> None:
        """However well a chunk compresses, its bytes stand in proportion to its elements (container's padding rule)."""
        for codec in self._codecs():
            each = max(1, sum(h * d + h2 * d2 for h, d, h2, d2 in self.shapes[0]))
            tokens = 2 * FREE_ELEMENTS // each + 1
            layers = tuple((torch.zeros(h, tokens, d), torch.zeros(h2, tokens, d2)) for h, d, h2, d2 in self.shapes[0])
            data = codec.encode(KVChunk(torch.zeros(tokens, dtype=torch.long), layers))
            assert each * tokens <= MAX_ELEMENTS_PER_BYTE * len(data) + FREE_ELEMENTS, f"{codec!r}: {len(data)} bytes"
            assert len(codec.decode(data)) == tokens

    # Format

    def test_golden_bytes_decode_to_frozen_values(self) -> None:
        if self.golden is not None:
            codec, chunk = self._codecs()[0], self.golden_chunk()
            out, wanted = codec.decode(self.golden.read_bytes()), np.load(self.golden.with_suffix(".npy"))
            assert torch.equal(out.tokens, chunk.tokens), f"{self.golden}: token ids differ"
            assert kinds(out) == kinds(chunk), f"{self.golden}: {kinds(out)} is not {kinds(chunk)}"
            np.testing.assert_allclose(flat(out), wanted, 0 if self.lossless else 1e-5, 0 if self.lossless else 1e-6)

    def test_encoding_gives_the_golden_bytes(self) -> None:
        if self.golden is not None and self.stable_bytes:
            assert self._codecs()[0].encode(self.golden_chunk()) == self.golden.read_bytes(), (
                f"{self.golden.name} is no longer what this codec writes: give the format another version"
            )

    def write_golden(self) -> bool:
        """Write the golden file where it is missing; an old one is never overwritten. True where it was written."""
        if self.golden is None or self.golden.exists():
            return False
        codec = self._codecs()[0]
        self.golden.write_bytes(data := codec.encode(self.golden_chunk()))
        np.save(self.golden.with_suffix(".npy"), flat(codec.decode(data)))
        return True

    def _codecs(self) -> list[Codec]:
        given = self.codec()
        return [
            get_codec(c) if isinstance(c, str | dict) else c for c in (given if isinstance(given, list) else [given])
        ]

    def _cases(self, tokens: Sequence[int] | None = None) -> Iterator[tuple[Codec, KVChunk, str]]:
        """Every codec with every shape; the types take turns, and without `tokens` all lengths and types come up."""
        for codec in self._codecs():
            for i, shapes in enumerate(self.shapes):
                for j, n in enumerate(self.tokens if tokens is None else tokens):
                    dtypes = self.dtypes if tokens is None and i == 0 else [self.dtypes[(i + j) % len(self.dtypes)]]
                    for dtype in dtypes:
                        case = f"{codec.get_config()}, T = {n}, {dtype}, {shapes[0]} x {len(shapes)}"
                        yield codec, self.chunk(shapes, n, dtype), case

    def _check_error(self, chunk: KVChunk, out: KVChunk, case: str, unit: float | None = None) -> None:
        if self.lossless:
            assert same_bits(chunk, out), f"{case}: not lossless"
        for slot, name in enumerate("KV"):
            a, b = flat(chunk, slot), flat(out, slot)
            error = float(np.sqrt(np.mean((a - b) ** 2))) if a.size else 0.0
            scale = unit or float(np.sqrt(np.mean(a**2))) if a.size else 1.0
            limit = self.max_relative_error * scale
            assert error <= limit, f"{case}: error of {name} is {error:.3g}, limit {limit:.3g}"


def noise(count: int, seed: int) -> np.ndarray:
    """[count] uint64, the SplitMix64 sequence of a seed (Steele et al., OOPSLA 2014): the same on every machine."""
    with np.errstate(over="ignore"):
        x = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(seed << 32)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def matrix(heads: int, tokens: int, dim: int, seed: int) -> np.ndarray:
    """[H, T, D] float32 multiples of 1/64, near normal; channels take turns in scale and offset."""
    x = noise(heads * tokens * dim, seed)
    total = sum(((x >> np.uint64(16 * k)) & np.uint64(0x7F)).astype(np.int64) for k in range(4)) - 254
    channel = np.arange(dim)
    scaled = total.reshape(heads, tokens, dim) * np.array([1, 2, 4, 1])[channel % 4]  # type: ignore[union-attr]
    return ((scaled + np.array([0, 0, -100, 300, 0])[channel % 5]) / 64).astype(np.float32)


def tensors(chunk: KVChunk) -> list[tuple[int, Tensor]]:
    """(layer, tensor) of all K and V."""
    return [(i, x) for i, pair in enumerate(chunk.layers) for x in pair]


def flat(chunk: KVChunk, slot: int | None = None) -> np.ndarray:
    """All values in one float64 row; slot 0 or 1: of K or V alone."""
    parts = [x.double().flatten() for pair in chunk.layers for x in (pair if slot is None else pair[slot : slot + 1])]
    return torch.cat(parts).numpy() if parts else np.zeros(0)


def rms(chunk: KVChunk) -> float:
    return float(np.sqrt(np.mean(flat(chunk) ** 2)))


def bits(x: Tensor) -> Tensor:
    return x.contiguous().flatten().view(torch.uint8)


def same_bits(a: KVChunk, b: KVChunk) -> bool:
    """Whether two chunks hold the same K and V, NaN included."""
    return kinds(a) == kinds(b) and all(
        torch.equal(bits(x), bits(y)) for (_, x), (_, y) in zip(tensors(a), tensors(b), strict=True)
    )


def kinds(chunk: KVChunk) -> list[tuple[torch.dtype, tuple[int, ...]]]:
    """Type and shape of every tensor."""
    return [(x.dtype, tuple(x.shape)) for _, x in tensors(chunk)]


def altered(chunk: KVChunk, change: Callable[[Tensor], Any]) -> KVChunk:
    """A copy whose tensors went through an in-place change."""
    layers = tuple((k.clone(), v.clone()) for k, v in chunk.layers)
    for pair in layers:
        for x in pair:
            change(x)
    return replace(chunk, layers=layers)


def raises(error: type[Exception], call: Callable[[Any], Any], argument: Any, case: str) -> None:
    """AssertionError unless the call raises exactly this kind of error."""
    try:
        call(argument)
    except error:
        return
    except Exception as other:
        raise AssertionError(f"{case}: {type(other).__name__} ({other}) instead of {error.__name__}") from other
    raise AssertionError(f"{case}: no {error.__name__}")
