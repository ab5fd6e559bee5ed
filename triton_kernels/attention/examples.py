"""Calls that are compiled, validated and timed: rows that a policy keeps, a question's probe, Hugging Face's masks."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lmcache_blend.triton_kernels.attention import ops
from lmcache_blend.triton_kernels.attention.reference import dense, selective_attention_reference, visible_keys
from lmcache_blend.triton_kernels.example import Example

BLOCK = 16
TOLERANCE = 5e-3


@dataclass(frozen=True)
class Case:
    """rows of tokens whose KV is paged; heads (Hq, H)."""

    rows: int
    tokens: int
    heads: tuple[int, int]
    dim: int
    window: int | None = None
    soft_cap: float | None = None
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16

    def make(self, device: torch.device, small: bool) -> tuple[Tensor, ...]:
        """q, K and V caches, positions, block table."""
        rows, tokens = (min(self.rows, 9), 70) if small else (self.rows, self.tokens)
        (hq, h), b, d = self.heads, self.batch, self.dim
        generator = torch.Generator().manual_seed(0)
        blocks = -(-tokens // BLOCK)
        pages = torch.randperm(b * blocks + 3, generator=generator)[: b * blocks].view(b, blocks).int()
        places = [torch.randperm(tokens, generator=generator)[:rows].sort().values for _ in range(b)]
        q = torch.randn(b, rows, hq, d, generator=generator).transpose(1, 2)
        k, v = (torch.randn(b * blocks + 3, BLOCK, h, d, generator=generator) for _ in "kv")
        made = (*(x.to(self.dtype) for x in (q, k, v)), torch.stack(places), pages)
        return tuple(x.to(device) for x in made)

    def flops(self, args: tuple) -> int:
        """Two products for every visible key of every row."""
        seen = visible_keys(args[3], args[4].shape[1] * BLOCK, self.window)
        return 4 * int(seen.sum()) * self.heads[0] * self.dim

    def run(self, *args: Tensor) -> tuple[Tensor, Tensor]:
        return ops.selective_attention_lse(*args, window=self.window, soft_cap=self.soft_cap)

    def wide(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return selective_attention_reference(
            q, dense(k, table), dense(v, table), positions, None, None, self.window, self.soft_cap
        )

    def probe(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, lse = self.run(q, k, v, positions, table)
        options = {"window": self.window, "soft_cap": self.soft_cap}
        return out, lse, ops.attention_mass(q, k, positions, lse, table.shape[1] * BLOCK, table, **options)

    def sdpa(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor) -> Tensor:
        """torch's own attention over gathered keys with a dense mask."""
        if self.soft_cap is not None:
            raise NotImplementedError("scaled_dot_product_attention has no soft cap")
        k, v = dense(k, table), dense(v, table)
        seen = visible_keys(positions, k.shape[2], self.window)[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)

    def flashinfer(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, table: Tensor) -> Tensor:
        """FlashInfer's prefill of one request over gathered keys with a dense mask."""
        if not q.is_cuda or len(q) > 1:
            raise NotImplementedError("flashinfer takes one request with a mask, on CUDA")
        import flashinfer  # pyright: ignore[reportMissingImports]

        k, v = (dense(x, table)[0].transpose(0, 1).contiguous() for x in (k, v))
        seen = visible_keys(positions, len(k), self.window)[0]
        return flashinfer.single_prefill_with_kv_cache(
            q[0].transpose(0, 1).contiguous(), k, v, custom_mask=seen, logits_soft_cap=self.soft_cap
        )

    def example(self, name: str, kernels: tuple[str, ...] = ("attention_kernel",), **options: Any) -> Example:
        rivals = {"sdpa": self.sdpa, "flashinfer": self.flashinfer}
        named = {"run": self.run, "reference": lambda *a: self.wide(*a)[:2], "rivals": rivals}
        return Example(
            name, self.make, flops=self.flops, matmul=kernels, **{**named, "tolerance": TOLERANCE, **options}
        )


def _hugging_face(device: torch.device, small: bool) -> tuple[Tensor, ...]:
    """q, dense K and V, additive mask, positions."""
    q, k, v, positions, table = Case(270, 1800, (9, 3), 64).make(device, small)
    k, v = dense(k, table).contiguous(), dense(v, table).contiguous()
    seen = visible_keys(positions, k.shape[2])[:, None]
    mask = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, torch.finfo(q.dtype).min)
    return q, k, v, mask, positions


def _masked(call: Callable) -> Callable:
    return lambda q, k, v, mask, positions: call(q, k, v, mask, positions[0].tolist(), None)


def _masked_reference(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    out, _, mass = selective_attention_reference(q, k, v, positions)
    return out, mass


llama = Case(300, 2048, (32, 8), 128)
question = Case(28, 2048, (32, 8), 128)
EXAMPLES = [
    llama.example("attention_llama3"),
    Case(300, 2048, (9, 3), 64).example("attention_smollm2"),
    Case(300, 2048, (28, 4), 128).example("attention_qwen2_7b"),
    Case(300, 2048, (32, 32), 80).example("attention_dim80"),
    Case(300, 2048, (32, 32), 96).example("attention_dim96"),
    Case(300, 2048, (16, 8), 256, window=1024, soft_cap=50.0).example("attention_gemma2"),
    Case(300, 2048, (8, 4), 256).example("attention_dim256"),
    Case(300, 2048, (32, 8), 128, window=512).example("attention_window"),
    Case(40, 1024, (8, 2), 128, batch=3).example("attention_batch"),
    Case(1, 8192, (32, 8), 128).example("attention_one_row"),
    Case(1, 8192, (16, 8), 256, window=4096, soft_cap=50.0).example("attention_one_row_gemma2"),
    Case(300, 2048, (32, 8), 128, dtype=torch.float32).example("attention_float32", (), tolerance=1e-5),
    question.example(
        "attention_probe", ("attention_kernel", "mass_kernel"), run=question.probe, reference=question.wide
    ),
    Example(
        "attention_hugging_face", _hugging_face, _masked(ops.row_attention),
        lambda *a: _masked_reference(*a)[0], TOLERANCE, matmul=("attention_kernel",),
    ),
    Example(
        "attention_hugging_face_probe", _hugging_face, _masked(ops.row_attention_mass), _masked_reference, TOLERANCE,
        matmul=("attention_kernel", "mass_kernel"),
    ),
]  # fmt: skip
