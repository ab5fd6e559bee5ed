"""Start-up test of blend mode on the loaded model, in the mode that serves (eager or compiled).

Plain prefill of random tokens is compared with the same prefill after noise was written in its place: all rows
recomputed in two slices, and half of them (scattered) recomputed over the exact other half.
"""

import torch
from torch import Tensor

from lmcache_blend.blend.runner import Plan
from lmcache_blend.errors import UnsupportedModelError
from lmcache_blend.serving.kv import PagedKV
from lmcache_blend.serving.runner import VLLMRunner

TOKENS = 192
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}
"""Relative root-mean-square difference of the last rows' logits that counts as none."""


@torch.inference_mode()
def self_test(runner: VLLMRunner, first_block: int = 1) -> float:
    """The largest difference found; raises UnsupportedModelError above the tolerance. Uses blocks that nobody has."""
    block = runner.layers[0].block
    n = min(TOKENS, runner.max_tokens, runner.budget)
    blocks = torch.arange(first_block, first_block + -(-n // block), device=runner.device)
    kv = PagedKV(runner.layers, blocks, n)
    generator = torch.Generator().manual_seed(3)
    vocabulary = runner.vllm_config.model_config.get_vocab_size()
    ids = torch.randint(3, vocabulary, (n,), generator=generator)
    every = torch.arange(n)
    wanted = _logits(runner, ids, kv, every)
    exact = [tuple(x.clone() for x in kv.layer(i)) for i in range(runner.num_layers)]
    half = torch.randperm(n - 1, generator=generator)[: n // 2].sort().values
    worst = 0.0
    for name, rows in (("all rows", every[:-1]), ("half of the rows", half)):
        for i, (k, v) in enumerate(exact):
            k, v = k.clone(), v.clone()
            for x in (k, v):
                x[:, rows] = torch.randn(x[:, rows].shape, generator=generator).to(x) * 3
            kv.write(i, every, k[None], v[None])
        for part in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            runner.forward([ids], [kv], Plan([part]))
        got = _logits(runner, ids, kv, every[-1:])
        difference = float((got[-1] - wanted[-1]).norm() / wanted[-1].norm())
        if not difference <= TOLERANCE[runner.layers[0].cache.dtype]:
            raise UnsupportedModelError(
                f"recomputing {name} over noise changes the logits by {difference:.1e}, relative: blended KV would be "
                "wrong"
            )
        worst = max(worst, difference)
    for i, layer in enumerate(runner.layers):
        zero = torch.zeros(1, layer.heads, n, layer.dim, dtype=layer.cache.dtype, device=runner.device)
        kv.write(i, every, zero, zero)
    return worst


def _logits(runner: VLLMRunner, ids: Tensor, kv: PagedKV, rows: Tensor) -> Tensor:
    """Of the last of the rows [1, V]."""
    hidden = runner.run(ids, kv, rows)
    return runner.model.compute_logits(hidden[-1:]).float()
