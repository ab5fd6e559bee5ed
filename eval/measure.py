"""Measure one sample: full prefill and no context once, then each method against them."""

import hashlib
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmcache_blend.errors import ContextLengthError
from lmcache_blend.eval import metrics
from lmcache_blend.eval.results import SampleResult
from lmcache_blend.eval.tasks import Sample, answer_tokens, build_prompt, post_process
from lmcache_blend.types import Prompt


@dataclass(frozen=True)
class Item:
    """A sample ready to run. answer: [n] int64, the first one, or None. line_ends: tokens that end it."""

    sample: Sample
    kind: str
    prompt: Prompt
    no_context: Prompt
    answer: Tensor | None
    max_new_tokens: int
    generate: bool
    line_ends: frozenset[int]

    @property
    def prompt_sha256(self) -> str:
        """First 16 hex digits over token ids, spans and the answer's ids."""
        parts = [
            self.prompt.tokens,
            torch.tensor(self.prompt.spans).flatten(),
            self.answer if self.answer is not None else torch.tensor([]),
        ]
        return hashlib.sha256(b"|".join(p.long().numpy().tobytes() for p in parts)).hexdigest()[:16]

    @property
    def needed_tokens(self) -> int:
        """Positions that prompt and answer take."""
        answer = len(self.answer) if self.answer is not None else self.max_new_tokens
        return len(self.prompt) + max(answer, self.max_new_tokens if self.generate else 0)


@dataclass(frozen=True)
class Reference:
    """Full prefill of one sample. tokens [n]: the answer, or its own continuation; logits [n, V] float32."""

    tokens: Tensor
    logits: Tensor
    nll: float | None
    nll_no_context: float | None
    prediction: str | None
    scores: dict[str, float]
    result: Any


def make_item(
    sample: Sample, kind: str, runner: Any, *, chunk_tokens: int, max_new_tokens: int, generate: bool
) -> Item:
    """Build the prompts of a sample for a runner's tokenizer."""
    tokenizer = runner.tokenizer
    line_ends = _line_ends(tokenizer) if post_process("a\nb", kind) == "a" else frozenset()
    return Item(
        sample=sample,
        kind=kind,
        prompt=build_prompt(sample, kind, tokenizer, chunk_tokens=chunk_tokens),
        no_context=build_prompt(sample, kind, tokenizer, with_context=False, chunk_tokens=chunk_tokens),
        answer=answer_tokens(sample, kind, tokenizer),
        max_new_tokens=max_new_tokens,
        generate=generate,
        line_ends=line_ends,
    )


def measure_reference(blender: Any, item: Item, tokenizer: Any) -> Reference:
    """Full prefill, timed; the same without context; and full prefill's own answer."""
    result = blender.prefill(item.prompt, policy="full_recompute")
    nll = nll_no_context = None
    if item.answer is not None:
        tokens = item.answer
        logits = result.continuation_logits(tokens)
        nll = float(metrics.nll(logits, tokens))
        bare = blender.prefill(item.no_context, policy="full_recompute")
        nll_no_context = float(metrics.nll(bare.continuation_logits(tokens), tokens))
    else:
        own = result.generate(item.max_new_tokens)
        tokens = torch.tensor(own or [int(result.logits.argmax())], dtype=torch.long)
        logits = result.continuation_logits(tokens)
    prediction = _decode(result, item, tokenizer) if item.generate else None
    scores = (
        metrics.text_scores(prediction, item.sample.answers) if prediction is not None and item.sample.answers else {}
    )
    return Reference(tokens, logits, nll, nll_no_context, prediction, scores, result)


def measure_method(
    blender: Any, item: Item, reference: Reference, tokenizer: Any, kv_bytes_per_token: float
) -> tuple[SampleResult, Any]:
    """One method on one sample, compared with the reference; also the blender's own result, for its trace.

    blender.config names the method; full_recompute is the reference itself, not run a second time.
    kv_bytes_per_token: K and V of one token over all layers at 16 bit per element.
    """
    full = blender.config.policy == "full_recompute"
    result = reference.result if full else blender.prefill(item.prompt)
    logits = reference.logits if full else result.continuation_logits(reference.tokens)
    scores = metrics.logit_scores(logits, reference.logits, reference.tokens)
    prediction = reference.prediction if full or not item.generate else _decode(result, item, tokenizer)
    texts = (
        metrics.text_scores(prediction, item.sample.answers) if prediction is not None and item.sample.answers else {}
    )
    trace = result.trace
    hit_tokens = sum(end - start for start, end, kind in trace.hits if kind != "miss")
    span_tokens = sum(end - start for start, end in item.prompt.spans)
    sample = SampleResult(
        id=item.sample.id,
        prompt_sha256=item.prompt_sha256,
        tokens=len(item.prompt),
        answers=list(item.sample.answers),
        prediction=prediction,
        prediction_full=reference.prediction,
        nll=scores["nll"] if reference.nll is not None else None,
        nll_full=reference.nll,
        nll_no_context=reference.nll_no_context,
        kl=scores["kl"],
        top1_agreement=scores["top1_agreement"],
        flip=None
        if prediction is None
        else metrics.normalise(prediction) != metrics.normalise(reference.prediction or ""),
        f1=texts.get("f1"),
        em=texts.get("em"),
        rouge_l=texts.get("rouge_l"),
        contains=texts.get("contains"),
        f1_full=reference.scores.get("f1"),
        ttft_ms=trace.ttft_ms,
        ttft_full_ms=reference.result.trace.ttft_ms,
        rows=[len(rows) for rows in trace.rows],
        compute_fraction=trace.compute_fraction,
        recomputed_fraction=trace.recomputed_fraction,
        loaded_bytes=trace.loaded_bytes,
        loaded_kv_bytes=round(hit_tokens * kv_bytes_per_token),
        raw_kv_bytes=round(span_tokens * kv_bytes_per_token),
        stages_ms=dict(trace.stages_ms),
    )
    return sample, result


