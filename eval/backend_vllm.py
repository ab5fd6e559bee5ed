"""The run loop's backend over vLLM with our connector: an engine of its own, or a running server over HTTP.

Each burst of prompts is sent whole: first their passages, one by one, so that their KV is stored; then full prefill;
then each method. Every prompt is sent twice under a method: once to time its first token and read its answer, once
with the reference's tokens forced, to read their likelihood behind the very same kind of blended prefill.

A server gives log probabilities of the forced tokens and the likeliest ones (NLL, quality, top-1), if it runs the
logits processor serving.forced; KL needs whole distributions, so it is null there.
"""

import gc
import hashlib
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lmcache_blend.blend.policies import get_policy, policies
from lmcache_blend.errors import ConfigError, ServingError
from lmcache_blend.eval import metrics
from lmcache_blend.eval.measure import Item
from lmcache_blend.eval.options import RoutedOptions, RunRequest, ServingOptions
from lmcache_blend.eval.results import SampleResult
from lmcache_blend.eval.tasks import post_process
from lmcache_blend.hf import load_runner, resolve_model
from lmcache_blend.serving.launch import ServeOptions, require_vllm
from lmcache_blend.serving.requests import Answer, Client, Request

CPU_GIB = 2.0
"""RAM of the offline engine's first tier: the passages of a burst lie there."""
STORE_TRIES = 5
"""So often are passages sent until all of them are found; they are written in the background."""


def check_vllm(request: RunRequest, routed: RoutedOptions) -> None:
    """Raises ConfigError for what this backend cannot do, before anything is loaded."""
    if routed.serving.server is None:
        require_vllm()
        if len(request.codecs) > 1:
            raise ConfigError(f"an engine of vLLM has one codec, got {len(request.codecs)}; run one command for each")
    elif request.codecs != ("raw",):
        raise ConfigError(
            "the codec is the server's: start it with `lmcache-blend serve --codec` and leave --codec out"
        )
    if request.encode != "alone":
        raise ConfigError(f"--encode {request.encode}: vLLM stores passages as they stand alone; use --backend hf")
    for method in request.methods:
        if "oracle" in get_policy(method, {}).needs:
            raise ConfigError(f"{method} knows full prefill's KV and is for analysis only; use --backend hf")


@dataclass(frozen=True)
class Measured:
    """One prompt under one method. burst_ms: of the timed requests together, over their number."""

    timed: Answer
    scored: Answer
    burst_ms: float


@dataclass(frozen=True)
class FullPrefill:
    """The reference of one prompt. tokens: the answer, or full prefill's own continuation."""

    measured: Measured
    tokens: list[int]
    none: Answer | None
    prediction: str | None


