"""The four public points at which a transformers model's own forward is run on chosen rows only.

1. a Cache whose layers scatter the fresh rows into the full K and V and hand back all of it;
2. AttentionMaskInterface: the model's own mask function (sliding, chunked, no-RoPE layers), evaluated at the true rows;
3. AttentionInterface: attention over rows, and the tap for query probes;
4. a forward pre-hook on decoder layers that drops rows in the middle of the forward (HKVD).

No layer is re-implemented. The forward under way is a ContextVar, so outside HFRunner.forward the model is untouched.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import causal_mask_function

from lmcache_blend.blend.runner import Chooser, Observer, Tap
from lmcache_blend.hf.dense import DenseKV, stacked
from lmcache_blend.triton_kernels.attention import row_attention, row_attention_mass

NAME = "lmcache_blend"
CURRENT: ContextVar["Forward | None"] = ContextVar("lmcache_blend_forward", default=None)

# Attention arguments that row_attention need not know; any other one that is set goes to the model's own eager code.
_HARMLESS = {"dropout", "scaling", "sliding_window", "is_causal", "position_ids", "cache_position", "use_cache",
             "output_attentions", "output_hidden_states", "position_embeddings", "past_key_values",
             "cache"}  # fmt: skip


class Stop(Exception):
    """Ends a forward or a layer early; never leaves HFRunner."""


class Forward:
    """State of one forward over rows [B, N] of B prompts. Rows ascend; short lists repeat their last row.

    hidden: positions [T] bool that no row may see, or None. checks: layer -> Chooser. rows_of[i]: rows of layer i.
    """

    def __init__(self, kvs: Sequence[DenseKV], rows: Tensor, layers: int):
        self.kvs, self.length = kvs, max(kv.length for kv in kvs)
        self.checks: dict[int, Chooser] = {}
        self.tap: Tap | None = None
        self.observer: Observer | None = None
        self.hidden: Tensor | None = None
        self.stop_at: int | None = None
        self.check: int | None = None
        self.fresh: tuple[Tensor, Tensor] | None = None
        self.kept: Tensor | None = None
        self.pending: Tensor | None = None
        self.first_rows = rows
        self.rows_of: list[Tensor] = [rows] * layers
        self.attended: dict[int, tuple[int, int, int, int | None]] = {}
        self.embeddings: list[Any] | None = None
        self._sliced: dict[int, tuple[Any, Any]] = {}
        self._set_rows(rows)

    def _set_rows(self, rows: Tensor) -> None:
        self.rows = rows
        self.last = rows.max(0).values.tolist()
        self.full = rows.shape[1] == self.length and all(kv.length == self.length for kv in self.kvs)
        self._causal: Tensor | None = None

    def drop(self, layer: int, keep: Tensor) -> None:
        self.kept = keep if self.kept is None else self.kept.gather(1, keep)
        self.pending = keep
        self._sliced.clear()
        self._set_rows(self.rows.gather(1, keep))
        self.rows_of[layer:] = [self.rows] * (len(self.rows_of) - layer)

    def causal_mask(self, dtype: torch.dtype) -> Tensor:
        if self._causal is None:
            self._causal = self.mask(self.rows, causal_mask_function, dtype)
        return self._causal

    def mask(self, rows: Tensor, function: Callable, dtype: torch.dtype) -> Tensor:
        """[B, 1, N, T] additive: `function` of (batch, head, query position, key position) at the true rows."""
        device = rows.device
        batch = torch.arange(len(rows), device=device).view(-1, 1, 1, 1)
        head = torch.zeros(1, 1, 1, 1, dtype=torch.long, device=device)
        keys = torch.arange(self.length, device=device)
        seen = function(batch, head, rows[:, None, :, None], keys.view(1, 1, 1, -1))
        if self.hidden is not None:
            seen = seen & ~self.hidden[: self.length]
        out = torch.zeros(len(rows), 1, rows.shape[1], self.length, dtype=dtype, device=device)
        return out.masked_fill_(~seen, torch.finfo(dtype).min)

    # -- point 1
    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.check == layer:
            self.fresh = (k, v)
            raise Stop
        for b, kv in enumerate(self.kvs):
            rows, buffers = self.rows[b], kv.layer(layer)
            if self.observer is not None:
                self.observer(layer, b, rows, k[b], v[b], *buffers)
            for buffer, new in zip(buffers, (k[b], v[b]), strict=True):
                if self.full:
                    buffer[:, : self.length].copy_(new)
                else:
                    buffer.index_copy_(1, rows, new.to(buffer.dtype))
        return stacked(self.kvs, layer, self.length)

    # -- point 4
    def before_layer(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if self.embeddings is not None:
            self.embeddings.append((args[1:], kwargs))
        if layer in self.checks:
            part, named = self._of_rows(args, kwargs)
            self.check = layer
            with suppress(Stop):  # raised by update(), once this layer's fresh K and V are known
                module.forward(*part, **named)
            self.check = None
            assert self.fresh is not None
            self.drop(layer, self.checks[layer](layer, self.rows, *self.fresh))
            self.fresh = None
        return self._of_rows(args, kwargs)

    def _of_rows(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """The arguments of a decoder layer, cut to the rows that are left; hidden states are cut already, but once."""
        if self.kept is None:
            return args, kwargs
        hidden = args[0] if args else kwargs["hidden_states"]
        if self.pending is not None:
            hidden, self.pending = take(hidden, self.pending, hidden.shape[1]), None
        named = {key: self._slice(x) for key, x in kwargs.items() if key != "hidden_states"}
        return (hidden, *(self._slice(x) for x in args[1:])), named

    def _slice(self, x: Any) -> Any:
        if not isinstance(x, (Tensor, tuple, list)):
            return x
        if id(x) not in self._sliced:  # one mask serves many layers: cut it once (the original is kept alive beside it)
            assert self.kept is not None
            self._sliced[id(x)] = (x, take(x, self.kept, self.first_rows.shape[1]))
        return self._sliced[id(x)][1]


def take(x: Any, keep: Tensor, n: int) -> Any:
    """Pick rows keep [B, M] of whatever a decoder layer is given: the axis of length n, third of four, else second."""
    if isinstance(x, (tuple, list)):
        return type(x)(take(y, keep, n) for y in x)
    if not isinstance(x, Tensor) or x.dim() == 0:
        return x
    axis = 2 if x.dim() == 4 and x.shape[2] == n else min(1, x.dim() - 1)
    if x.shape[axis] != n:
        return x
    if len(keep) == 1 or x.dim() == 1:
        return x.index_select(axis, keep[0])
    x = x.expand(len(keep), *x.shape[1:])
    index = keep.view(len(keep), *(keep.shape[1] if a == axis else 1 for a in range(1, x.dim())))
    return x.gather(
        axis, index.expand(len(keep), *(keep.shape[1] if a == axis else x.shape[a] for a in range(1, x.dim())))
    )


class RowLayer(DynamicLayer):
    def __init__(self, forward: Forward, layer: int):
        super().__init__()
        self.forward, self.layer, self.is_initialized = forward, layer, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.forward.update(self.layer, key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.forward.length, 0

    def get_seq_length(self) -> int:
        return 0


class RowCache(Cache):
    def __init__(self, forward: Forward, layers: int):
        super().__init__(layers=[RowLayer(forward, i) for i in range(layers)])


def row_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable,
    dtype: torch.dtype = torch.float32,
    **kwargs: Any,
) -> Tensor | None:
    """Point 2. None stands for plain causal, so that a full prefill needs no mask in memory."""
    forward = CURRENT.get()
    assert forward is not None
    if mask_function is causal_mask_function and forward.full and forward.hidden is None:
        return None
    return forward.mask(forward.first_rows, mask_function, dtype)


def rows_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Point 3: q [B, Hq, N, D], k, v [B, H, T, D] -> [B, N, Hq, Dv]."""
    forward = CURRENT.get()
    assert forward is not None
    layer: int = module.layer_idx  # type: ignore[assignment]
    forward.attended[layer] = (q.shape[1], q.shape[3], v.shape[3], kwargs.get("sliding_window"))
    special = any(x is not None and key not in _HARMLESS for key, x in kwargs.items())
    if attention_mask is None and not (forward.full and not special and forward.tap is None):
        attention_mask = forward.causal_mask(q.dtype)
    mass = None
    if special:  # softcap, sinks, biases: the model's own formula
        eager = sys.modules[type(module).__module__].eager_attention_forward
        out, weights = eager(module, q, k, v, attention_mask, scaling=scaling, **{**kwargs, "dropout": 0.0})
        if forward.tap is not None and weights is not None:
            mass = weights[..., : k.shape[2]].float().mean(2)
    elif forward.tap is not None:
        assert attention_mask is not None
        out, mass = row_attention_mass(q, k, v, attention_mask, forward.last, scaling)
        out = out.transpose(1, 2)
    else:
        if attention_mask is None:
            gqa = q.shape[1] != k.shape[1]
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=gqa)
        else:
            out = row_attention(q, k, v, attention_mask, forward.last, scaling)
        out = out.transpose(1, 2).contiguous()
    if forward.tap is not None and mass is not None:
        forward.tap(layer, mass, v)
        if forward.stop_at == layer:
            raise Stop
    return out, None


AttentionInterface.register(NAME, rows_attention)
AttentionMaskInterface.register(NAME, row_mask)
