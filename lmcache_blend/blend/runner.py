"""The seam between blending and a host engine: what the Blender asks of a model.

One adapter runs Hugging Face models (lmcache_blend.hf); the words and shapes here name nothing of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lmcache_blend.rotary import RotaryTable

Chooser = Callable[[int, Tensor, Tensor, Tensor], Tensor]
Tap = Callable[[int, Tensor, Tensor], None]
Observer = Callable[[int, int, Tensor, Tensor, Tensor, Tensor, Tensor], None]


@dataclass
class Plan:
    """Rows per layer, shrinking: the rows that start, and where in the middle of the forward some are dropped.

    rows: per prompt [N] int64, ascending. checks: layer -> chooser(layer, rows [B, N], fresh k, v [B, H, N, D]) ->
    ascending indices [B, M] of the rows that go on. hidden: [T] bool, positions that no row may see (a probe leaves
    out text that has no KV yet). tap: sees (layer, attention that each token gets [B, Hq, T], mean over the rows,
    values [B, H, T, Dv]); with stop_at, the forward ends after that layer's attention and gives no logits. observer:
    sees (layer, b, rows [N] of prompt b, fresh k, v [H, N, D], K, V buffers [H, capacity, D]) before each write.
    """

    rows: Sequence[Tensor]
    checks: dict[int, Chooser] = field(default_factory=dict)
    hidden: Tensor | None = None
    tap: Tap | None = None
    observer: Observer | None = None
    stop_at: int | None = None


@dataclass
class Computed:
    """logits: [B, n, V] float32 of the last n rows (none where stopped early). rows: per layer [B, N_l]."""

    logits: Tensor | None
    rows: list[Tensor]


@dataclass(frozen=True)
class CostModel:
    """Floating-point operations of a forward, per layer; a multiply-add counts two. Read off the model once.

    row: per computed row (projections, MLP, active experts). check: the part of `row` before K and V are known. key:
    per token of the prompt (MLA expands the latents of all keys). attend: per visible key of a row, 2 * Hq * (Dk + Dv).
    window: visible keys at most, None if unlimited. head: per row of logits.
    """

    row: tuple[float, ...]
    check: tuple[float, ...]
    key: tuple[float, ...]
    attend: tuple[float, ...]
    window: tuple[int | None, ...]
    head: float

    def forward(self, rows: Sequence[Tensor], tokens: int, logits: int, checked: dict[int, int] | None = None) -> float:
        """rows: per computed layer the positions [N_l]; tokens: T; checked: layer -> rows that came to a check."""
        total = self.head * logits
        for i, r in enumerate(rows):
            visible = r + 1
            if self.window[i] is not None:
                visible = visible.clamp(max=self.window[i])
            total += self.row[i] * len(r) + self.key[i] * tokens + self.attend[i] * float(visible.sum())
        for i, n in (checked or {}).items():
            total += self.check[i] * n
        return total

    def full(self, tokens: int) -> float:
        """A full prefill of T tokens with one row of logits."""
        return self.forward([torch.arange(tokens)] * len(self.row), tokens, 1)


class ModelRunner(Protocol):
    """A model that runs its own forward on chosen rows. All methods run under inference mode.

    kv_shapes: per layer (H, Dk) of the first and (H', Dv) of the second cached tensor, as one 4-tuple.
    """

    num_layers: int
    max_tokens: int
    fingerprint: str
    tokenizer: Any
    bos_id: int | None
    stop_ids: tuple[int, ...]
    rotary: RotaryTable
    cost: CostModel

    @property
    def kv_shapes(self) -> tuple[tuple[int, int, int, int], ...]: ...

    def new_kv(self, tokens: int, capacity: int = 0) -> Any:
        """An empty KVView for one prompt of T tokens with room for `capacity`."""
        ...

    def forward(self, tokens: Sequence[Tensor], kvs: Sequence[Any], plan: Plan, logits: int = 1) -> Computed:
        """Run rows of B prompts; tokens: per prompt [T] int64. Raises ContextLengthError."""
        ...
