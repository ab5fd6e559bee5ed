"""Choosing rows: the signals a policy asked for, and the plan that follows from its scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmcache_blend.blend.policies import RowPolicy, Signals
from lmcache_blend.blend.runner import Chooser, ModelRunner, Plan
from lmcache_blend.triton_kernels.selection import squared_deviation, top_rows
from lmcache_blend.types import Prompt, Trace


def base_signals(prompt: Prompt, candidate: Tensor) -> Signals:
    """Signals that need no model: places in the chunks. candidate: [T] bool."""
    offset, length = torch.zeros(len(prompt), dtype=torch.long), torch.zeros(len(prompt), dtype=torch.long)
    for start, end in prompt.spans:
        offset[start:end], length[start:end] = torch.arange(end - start), end - start
    return Signals(prompt.tokens, candidate, offset, length)


def top(scores: Tensor, candidate: Tensor, count: int) -> Tensor:
    """Ascending positions of the `count` candidates [T] bool with the highest scores; of equal ones the first."""
    return top_rows(scores.cpu(), candidate, min(count, int(candidate.sum())))


class Probe:
    """Tap that gathers, per layer, the question's attention to every token and the norm of the values."""

    def __init__(self, layers: int):
        self.attention: list[Tensor] = [torch.empty(0)] * layers
        self.norms: list[Tensor] = [torch.empty(0)] * layers

    def __call__(self, layer: int, mass: Tensor, v: Tensor) -> None:
        self.attention[layer] = mass[0]
        norm = torch.linalg.vector_norm(v[0], dim=-1, dtype=torch.float32)
        self.norms[layer] = norm.repeat_interleave(mass.shape[1] // norm.shape[0], 0)

    def fill(self, signals: Signals) -> None:
        signals.attention = torch.stack(self.attention).cpu()
        signals.value_norm = torch.stack(self.norms).cpu()


def run_probe(
    runner: ModelRunner, prompt: Prompt, kv: Any, question: Tensor, hidden: Tensor, signals: Signals
) -> float:
    """Run the question's rows over the reused KV and fill signals.attention and .value_norm; returns the FLOPs.

    question: rows [Q], the last ones of the prompt. hidden: [T] bool, positions without KV. The forward ends at the
    last layer's attention.
    """
    probe, last = Probe(runner.num_layers), runner.num_layers - 1
    plan = Plan([question], tap=probe, stop_at=last, hidden=hidden if bool(hidden.any()) else None)
    runner.forward([prompt.tokens], [kv], plan)
    probe.fill(signals)
    return runner.cost.forward([question] * last, len(prompt), 0, {last: len(question)})


class Deviation:
    """Observer of reused KV against what is computed in its place: table [L, T], NaN where nothing was compared."""

    def __init__(self, layers: int, reused: Tensor):
        self.reused = reused
        self.table = torch.full((layers, len(reused)), torch.nan)

    def __call__(self, layer: int, rows: Tensor, k: Tensor, v: Tensor, old_k: Tensor, old_v: Tensor) -> None:
        which = self.reused[rows.cpu()].nonzero().flatten().to(rows.device)
        if len(which):
            sums = [squared_deviation(new, old, rows)[:, which] for new, old in ((k, old_k), (v, old_v))]
            relative = sum(distance.sqrt() / energy.sqrt().clamp_min(1e-9) for distance, energy in sums)
            self.table[layer, rows[which].cpu()] = relative.cpu()  # type: ignore[union-attr]


@dataclass
class Work:
    """One prompt on its way through a blended forward.

    candidate: [T] bool, reused tokens that may be recomputed. uncached: [T] bool, tokens that must be computed. rows:
    those that will be. reads: transfers of the chunks that come layer by layer.
    """

    prompt: Prompt
    kv: Any
    trace: Trace
    candidate: Tensor
    uncached: Tensor
    rows: Tensor
    signals: Signals
    deviation: Deviation
    reads: Sequence[Any] = ()

    def note_scores(self, scores: Tensor) -> Tensor:
        """Keep a policy's scores [T] in the trace, -inf where a token is no candidate."""
        self.trace.scores = torch.where(self.candidate, scores.float().cpu(), -torch.inf)
        return self.trace.scores

    def outcome(self) -> tuple[Tensor, int]:
        """After the forward: [T] bool, tokens computed in every layer; and how many from the start are exact."""
        computed = torch.zeros(len(self.prompt), dtype=torch.bool)
        computed[self.trace.rows[-1]] = True
        stale = (self.candidate & ~computed).nonzero().flatten()
        return computed, int(stale[0]) if len(stale) else len(self.prompt)


def deviation_chooser(
    policy: RowPolicy,
    works: Sequence[Work],
    share: float,
    check_flops: float,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Chooser:
    """Chooser for a check layer: rows that were never reused go on, and the best of the reused ones that are left.

    share: how many of these, as a fraction of all reused tokens. check_flops: cost of a row up to the check.
    reduce: sums a tensor over ranks that hold a part of the heads each, so that all of them choose the same rows.
    """

    def choose(layer: int, rows: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kept = []
        for b, work in enumerate(works):
            at, signals, old = rows[b].cpu(), work.signals, work.kv.layer(layer)
            work.trace.flops += check_flops * len(at.unique())
            work.deviation(layer, rows[b], k[b], v[b], *old)
            length = len(work.prompt)
            signals.key_deviation, signals.key_energy = _distance(k[b], old[0], rows[b], length, reduce)
            signals.value_deviation, signals.value_energy = _distance(v[b], old[1], rows[b], length, reduce)
            left = torch.zeros_like(work.candidate)
            left[at] = work.candidate[at]
            stays = ~work.candidate
            count = round(share * int(work.candidate.sum()))
            stays[top(work.note_scores(policy.score(signals)), left, count)] = True
            kept.append(stays[at].nonzero().flatten())
        n = max(map(len, kept))
        return torch.stack([torch.cat((x, x[-1:].expand(n - len(x)))) for x in kept]).to(rows.device)

    return choose


def _distance(
    new: Tensor, buffer: Tensor, rows: Tensor, tokens: int, reduce: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, float]:
    """[T] squared L2 distance of new [H, N, D] to the buffer's rows, zero elsewhere; and the mean squared norm of new.

    Rows that a batch repeats to fill up count once.
    """
    at, table = rows.cpu(), torch.zeros(2, tokens)
    table[:, at] = squared_deviation(new, buffer, rows).cpu()
    table = table if reduce is None else reduce(table)
    return table[0], float(table[1].sum() / len(at.unique())) or 1e-12
