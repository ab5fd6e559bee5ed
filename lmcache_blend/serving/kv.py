"""vLLM's paged KV: where a block keeps its K and V, and the KVView of one request.

Writing goes through the attention implementation's own do_kv_cache_update. Reading needs to know the inside of a block,
which is the backend's own affair (on CPU the view's token axis is false: keys are kept transposed). So a few layouts
are tried on a block that was written by the backend itself, and the one that reads back the same numbers is taken.
Stored KV of float32 on CPU is written into these views, since keys can turn on the way there: half the time.

B tokens of a block, H KV heads of this rank, D head dim, T tokens of a prompt.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lmcache_blend.errors import UnsupportedModelError
from lmcache_blend.rotary import Angles
from lmcache_blend.triton_kernels.place import Pages, place

Views = tuple[Tensor, Tensor]
Layout = Callable[[Tensor, int, int, int], Views]


def _transposed_keys(kv: Tensor, b: int, h: int, d: int) -> Views:
    """[blocks, H, (D B | B D)]: CPU."""
    flat = kv.reshape(len(kv), h, 2 * b * d)
    k = flat[..., : b * d].unflatten(2, (d, b)).transpose(2, 3)
    return k, flat[..., b * d :].unflatten(2, (b, d))


def _halves(kv: Tensor, b: int, h: int, d: int) -> Views:
    """[blocks, H, (B D | B D)]."""
    flat = kv.reshape(len(kv), h, 2 * b * d)
    return flat[..., : b * d].unflatten(2, (b, d)), flat[..., b * d :].unflatten(2, (b, d))


def _head_major(kv: Tensor, b: int, h: int, d: int) -> Views:
    """[blocks, H, B, 2 D]."""
    return kv[..., :d], kv[..., d:]


def _token_major(kv: Tensor, b: int, h: int, d: int) -> Views:
    """[blocks, B, H, 2 D]."""
    return kv[..., :d].transpose(1, 2), kv[..., d:].transpose(1, 2)


def _pair_first(kv: Tensor, b: int, h: int, d: int) -> Views:
    """[2, blocks, B, H, D]: FlashAttention."""
    return kv[0].transpose(1, 2), kv[1].transpose(1, 2)


def _pair_first_heads(kv: Tensor, b: int, h: int, d: int) -> Views:
    """[2, blocks, H, B, D]."""
    return kv[0], kv[1]


def _pair_second(kv: Tensor, b: int, h: int, d: int) -> Views:
    """[blocks, 2, B, H, D]: FlashInfer, Triton."""
    return kv[:, 0].transpose(1, 2), kv[:, 1].transpose(1, 2)


def _pair_second_heads(kv: Tensor, b: int, h: int, d: int) -> Views:
    """[blocks, 2, H, B, D]."""
    return kv[:, 0], kv[:, 1]


LAYOUTS: tuple[Layout, ...] = (
    _transposed_keys, _halves, _head_major, _token_major, _pair_first, _pair_first_heads, _pair_second,
    _pair_second_heads,
)  # fmt: skip


class PagedLayer:
    """One attention layer's blocks. block: tokens of a block; k, v: views [blocks, H, B, D] of the cache itself."""

    def __init__(self, name: str, attention: Any, cache: Tensor, block: int, scratch: int):
        self.name, self.attention, self.cache, self.block = name, attention, cache, block
        self.heads, self.dim = attention.num_kv_heads, attention.head_size
        # The CPU's cache update takes any strides of tokens and heads, not of dims; GPUs' take rows of heads.
        self.strided = cache.device.type == "cpu"
        self.direct = self.strided and cache.dtype == torch.float32
        self.k, self.v = self._learn(scratch)

    def write(self, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """k, v [n, H, D] into slots [n] (block * B + offset)."""
        k, v = k.to(self.cache.dtype), v.to(self.cache.dtype)
        k, v = (x if self.strided and x.stride(2) == 1 else x.contiguous() for x in (k, v))
        self.attention.impl.do_kv_cache_update(self.attention, k, v, self.cache, slots)

    def read(self, blocks: Tensor, start: int, end: int) -> Views:
        """Copies of K, V [H, n, D] of positions start..end of the request that has these blocks."""
        first, last = start // self.block, -(-end // self.block)
        cut = slice(start - first * self.block, end - first * self.block)
        return tuple(x[blocks[first:last]].transpose(0, 1).flatten(1, 2)[:, cut] for x in (self.k, self.v))  # pyright: ignore

    def pages(self, blocks: Tensor, tokens: int) -> Views:
        """As read, of the first tokens, in whatever order of memory is copied fastest."""
        count, out = -(-tokens // self.block), []
        for x in (self.k, self.v):
            if x.stride(3) != 1:  # keys that are kept transposed stay so
                found = x.permute(1, 3, 0, 2).index_select(2, blocks[:count]).flatten(2).transpose(1, 2)
            else:
                found = x.index_select(0, blocks[:count]).transpose(0, 1).flatten(1, 2)
            out.append(found[:, :tokens])
        return out[0], out[1]

    def _learn(self, scratch: int) -> Views:
        """Write known numbers into a block that nobody uses, and find the layout that reads them back."""
        cache = self.cache
        if not hasattr(self.attention.impl, "do_kv_cache_update"):
            raise UnsupportedModelError(f"{type(self.attention.impl).__name__} has no do_kv_cache_update")
        shape = (self.block, self.heads, self.dim)
        generator = torch.Generator().manual_seed(1)
        # With strides as fill_with gives them, so that what does not read them well is found out here.
        k, v = (
            torch.randn(self.heads, self.block, self.dim, generator=generator).to(cache).transpose(0, 1) for _ in "kv"
        )
        self.write(torch.arange(self.block, device=cache.device) + scratch * self.block, k, v)
        try:
            for layout in LAYOUTS:
                try:
                    found = layout(cache, self.block, self.heads, self.dim)
                    seen = [x[scratch].transpose(0, 1) for x in found]
                except (RuntimeError, IndexError, ValueError):
                    continue
                if found[0].data_ptr() != found[1].data_ptr() and all(map(torch.equal, seen, (k, v))):
                    return found
        finally:
            zero = torch.zeros(shape, dtype=cache.dtype, device=cache.device)
            self.write(torch.arange(self.block, device=cache.device) + scratch * self.block, zero, zero)
        raise UnsupportedModelError(
            f"{self.name}: blocks of {type(self.attention.impl).__name__}, cache {list(cache.shape)} {cache.dtype}, "
            "have a layout that is not known here; use the attention backend's default layout and KV type"
        )


class PagedKV:
    """KVView of one request: positions 0..T-1 in its blocks. blocks: [n] int64 on the cache's device."""

    def __init__(self, layers: Sequence[PagedLayer], blocks: Tensor, length: int):
        self.layers, self.blocks, self.length = layers, blocks, length

    def slots(self, layer: int, positions: Tensor) -> Tensor:
        size = self.layers[layer].block
        at = positions.to(self.blocks.device)
        return self.blocks[at // size] * size + at % size

    def layer(self, layer: int) -> Views:
        """Copies of K, V [H, T, D]."""
        return self.layers[layer].read(self.blocks, 0, self.length)

    def read(self, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        if len(positions) and int(positions[-1] - positions[0]) + 1 == len(positions):
            k, v = self.layers[layer].read(self.blocks, int(positions[0]), int(positions[-1]) + 1)
        else:
            k, v = (x[:, positions] for x in self.layer(layer))
        return k[None], v[None]

    def write(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> None:
        self.layers[layer].write(self.slots(layer, positions), k[0].transpose(0, 1), v[0].transpose(0, 1))

    def pages(self, layer: int) -> tuple[Pages, Pages]:
        x = self.layers[layer]
        return Pages(x.k, self.blocks), Pages(x.v, self.blocks)

    def place(self, layer: int, start: int, k: Tensor, v: Tensor, angles: Angles | None) -> None:
        """Stored K, V [H, n, D] to positions from `start` on, turned by their angles, None where they are turned."""
        if self.layers[layer].direct:
            for slot, (target, x) in enumerate(zip(self.pages(layer), (k, v), strict=True)):
                place(target, x, start, *((None, None) if angles is None else angles.of(layer, slot)))
            return
        k, v = (k, v) if angles is None else angles.rotate(layer, k, v)
        positions = torch.arange(start, start + k.shape[1])
        self.write(layer, positions, *(x[None].to(self.blocks.device) for x in (k, v)))

    def fill_with(self, loader: Any) -> None:
        """Call loader(layer, k, v) for every layer on its pages, or on a dense staging pair [H, T, D] that is written
        afterwards.

        loader.positions: [n] int64, ascending, the positions that it fills; others are left as they are.
        """
        if all(layer.direct for layer in self.layers):
            for i in range(len(self.layers)):
                loader(i, *self.pages(i))
            return
        positions: Tensor = loader.positions
        breaks = [0, *((positions.diff() != 1).nonzero().flatten() + 1).tolist(), len(positions)]
        runs = [(int(positions[a]), int(positions[b - 1]) + 1) for a, b in pairwise(breaks) if b > a]
        slots: dict[int, Tensor] = {}
        staging: dict[tuple[int, int, int], Views] = {}
        for i, layer in enumerate(self.layers):
            shape = (layer.heads, self.length, layer.dim)
            if shape not in staging:
                like = layer.cache
                staging[shape] = tuple(torch.empty(shape, dtype=like.dtype, device=like.device) for _ in range(2))  # pyright: ignore
            k, v = staging[shape]
            loader(i, k, v)
            if layer.block not in slots:
                slots[layer.block] = self.slots(i, torch.arange(runs[-1][1] if runs else 0))
            for start, end in runs:
                layer.write(slots[layer.block][start:end], *(x[:, start:end].transpose(0, 1) for x in (k, v)))
