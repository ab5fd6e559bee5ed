"""How chosen rows attend to the paged KV of one request: by vLLM's backend, by this package's kernel, or as a matrix.

On CUDA and ROCm the recomputed rows of a layer go through `selective_attention` over the blocks themselves, with their
true positions: one launch, whatever the runs of rows are. On CPU, float32 is copied out of the blocks and goes through
`row_attention`, which takes half as long as vLLM's kernel where rows are scattered. What neither knows stays
with the backend of vLLM (`unknown`, `kernel_fits`). Probes take the same operators where they run on a GPU, so that no
dense copy of K is made there.

The choice and the operators' CPU path are tested in a real vLLM on CPU; the kernels themselves were validated apart
from vLLM, and the two together have not been run on a GPU.
"""

from typing import Any

import torch
from torch import Tensor

from lmcache_blend.serving.kv import PagedKV, PagedLayer
from lmcache_blend.triton_kernels.attention import (
    attention_mass,
    row_attention,
    row_attention_mass,
    selective_attention,
    selective_attention_lse,
)

DEVICES = frozenset({"cuda"})
"""Device types whose recomputed rows go through the kernel; torch calls ROCm's cuda too. Tests add "cpu"."""
MASK_NUMBERS = 1 << 24
"""Of a mask, rows times keys, at most; longer ones stay with the backend."""
HEAD_DIMS = range(16, 257, 8)
"""Head sizes whose tiles the kernel is compiled for."""


def window_of(impl: Any) -> int | None:
    """How many keys a row of an attention implementation sees, itself among them; None if all."""
    window = getattr(impl, "sliding_window", None)
    # (left, right) of FlashAttention counts the keys before a row, CPU attention the row as well.
    reach = window[0] + 1 if isinstance(window, tuple) else window
    return reach if reach and reach > 0 else None


def unknown(attention: Any) -> str:
    """What an attention layer does beside a causal mask, a window, a scale and a soft cap; "" if nothing."""
    for name in ("alibi_slopes", "sinks"):
        if getattr(attention.impl, name, None) is not None:
            return name
    if type(attention).__name__ != "Attention":
        return type(attention).__name__  # such as ChunkedLocalAttention, whose mask is its own
    return "" if attention.attn_type == "decoder" else "no decoder's mask"


def kernel_fits(device: str, dim: int, rows_in_memory: bool, extra: str) -> bool:
    """Whether recomputed rows go through the kernel.

    device: torch's device type. dim: head size. rows_in_memory: numbers of a token's K and V lie side by side in the
    cache (the kernel would copy the cache otherwise; its CPU path reads any layout). extra: what `unknown` found.
    """
    return device in DEVICES and dim in HEAD_DIMS and (rows_in_memory or device == "cpu") and not extra


class PagedAttention:
    """Attention of one layer over paged KV. by_kernel: whether its recomputed rows go through the kernel; dense:
    whether its keys are copied out of their blocks."""

    def __init__(self, layer: PagedLayer):
        impl = layer.attention.impl
        self.layer, self.extra = layer, unknown(layer.attention)
        self.scale, self.window = float(impl.scale), window_of(impl)
        self.soft_cap: float | None = getattr(impl, "logits_soft_cap", None) or None
        near = layer.k.stride(3) == layer.v.stride(3) == 1
        self.by_kernel = kernel_fits(layer.cache.device.type, layer.dim, near, self.extra)
        self.dense = layer.direct and self.soft_cap is None and not self.extra and not self.by_kernel
        self.options: dict[str, Any] = {
            "scale": self.scale, "window": self.window, "soft_cap": self.soft_cap, "layout": "HND"
        }  # fmt: skip

    def takes(self, rows: int, keys: int) -> bool:
        """Whether so many rows of a prompt are computed here, not by the backend."""
        return self.by_kernel or (self.dense and rows * keys <= MASK_NUMBERS)

    def rows(self, q: Tensor, kv: PagedKV, rows: "Rows") -> Tensor:
        """Attention [N, Hq, D] of q [N, Hq, D] over the request's KV, which holds theirs already."""
        x, query = self.layer, q.transpose(0, 1)[None]
        if self.dense:
            keys = rows.last[-1] + 1
            k, v = x.pages(kv.blocks, keys)
            mask = rows.visible(self.window, keys, query.dtype)
            out = row_attention(query, k.contiguous()[None], v[None], mask, rows.last, self.scale)
        else:
            table = kv.blocks[None].int()
            out = selective_attention(query, x.k, x.v, rows.positions[None], table, **self.options)
        return out[0].transpose(0, 1)

    def probe(self, q: Tensor, kv: PagedKV, probed: "Rows") -> tuple[Tensor, Tensor, Tensor]:
        """Attention [N, Hq, D] of the probed rows' q [N, Hq, D]; what each token gets [Hq, T] float32, mean over the
        rows; and values [H, T, D]."""
        x, query, keys = self.layer, q.transpose(0, 1)[None], kv.length
        if self.soft_cap is None and x.cache.device.type == "cpu" and not self.by_kernel:
            k, v = x.pages(kv.blocks, keys)
            mask = probed.visible(self.window, keys, query.dtype)
            out, mass = row_attention_mass(query.contiguous(), k[None], v[None], mask, probed.last, self.scale)
            return out[0].transpose(0, 1), mass[0], v
        table = kv.blocks[: -(-keys // x.block)][None].int()
        mask = probed.shown(table.shape[1] * x.block, query.dtype)
        where = probed.positions[None]
        out, lse = selective_attention_lse(query, x.k, x.v, where, table, mask=mask, **self.options)
        mass = attention_mass(query, x.k, where, lse, keys, table, mask=mask, **self.options)
        return out[0].transpose(0, 1), mass[0], x.pages(kv.blocks, keys)[1]


class Rows:
    """Rows at positions [N], ascending, which do not see hidden [T] bool; additive masks, made once for all layers."""

    def __init__(self, positions: Tensor, hidden: Tensor | None = None):
        self.positions, self.hidden, self.last = positions, hidden, positions.tolist()
        self._masks: dict[tuple, Tensor] = {}

    def visible(self, window: int | None, keys: int, dtype: torch.dtype) -> Tensor:
        """[1, 1, N, T]: the causal mask, the window and what is hidden."""
        if ("causal", window, dtype) not in self._masks:
            columns, rows = torch.arange(keys, device=self.positions.device), self.positions[:, None]
            seen = columns <= rows if window is None else (columns <= rows) & (columns > rows - window)
            seen = seen if self.hidden is None else seen & ~self.hidden
            self._masks["causal", window, dtype] = _additive(seen, dtype)[None, None]
        return self._masks["causal", window, dtype]

    def shown(self, keys: int, dtype: torch.dtype) -> Tensor | None:
        """[1, 1, N, keys]: only what is hidden, for operators that know positions."""
        if self.hidden is None:
            return None
        if ("hidden", keys, dtype) not in self._masks:
            seen = self.hidden.new_ones(keys)
            seen[: len(self.hidden)] = ~self.hidden
            self._masks["hidden", keys, dtype] = _additive(seen, dtype).repeat(len(self.positions), 1)[None, None]
        return self._masks["hidden", keys, dtype]


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)