def trace_arrays(trace: Any, prompt: Prompt, exact: Tensor | None) -> dict[str, np.ndarray]:
    """What plots need of one forward.

    deviation [L, T] float16 of the reused KV where this run computed it anew; deviation_exact [L, T] float16
    of every reused token against full prefill; rows [L, T] bool; spans [S, 2]; scores [T] float32, or empty.
    """
    rows = np.zeros((len(trace.rows), trace.tokens), dtype=bool)
    for layer, positions in enumerate(trace.rows):
        rows[layer, positions.cpu().numpy()] = True
    empty = np.zeros((0, 0), dtype=np.float16)
    return {
        "deviation": empty if trace.deviation is None else trace.deviation.float().cpu().numpy().astype(np.float16),
        "deviation_exact": empty if exact is None else exact.float().cpu().numpy().astype(np.float16),
        "rows": rows,
        "spans": np.array(prompt.spans, dtype=np.int64).reshape(-1, 2),
        "scores": np.zeros(0, np.float32) if trace.scores is None else trace.scores.float().cpu().numpy(),
    }


def truncate(prompt: Prompt, limit: int) -> Prompt:
    """The prompt cut to `limit` tokens: the longest passages are cut to one common length, in their middle.

    Instruction prefix and question stay whole. Raises ContextLengthError where they alone are too long.
    """
    excess = len(prompt) - limit
    if excess <= 0:
        return prompt
    passages = prompt.spans[1:] if prompt.prefix else prompt.spans
    lengths = [end - start for start, end in passages]
    target = sum(lengths) - excess
    if target < len(lengths) or not lengths:
        raise ContextLengthError(
            f"the prompt without its passages takes {len(prompt) - sum(lengths)} tokens, more than the "
            f"{limit} that the model leaves; shorten the question or lower --option max_new_tokens"
        )
    kept = _capped(lengths, target)
    keep = torch.ones(len(prompt), dtype=torch.bool)
    for (start, end), size in zip(passages, kept, strict=True):
        head = start + (size + 1) // 2
        keep[head : head + (end - start - size)] = False
    at = torch.cat([torch.zeros(1, dtype=torch.long), keep.long().cumsum(0)])
    spans = tuple((int(at[start]), int(at[end])) for start, end in prompt.spans)
    return Prompt(prompt.tokens[keep], spans, prefix=prompt.prefix)


def _capped(lengths: Sequence[int], total: int) -> list[int]:
    """The lengths, the longest ones lowered to one cap, give or take a token, so that they sum to `total`."""
    low, high = 1, max(lengths)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if sum(min(n, middle) for n in lengths) <= total else (low, middle - 1)
    kept = [min(n, low) for n in lengths]
    for i, n in enumerate(lengths):
        if sum(kept) < total and n > low:
            kept[i] += 1
    return kept


def _decode(result: Any, item: Item, tokenizer: Any) -> str:
    # A line end in front is no end: post-processing strips it.
    line_ends = frozenset() if int(result.logits.argmax()) in item.line_ends else item.line_ends
    ids = result.generate(item.max_new_tokens, stop_ids={*result.runner.stop_ids, *line_ends})
    return post_process(tokenizer.decode(ids, skip_special_tokens=True), item.kind)


@lru_cache(maxsize=8)
def _line_ends(tokenizer: Any) -> frozenset[int]:
    """Ids of tokens that hold a line end and no word: what is decoded behind them would be cut off anyway."""
    blank = set(string.whitespace + string.punctuation)
    texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
    return frozenset(i for i, text in enumerate(texts) if "\n" in text and set(text) <= blank)
