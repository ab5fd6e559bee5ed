"""DenseKV: the KV of one prompt in one tensor pair a layer, filled layer by layer and taken from a pool.

Fresh pages cost more than the numbers that go into them (on CPU, 7 times the placing itself), so buffers return to the
pool when the DenseKV that holds them is dropped, and `read` hands out copies, never views of a buffer.
"""

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Shapes = tuple[tuple[int, int, int, int], ...]  # per layer: (heads, dim) of the first and of the second tensor


class KVPool:
    """Free buffers by capacity. shapes: per layer (H, Dk, H', Dv); of the unused buffers the latest `keep` stay."""

    STEP = 256  # capacities are rounded up to this many tokens, so that prompts of similar length share buffers

    def __init__(self, shapes: Shapes, dtype: torch.dtype, device: torch.device, keep: int = 3):
        self.shapes, self.dtype, self.device, self.keep = shapes, dtype, device, keep
        self._free: list[tuple[int, list[tuple[Tensor, Tensor]]]] = []  # oldest first

    def take(self, tokens: int) -> tuple[int, list[tuple[Tensor, Tensor]]]:
        capacity = -(-tokens // self.STEP) * self.STEP
        for i in reversed(range(len(self._free))):
            if self._free[i][0] == capacity:
                return self._free.pop(i)
        new = {"dtype": self.dtype, "device": self.device}
        # Zeros, not empty: a masked key must be a finite number, since 0 times NaN is NaN.
        return capacity, [
            (torch.zeros(h, capacity, d, **new), torch.zeros(h2, capacity, d2, **new)) for h, d, h2, d2 in self.shapes
        ]

    def give(self, capacity: int, buffer: list[tuple[Tensor, Tensor]]) -> None:
        # The short buffers that chunks were encoded in must not crowd out the long one of the prompt.
        self._free.append((capacity, buffer))
        del self._free[: -self.keep]


class DenseKV:
    """KVView of one prompt: per layer K [H, capacity, Dk] and V [H, capacity, Dv], post-RoPE.

    length: tokens that stand in it. loader: called once per layer, with the layer's number and its (K, V), before the
    first use of that layer: the place where cached chunks are put in, and where layerwise loading waits.
    """

    def __init__(self, pool: KVPool, tokens: int, capacity: int):
        self.length, self._pool = tokens, pool
        self.capacity, self._layers = pool.take(max(tokens, capacity))
        self._loader: Callable[[int, Tensor, Tensor], None] | None = None
        self._loaded = [True] * len(self._layers)
        self._release = weakref.finalize(self, pool.give, self.capacity, self._layers)

    def fill_with(self, loader: Callable[[int, Tensor, Tensor], None]) -> None:
        self._loader, self._loaded = loader, [False] * len(self._layers)

    def extend(self, length: int) -> None:
        """Make it `length` tokens long, the new ones undefined until written; moves to larger buffers where needed."""
        if length > self.capacity:
            capacity, layers = self._pool.take(length)
            for i, new in enumerate(layers):
                for to, old in zip(new, self.layer(i), strict=True):
                    to[:, : self.length] = old[:, : self.length]
            self._release()
            self.capacity, self._layers = capacity, layers
            self._release = weakref.finalize(self, self._pool.give, capacity, layers)
        self.length = length

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """The layer's whole buffers [H, capacity, D], for the runner; they are reused once this object is gone."""
        k, v = self._layers[layer]
        if not self._loaded[layer] and self._loader is not None:
            self._loader(layer, k, v)
            self._loaded[layer] = True
        return k, v

    def read(self, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of K [1, H, n, Dk] and V [1, H, n, Dv] at positions [n]."""
        k, v = self.layer(layer)
        return k[None, :, positions], v[None, :, positions]

    def write(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k [1, H, n, Dk], v [1, H, n, Dv] at positions [n]."""
        for buffer, new in zip(self.layer(layer), (k, v), strict=True):
            buffer.index_copy_(1, positions, new[0].to(buffer.dtype))


def stacked(kvs: Sequence[DenseKV], layer: int, length: int) -> tuple[Tensor, Tensor]:
    """K and V [B, H, length, D] of B prompts: a view for one prompt, a copy for several (short ones end in zeros)."""
    if len(kvs) == 1:
        k, v = kvs[0].layer(layer)
        return k[None, :, :length], v[None, :, :length]
    pairs = []
    for slot in (0, 1):
        first = kvs[0].layer(layer)[slot]
        out = first.new_zeros(len(kvs), first.shape[0], length, first.shape[2])
        for b, kv in enumerate(kvs):
            out[b, :, : kv.length] = kv.layer(layer)[slot][:, : kv.length]
        pairs.append(out)
    return pairs[0], pairs[1]
