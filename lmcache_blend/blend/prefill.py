"""What a prefill leaves: the first token's logits, the KV to go on from, and the trace."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmcache_blend.blend.runner import ModelRunner, Plan
from lmcache_blend.types import Prompt, Trace


@dataclass
class Prefill:
    """logits: [V] float32 of the prompt's last token. kv: the KVView of the prompt. trace: what was done."""

    runner: ModelRunner
    prompt: Prompt
    kv: Any
    logits: Tensor
    trace: Trace

    def continuation_logits(self, tokens: Tensor) -> Tensor:
        """Teacher forcing: tokens [n] int64 -> [n, V], row i predicts tokens[i]. The prefill stays as it was."""
        tokens = torch.as_tensor(tokens, dtype=torch.long)
        if len(tokens) <= 1:
            return self.logits[None][: len(tokens)]
        ids, start = torch.cat((self.prompt.tokens, tokens[:-1])), len(self.prompt)
        try:
            self.kv.extend(len(ids))
            out = self.runner.forward([ids], [self.kv], Plan([torch.arange(start, len(ids))]), 0)
        finally:
            self.kv.length = start
        assert out.logits is not None
        return torch.cat((self.logits[None], out.logits[0]))

    def generate(self, max_new_tokens: int, stop_ids: Collection[int] | None = None) -> list[int]:
        """Greedy continuation, at most max_new_tokens tokens, without the stop token that ends it."""
        return generate_batch([self], max_new_tokens, stop_ids)[0]


def generate_batch(
    prefills: Sequence[Prefill], max_new_tokens: int, stop_ids: Collection[int] | None = None
) -> list[list[int]]:
    """Greedy continuations of several prefills of one runner, decoded together, up to the model's last position.

    Each prefill can be continued again afterwards.
    """
    runner = prefills[0].runner
    stops = set(runner.stop_ids if stop_ids is None else stop_ids)
    tokens, kvs = [p.prompt.tokens for p in prefills], [p.kv for p in prefills]
    done = [False] * len(prefills)
    out: list[list[int]] = [[] for _ in prefills]
    choice = [int(p.logits.argmax()) for p in prefills]
    try:
        for step in range(max_new_tokens):
            for b, token in enumerate(choice):
                done[b] = done[b] or token in stops
                if not done[b]:
                    out[b].append(token)
            live = [b for b in range(len(prefills)) if not done[b]]
            full = any(len(tokens[b]) + 1 > runner.max_tokens for b in live)
            if not live or full or step == max_new_tokens - 1:
                break
            for b in live:
                tokens[b] = torch.cat((tokens[b], torch.tensor([choice[b]])))
                kvs[b].extend(len(tokens[b]))
            plan = Plan([torch.tensor([len(tokens[b]) - 1]) for b in live])
            step_out = runner.forward([tokens[b] for b in live], [kvs[b] for b in live], plan)
            assert step_out.logits is not None
            for b, row in zip(live, step_out.logits, strict=True):
                choice[b] = int(row[-1].argmax())
    finally:
        for p in prefills:
            p.kv.length = len(p.prompt)
    return out
