"""What a run writes down: typed models of config.json, samples.jsonl and results.json.

NLL and KL are in nats per answer token.
"""

import hashlib
import json
import re
from typing import Any, Literal

import pydantic


class RunConfig(pydantic.BaseModel):
    """One combination of everything that decides its numbers; the number of samples does not belong to it."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    task: str
    """Name of the task, or the stem of the data file."""
    data: str | None = None
    """Name of the data file without its folder, where one was given."""
    data_sha256: str | None = None
    """SHA-256 of that file's bytes."""
    task_options: dict[str, Any] = {}
    """Options of the task's generator."""
    model: str
    """Model as the user named it; of a local folder its last part."""
    fingerprint: str
    """Digest of the model's weights and configuration."""
    dtype: str = "float32"
    """Data type of weights, activations and KV."""
    device: str = "cpu"
    """Device that the model ran on."""
    backend: str = "hf"
    """Engine that ran the model."""
    method: str
    """Name of the policy."""
    recompute_ratio: float | None = None
    """Nominal fraction of the reused tokens that is computed anew; null where the method has none."""
    policy_options: dict[str, Any] = {}
    """Fields of the policy that differ from its defaults."""
    encode: str = "alone"
    """What stood before a passage while its KV was computed for the store: alone, bos or prefix."""
    codec: dict[str, Any] = {"id": "raw"}
    """Configuration of the codec that the stored KV went through."""
    seed: int = 0
    """Seed of generated samples and of random policies."""
    chunk_tokens: int = 512
    """Passages longer than this many tokens are cut into spans."""
    max_new_tokens: int
    """Greedy decoding stops after this many tokens."""
    generate: bool = True
    """Whether answers were decoded; without, predictions and text scores are null."""
    long_context: Literal["skip", "truncate"] = "skip"
    """What happened to prompts longer than the model's positions."""
    serving: dict[str, Any] = {}
    """How a serving engine ran (concurrency, eager or compiled, offline or a server); empty for hf."""

    def canonical(self) -> str:
        """JSON with sorted keys and no spaces: what the folder's hash is taken over."""
        # Folders of runs from before there was a serving engine keep their names.
        values = self.model_dump(mode="json", exclude=None if self.serving else {"serving"})
        return json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @property
    def folder(self) -> str:
        """<task>__<model>__<method>__<hash8>, safe as a file name."""
        digest = hashlib.sha256(self.canonical().encode()).hexdigest()[:8]
        return "__".join([*(safe_name(part) for part in (self.task, self.model, self.method)), digest])


class SampleResult(pydantic.BaseModel):
    """One line of samples.jsonl: one sample under one method, beside full prefill in the same loop."""

    model_config = pydantic.ConfigDict(frozen=True, allow_inf_nan=False)

    id: str
    """The sample's id in its task."""
    prompt_sha256: str
    """First 16 hex digits over token ids and spans: a resumed run measures anew what has changed."""
    tokens: int
    """Length of the prompt in tokens."""
    answers: list[str]
    """Accepted answers; empty in sets that measure fidelity only."""
    prediction: str | None
    """Greedy answer after the blend, post-processed; null where nothing was decoded."""
    prediction_full: str | None
    """The same after full prefill."""
    nll: float | None
    """Mean negative log likelihood of the first answer's tokens; null without an answer."""
    nll_full: float | None
    """The same after full prefill."""
    nll_no_context: float | None
    """The same after full prefill of the prompt without its passages."""
    kl: float | None
    """Mean KL(full prefill || method) over the answer's tokens, else over full prefill's own continuation; null where
    a server gives no whole distributions."""
    top1_agreement: float | None
    """Fraction of those tokens at which both name the same most likely token; null where no logits were to be had."""
    flip: bool | None
    """Whether the normalised prediction differs from that of full prefill."""
    f1: float | None
    """Token F1 of the prediction against the best answer."""
    em: float | None
    """Exact match after normalisation."""
    rouge_l: float | None
    """Rouge-L F-measure."""
    contains: float | None
    """Whether an answer stands in the prediction."""
    f1_full: float | None
    """Token F1 of full prefill's prediction."""
    ttft_ms: float
    """Time to the first token: load, place, probe, select, forward."""
    ttft_full_ms: float
    """Time to the first token of full prefill, timed in the same loop."""
    rows: list[int]
    """Computed rows of each layer."""
    compute_fraction: float
    """FLOPs, selection passes included, over those of full prefill."""
    recomputed_fraction: float
    """Mean over layers of computed rows over the prompt's tokens."""
    loaded_bytes: int
    """Bytes read from the store."""
    loaded_kv_bytes: int
    """What the loaded tokens' KV takes at 16 bit per element."""
    raw_kv_bytes: int
    """What the KV of all spans takes at 16 bit per element."""
    stages_ms: dict[str, float]
    """Wall time per stage."""
    latency_ms: float | None = None
    """From the request to its last token; null where answers are not streamed."""
    burst_ms: float | None = None
    """Wall time of the requests that were in flight together, over their number."""