class VLLMBackend:
    """vLLM; the model is loaded once with transformers before, for its fingerprint, limits and costs."""

    def __init__(self, request: RunRequest, options: ServingOptions):
        self.options, self.burst, self._request = options, options.concurrency, request
        runner = load_runner(request.model, dtype=request.dtype)
        self.tokenizer, self.fingerprint, self.stop_ids = runner.tokenizer, runner.fingerprint, runner.stop_ids
        self.max_tokens, self.layers = runner.max_tokens, runner.num_layers
        self._kv_bytes, self._cost = runner.kv_bytes_per_token(16), runner.cost
        del runner
        gc.collect()
        self.versions: dict[str, str | int] = {}
        self._client: Client | None = None
        if options.server is not None:
            from lmcache_blend.serving.client import HttpClient

            self._client = HttpClient(options.server)
            self.max_tokens = min(self.max_tokens, self._client.max_tokens)
        self._salt = uuid.uuid4().hex[:8]  # what an earlier run left in a server is not reused
        self._warned = False

    @property
    def client(self) -> Client:
        assert self._client is not None, "start() has not run"
        return self._client

    def start(self, items: Sequence[Item], combinations: Sequence[Any]) -> None:
        """Start vLLM where there is no server, and send the first burst under every method, uncounted."""
        blends = any(_blends(c.folder.config.method) for c in combinations)
        if self._client is None:
            from lmcache_blend.serving.offline import OfflineClient

            options = ServeOptions(cpu_gib=CPU_GIB, codec=self._request.codecs[0], match="spans")
            settings = options.connector()
            # Only segments, however short: exact prefixes are vLLM's own.
            settings |= {"offload": False, "blend": {**settings["blend"], "min_tokens": 1}}
            self._client = OfflineClient(
                resolve_model(self._request.model),
                dtype=self._request.dtype,
                max_tokens=min(self.max_tokens, max(item.needed_tokens for item in items) + 1),
                concurrency=self.burst,
                connector=settings if blends else None,
                enforce_eager=self.options.enforce_eager,
            )
        self.versions = self._client.versions
        burst = items[: self.burst]
        for turn in range(self.options.warmup):
            # Under salts of its own, so that the first counted burst meets nothing of it.
            for _ in self._measure(burst, combinations, lambda text: None, f"warm-up {turn} "):
                pass

    def measure(
        self, items: Sequence[Item], combinations: Sequence[Any], say: Callable[[str], Any]
    ) -> Iterator[tuple[Any, Item, SampleResult]]:
        yield from self._measure(items, combinations, say, "")

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    def _measure(
        self, items: Sequence[Item], combinations: Sequence[Any], say: Callable[[str], Any], phase: str
    ) -> Iterator[tuple[Any, Item, SampleResult]]:
        if any(_blends(c.folder.config.method) for c in combinations):
            say("passages")
            self._store(items, phase)
        say("full prefill")
        references = self._references(items, phase)
        for number, combination in enumerate(combinations):
            say(combination.label)
            config = combination.folder.config
            if config.method == "full_recompute":
                measured = [reference.measured for reference in references]
            else:
                params = _params(config) if _blends(config.method) else _OFF
                kind = "blend" if _blends(config.method) else f"prefix {number}"
                if kind != "blend":
                    # The instructions alone, so that they are a prefix that vLLM has.
                    self._run([self._bare(i, i.prompt.spans[0], kind, phase) for i in items if i.prompt.spans])
                measured = self._ask(items, kind, phase, params, [r.tokens for r in references])
            for item, reference, one in zip(items, references, measured, strict=True):
                yield combination, item, self._sample(item, reference, one, config)

    # ------------------------------------------------------------------ requests
    def _store(self, items: Sequence[Item], phase: str) -> None:
        """Have every passage computed and stored as it stands alone. Raises ServingError where that fails."""
        todo = list(items)
        for _ in range(STORE_TRIES):
            for item in todo:
                # One after the other: the second of two equal passages is a hit.
                for span in item.prompt.spans:
                    self._run([self._bare(item, span, "blend", phase, blend=True)])
            found = self._run([self._request_for(item, "blend", phase, _REUSE) for item in todo])
            todo = [item for item, answer in zip(todo, found, strict=True) if _missing(item, answer)]
            if not todo:
                return
        report = found[-1].kv_transfer.get("lmcache_blend")
        raise ServingError(
            f"passages of sample {todo[0].sample.id!r} are not found after they were stored (the server reports "
            f"{report}); it needs `lmcache-blend serve --preset blend`, room in its first tier, "
            "and no blend mode refused in its log"
        )

    def _references(self, items: Sequence[Item], phase: str) -> list[FullPrefill]:
        timed, burst_ms = self._timed([self._request_for(item, "full", phase, _OFF) for item in items])
        tokens = [
            item.answer.tolist() if item.answer is not None else self._continuation(item, phase) for item in items
        ]
        scored = self._run(
            [self._request_for(i, "full, scored", phase, _OFF, t) for i, t in zip(items, tokens, strict=True)]
        )
        bare = [item for item in items if item.answer is not None]
        none = iter(
            self._run([self._request_for(i, "none", phase, _OFF, i.answer.tolist(), context=False) for i in bare])  # type: ignore[union-attr]
            if bare
            else ()
        )
        return [
            FullPrefill(Measured(t, s, burst_ms), ids, next(none) if i.answer is not None else None, self._text(i, t))
            for i, t, s, ids in zip(items, timed, scored, tokens, strict=True)
        ]

    def _continuation(self, item: Item, phase: str) -> list[int]:
        """Full prefill's own, where there is no answer."""
        request = self._request_for(item, "full, continued", phase, _OFF)
        (answer,) = self._run([Request(**{**vars(request), "max_tokens": item.max_new_tokens})])
        return answer.tokens or []

    def _ask(
        self, items: Sequence[Item], kind: str, phase: str, params: dict[str, Any], forced: Sequence[list[int]]
    ) -> list[Measured]:
        timed, burst_ms = self._timed([self._request_for(item, kind, phase, params) for item in items])
        scored = self._run([self._request_for(i, kind, phase, params, f) for i, f in zip(items, forced, strict=True)])
        return [Measured(t, s, burst_ms) for t, s in zip(timed, scored, strict=True)]

    def _request_for(
        self,
        item: Item,
        kind: str,
        phase: str,
        params: dict[str, Any],
        forced: Sequence[int] = (),
        *,
        context: bool = True,
    ) -> Request:
        prompt = item.prompt if context else item.no_context
        blend = dict(params["blend"])
        if blend["enabled"]:
            blend["spans"] = [list(span) for span in prompt.spans]
        return Request(
            tokens=prompt.tokens.tolist(),
            max_tokens=item.max_new_tokens if item.generate and not forced else 1,
            salt=self._salted(item, kind, phase),
            forced=tuple(forced),
            stop_ids=self.stop_ids,
            kv_transfer={"breakdown": True, "blend": blend},
        )

    def _bare(self, item: Item, span: tuple[int, int], kind: str, phase: str, *, blend: bool = False) -> Request:
        """One span on its own; the prompt's last token follows, since a prompt must end outside of its spans."""
        tokens = [*item.prompt.tokens[span[0] : span[1]].tolist(), int(item.prompt.tokens[-1])]
        wanted = {**_REUSE["blend"], "spans": [[0, span[1] - span[0]]]} if blend else _OFF["blend"]
        return Request(tokens, salt=self._salted(item, kind, phase), kv_transfer={"breakdown": True, "blend": wanted})

    def _salted(self, item: Item, kind: str, phase: str) -> str:
        text = f"{self._salt} {phase}{kind} {item.sample.id} {item.prompt_sha256}"
        return hashlib.sha256(text.encode()).hexdigest()  # a server takes 128 characters at most, and not every one

    def _run(self, requests: Sequence[Request]) -> list[Answer]:
        return self.client.run(requests) if requests else []

    def _timed(self, requests: Sequence[Request]) -> tuple[list[Answer], float]:
        answers = self._run([replace(request, stream=True) for request in requests])
        # They start together, so the slowest takes as long as all of them.
        return answers, max(answer.latency_ms for answer in answers) / len(answers)

    # ------------------------------------------------------------------ numbers
    def _text(self, item: Item, answer: Answer) -> str | None:
        if not item.generate:
            return None
        text = answer.text if answer.tokens is None else self.tokenizer.decode(answer.tokens, skip_special_tokens=True)
        return post_process(text, item.kind)

    def _sample(self, item: Item, reference: FullPrefill, measured: Measured, config: Any) -> SampleResult:
        full, wanted = reference.measured, torch.tensor(reference.tokens)
        answered = item.answer is not None
        prediction, answers = self._text(item, measured.timed), list(item.sample.answers)
        texts = metrics.text_scores(prediction, answers) if prediction is not None and answers else {}
        text_full = reference.prediction
        texts_full = metrics.text_scores(text_full, answers) if text_full is not None and answers else {}
        # Over HTTP a timed answer is a stream, and tells nothing of what the connector did.
        told = measured.timed if measured.timed.kv_transfer else measured.scored
        report = told.kv_transfer.get("lmcache_blend") or {}
        if config.method != "full_recompute" and _blends(config.method) and _missing(item, told):
            raise ServingError(f"sample {item.sample.id!r} was not blended: the server reports {report}")
        kl, top1 = _compared(measured.scored, full.scored, wanted)
        rows = self._rows(item, report, measured.timed.cached_tokens)
        spans = sum(end - start for start, end in item.prompt.spans)
        hits = sum(end - start for start, end, kind in report.get("segments", ()) if kind != "miss")
        return SampleResult(
            id=item.sample.id,
            prompt_sha256=item.prompt_sha256,
            tokens=len(item.prompt),
            answers=answers,
            prediction=prediction,
            prediction_full=text_full,
            nll=self._nll(measured.scored, wanted) if answered else None,
            nll_full=self._nll(full.scored, wanted) if answered else None,
            nll_no_context=self._nll(reference.none, wanted) if reference.none is not None else None,
            kl=kl,
            top1_agreement=top1,
            flip=None if prediction is None else metrics.normalise(prediction) != metrics.normalise(text_full or ""),
            f1=texts.get("f1"),
            em=texts.get("em"),
            rouge_l=texts.get("rouge_l"),
            contains=texts.get("contains"),
            f1_full=texts_full.get("f1"),
            ttft_ms=measured.timed.ttft_ms,
            ttft_full_ms=full.timed.ttft_ms,
            rows=rows,
            compute_fraction=self._compute(item, report, rows),
            recomputed_fraction=sum(rows) / (len(rows) * len(item.prompt)),
            loaded_bytes=int(report.get("loaded_bytes", 0)),
            loaded_kv_bytes=round(hits * self._kv_bytes),
            raw_kv_bytes=round(spans * self._kv_bytes),
            stages_ms={str(k): float(v) for k, v in report.get("stages_ms", {}).items()},
            latency_ms=measured.timed.latency_ms,
            burst_ms=measured.burst_ms,
        )

    def _nll(self, answer: Answer, tokens: torch.Tensor) -> float | None:
        if answer.logprobs is not None:
            return float(metrics.nll(answer.logprobs, tokens))
        if answer.token_logprobs:
            return -sum(answer.token_logprobs) / len(answer.token_logprobs)
        if not self._warned:
            self._warned = True
            print(
                "warning: NLL and top-1 are not measured: the server does not force tokens; start it with "
                "--logits-processors lmcache_blend.serving.forced:ForcedTokens",
                file=sys.stderr,
            )
        return None

    def _rows(self, item: Item, report: dict[str, Any], cached: int) -> list[int]:
        """Computed rows of each layer, the last token's, which vLLM computes itself, included."""
        if "rows_per_layer" in report:
            return [n + 1 for n in report["rows_per_layer"]]
        return [len(item.prompt) - cached] * self.layers

    def _compute(self, item: Item, report: dict[str, Any], rows: Sequence[int]) -> float:
        full = self._cost.full(len(item.prompt))
        if "compute_fraction" in report:
            last = torch.tensor([len(item.prompt) - 1])
            return float(report["compute_fraction"]) + self._cost.forward([last] * self.layers, 1, 1) / full
        positions = torch.arange(len(item.prompt) - rows[0], len(item.prompt))
        return self._cost.forward([positions] * self.layers, len(item.prompt), 1) / full


