"""Core types that cross the layers.

Words: L layers, T tokens of a prompt, B prompts in a batch, N chosen rows, H KV heads, Hq query heads, D head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from lmcache_blend.errors import SegmentError


@dataclass(frozen=True)
class Prompt:
    """Token ids of one prompt and the spans of it whose KV may be reused.

    tokens: [T] int64, never re-tokenised. spans: (start, end) pairs, ascending, disjoint, each at least one token.
    prefix: whether the first span is the shared instruction prefix (starts at 0; passages are encoded behind it
    where BlendConfig.encode is "prefix"). The tokens outside every span are always computed, and so is the prompt's
    last token, since its logits give the first token.

    Raises SegmentError.
    """

    tokens: Tensor
    spans: tuple[tuple[int, int], ...] = ()
    prefix: bool = False

    def __post_init__(self) -> None:
        tokens = torch.as_tensor(self.tokens, dtype=torch.long)
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "spans", tuple((int(a), int(b)) for a, b in self.spans))
        if tokens.dim() != 1 or len(tokens) == 0:
            raise SegmentError(
                f"a prompt is one non-empty row of token ids, not a tensor of shape {tuple(tokens.shape)}"
            )
        last = 0
        for start, end in self.spans:
            if start < last:
                raise SegmentError(f"span [{start}, {end}) overlaps the one before it, which ends at {last}")
            if end <= start or end > len(tokens):
                raise SegmentError(f"span [{start}, {end}) is empty or outside the prompt's {len(tokens)} tokens")
            last = end
        if self.prefix and (not self.spans or self.spans[0][0] != 0):
            raise SegmentError("prefix=True needs a first span that starts at token 0")

    @classmethod
    def join(cls, parts: Sequence[Sequence[int]], question: Sequence[int], prefix: Sequence[int] = ()) -> "Prompt":
        """[prefix][part 1]...[part n][question], each part one span; empty parts are left out."""
        pieces = [p for p in ([list(prefix)] if len(prefix) else []) + [list(p) for p in parts] if p]
        spans, at = [], 0
        for piece in pieces:
            spans.append((at, at + len(piece)))
            at += len(piece)
        tokens = [t for piece in pieces for t in piece] + list(question)
        return cls(torch.tensor(tokens, dtype=torch.long), tuple(spans), prefix=len(prefix) > 0)

    def __len__(self) -> int:
        return len(self.tokens)


Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class KVChunk:
    """KV of T consecutive tokens, keys before RoPE.

    layers: L pairs (k [H, T, Dk], v [H, T, Dv]); for MLA the pair is (latent, rope key). From a store they may still be
    on their way: indexing then waits for that layer, and raises ChunkLostError where it does not come.
    exact_after: digest of the tokens that stood before the chunk while this KV was computed exactly; None where it
    holds approximations, so that the chunk is never taken for a prefix hit.
    """

    tokens: Tensor
    layers: Sequence[Pair]
    exact_after: bytes | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self.layers)

    @property
    def shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """Per layer (H, Dk, H', Dv), without waiting for layers that are on their way."""
        known = getattr(self.layers, "shapes", None)
        return known or tuple((k.shape[0], k.shape[2], v.shape[0], v.shape[2]) for k, v in self.layers)


@dataclass(frozen=True)
class RotarySlice:
    """The rotating part of one layer's cached pair (k, v).

    slot: 0 if it lies in the first tensor, 1 in the second (MLA: the rope key beside the latent). start, stop: the
    dims that turn (partial rotary). pairing: "half" pairs dim i with i + R/2 (neox), "interleaved" 2i with 2i + 1
    (gptj). angles: where the R/2 distinct angles stand in the model's cos and sin: their first "half", every second
    ("stride"), or "all" of it. source: which of the replayed tables feeds the layer.
    """

    slot: int
    start: int
    stop: int
    pairing: Literal["half", "interleaved"]
    angles: Literal["half", "stride", "all"]
    source: int


class Turn(NamedTuple):
    """cos and sin [T, R/2], float32, of one layer at T positions."""

    cos: Tensor
    sin: Tensor


class KVView(Protocol):
    """KV of B prompts under computation, post-RoPE, in whatever layout the host engine keeps (dense, paged).

    Shapes: positions [n] int64; k [B, H, n, Dk], v [B, H, n, Dv].
    """

    def read(self, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]: ...

    def write(self, layer: int, positions: Tensor, k: Tensor, v: Tensor) -> None: ...


@dataclass
class Trace:
    """What one blended forward did.

    rows: per layer, the positions [N_l] whose KV was computed; ascending, shrinking with the layer.
    deviation: [L, T] relative error of the reused K and V against what was computed in their place (root mean square
    over heads and dims of K plus V, each over that of the fresh one); NaN where nothing reused was recomputed.
    scores: [T] the policy's score of each token (-inf where it was no candidate), or None.
    stages_ms: wall time per stage (load, place, probe, select, forward), in order; place happens inside the first
    forward, layer by layer, and is taken out of it here.
    flops, full_flops: multiply-adds counted twice, selection passes included, and of a full prefill.
    loading_ms, loading_wait_ms: from the first read of layers that came one by one to the last, and how long the
    forward waited for them; what is left was hidden behind computing.
    hits: (start, end, kind) per span with kind "exact" (prefix hit), "reused" (non-prefix) or "miss".
    """

    method: str
    recompute_ratio: float | None
    tokens: int
    rows: list[Tensor] = field(default_factory=list)
    deviation: Tensor | None = None
    scores: Tensor | None = None
    stages_ms: dict[str, float] = field(default_factory=dict)
    flops: float = 0.0
    full_flops: float = 1.0
    ttft_ms: float = 0.0
    loaded_bytes: int = 0
    loading_ms: float = 0.0
    loading_wait_ms: float = 0.0
    hits: list[tuple[int, int, str]] = field(default_factory=list)

    @property
    def compute_fraction(self) -> float:
        """True compute as a fraction of full prefill."""
        return self.flops / self.full_flops

    @property
    def overlap(self) -> float | None:
        """Share of loading and decoding that was hidden behind computing; None where nothing came layer by layer."""
        return 1 - min(self.loading_wait_ms / self.loading_ms, 1.0) if self.loading_ms else None

    @property
    def recomputed_fraction(self) -> float:
        """Mean over layers of the computed rows, as a fraction of the prompt's tokens."""
        return sum(len(r) for r in self.rows) / (max(len(self.rows), 1) * self.tokens)