class Estimate(pydantic.BaseModel):
    """A mean over samples with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


class Times(pydantic.BaseModel):
    """Milliseconds over samples."""

    mean: float
    median: float
    p95: float
    p99: float | None = None


class Skipped(pydantic.BaseModel):
    """A sample that was longer than the model's positions."""

    id: str
    tokens: int
    limit: int


class Metrics(pydantic.BaseModel):
    """Quality over the samples; null where the task or the run has no such number."""

    nll: Estimate | None
    """Answer NLL under the method, nats per token."""
    nll_full: Estimate | None
    """Answer NLL under full prefill."""
    nll_no_context: Estimate | None
    """Answer NLL without the passages."""
    quality: Estimate | None
    """(NLL no context - NLL method) / (NLL no context - NLL full): 1 is full prefill, 0 is no context."""
    kl: Estimate | None
    """KL(full prefill || method), nats per token."""
    top1_agreement: Estimate | None
    """Fraction of tokens with the same most likely token as full prefill."""
    flip_rate: Estimate | None
    """Fraction of answers that differ from full prefill's."""
    f1: Estimate | None
    em: Estimate | None
    rouge_l: Estimate | None
    contains: Estimate | None
    """Text scores of the prediction against the answers."""
    f1_full: Estimate | None
    """Token F1 of full prefill."""


class Results(pydantic.BaseModel):
    """results.json: one combination summed up."""

    model_config = pydantic.ConfigDict(protected_namespaces=())

    task: str
    model: str
    method: str
    recompute_ratio: float | None
    codec: dict[str, Any]
    backend: str
    n: int
    """Samples measured."""
    complete: bool
    """Whether every sample of the run's limit is measured or skipped."""
    signal: bool
    """Whether full prefill beats no context on these samples; without it nothing is ranked."""
    has_answers: bool
    """Whether there are answers to score; without, only fidelity to full prefill is measured."""
    metrics: Metrics
    ttft_ms: Times
    ttft_full_ms: Times
    ttft_ratio: Estimate
    """Median TTFT over that of full prefill, with a paired bootstrap interval."""
    compute_fraction: float
    """True compute over that of full prefill, mean over samples."""
    recomputed_fraction: float
    loaded_bytes: float
    """Mean bytes read from the store per prompt."""
    raw_kv_bytes: float
    """Mean bytes of the spans' KV at 16 bit per element."""
    bits_per_element: float | None
    """Stored bits per element of the K and V that were loaded; null where nothing was."""
    stages_ms: dict[str, float]
    """Mean wall time per stage."""
    latency_ms: Times | None = None
    """To the last token; null where answers are not streamed."""
    queries_per_second: float | None = None
    """Finished requests over the time in which they were in flight, at the run's concurrency."""
    tokens: float
    """Mean prompt length."""
    skipped: list[Skipped]
    """Samples left out because they are longer than the model's positions."""
    versions: dict[str, str | int]
    config: RunConfig


def safe_name(text: str) -> str:
    """`text` as one part of a folder's name: a slash becomes two dashes, other odd characters one."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", text.replace("/", "--")).replace("__", "_")