_OFF: dict[str, Any] = {"blend": {"enabled": False}}
_REUSE: dict[str, Any] = {"blend": {"enabled": True, "policy": "full_reuse"}}


def _params(config: Any) -> dict[str, Any]:
    blend: dict[str, Any] = {"enabled": True, "policy": config.method, "options": config.policy_options}
    if config.recompute_ratio is not None:
        blend["recompute_ratio"] = config.recompute_ratio
    return {"blend": blend}


def _blends(method: str) -> bool:
    """Whether a method reuses anything but exact prefixes."""
    return getattr(policies.get(method), "reuse", "all") == "all"


def _missing(item: Item, answer: Answer) -> bool:
    """Whether a span of the prompt was not reused."""
    report = answer.kv_transfer.get("lmcache_blend") or {}
    found = {(start, end) for start, end, kind in report.get("segments", ()) if kind != "miss"}
    exact = int(report.get("local", 0)) + int(report.get("prefix", 0))
    return any(end > exact and (start, end) not in found for start, end in item.prompt.spans)


def _compared(answer: Answer, reference: Answer, tokens: torch.Tensor) -> tuple[float | None, float | None]:
    """KL and top-1 agreement with full prefill, as far as the engine's log probabilities tell them."""
    if answer.logprobs is not None and reference.logprobs is not None:
        scores = metrics.logit_scores(answer.logprobs, reference.logprobs, tokens)
        return scores["kl"], scores["top1_agreement"]
    if answer.top1 and reference.top1:
        return None, sum(a == b for a, b in zip(answer.top1, reference.top1, strict=True)) / len(answer.top1)
    return None, None
