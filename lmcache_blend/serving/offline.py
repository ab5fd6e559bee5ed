"""vLLM in processes of its own, driven step by step so that the first token of every request is timed."""

import os
import time
from collections.abc import Sequence
from typing import Any, cast

import torch

from lmcache_blend.serving.launch import ONE_PROCESS, environment, on_cpu, require_vllm, transfer_config
from lmcache_blend.serving.requests import FORCED, Answer, Request


class OfflineClient:
    """An engine of vLLM over a local model or hub id.

    connector: settings of our KV connector, None for vLLM without it. Raises ConfigError where vLLM is missing.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str,
        max_tokens: int,
        concurrency: int = 1,
        connector: dict[str, Any] | None = None,
        enforce_eager: bool = False,
    ):
        require_vllm()
        if on_cpu():
            os.environ.update(environment(model))
        # A forked child would inherit locks of threads that it has not.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        import vllm
        from vllm.config import KVTransferConfig

        options: dict[str, Any] = {"distributed_executor_backend": ONE_PROCESS} if on_cpu() else {}
        if connector is not None:
            options["kv_transfer_config"] = KVTransferConfig(**transfer_config(connector))
        options |= {"model": model, "dtype": dtype, "max_model_len": max_tokens, "max_num_seqs": concurrency}
        forced = "lmcache_blend.serving.forced:ForcedTokens"
        self._llm = vllm.LLM(max_logprobs=-1, enforce_eager=enforce_eager, logits_processors=[forced], **options)
        self.max_tokens = max_tokens
        self.versions: dict[str, str | int] = {"vllm": vllm.__version__}
        self._count = 0

    def run(self, requests: Sequence[Request]) -> list[Answer]:
        """All requests at once, in one batch as far as vLLM takes them."""
        engine = self._llm.llm_engine
        answers = {}
        started: dict[str, float] = {}
        for request in requests:
            self._count += 1
            name = str(self._count)
            answers[name], started[name] = Answer(), time.perf_counter()
            prompt: Any = {"prompt_token_ids": list(request.tokens)}
            if request.salt:
                prompt["cache_salt"] = request.salt
            engine.add_request(name, prompt, _sampling(request))
        while engine.has_unfinished_requests():
            for output in cast(list[Any], engine.step()):
                now = time.perf_counter()
                answer, completion = answers[output.request_id.partition("-")[0]], output.outputs[0]
                elapsed_ms = 1e3 * (now - started[output.request_id.partition("-")[0]])
                if completion.token_ids and not answer.ttft_ms:
                    answer.ttft_ms = elapsed_ms
                if output.finished:
                    answer.latency_ms = elapsed_ms
                    answer.tokens, answer.text = list(completion.token_ids), completion.text
                    answer.cached_tokens = output.num_cached_tokens or 0
                    answer.kv_transfer = dict(getattr(output, "kv_transfer_params", None) or {})
                    if completion.logprobs is not None:
                        answer.logprobs = _dense(completion.logprobs)
        return list(answers.values())

    def close(self) -> None:
        """End the engine's processes."""
        self._llm.llm_engine.engine_core.shutdown()


def _sampling(request: Request) -> Any:
    from vllm import SamplingParams

    extra: dict[str, Any] = {"kv_transfer_params": request.kv_transfer} if request.kv_transfer else {}
    forced = list(request.forced)
    return SamplingParams(
        temperature=0.0,
        max_tokens=len(forced) or request.max_tokens,
        ignore_eos=True,  # the model's own end is among stop_ids, and forced tokens end nowhere before their last
        stop_token_ids=None if forced else list(request.stop_ids),
        logprobs=-1 if forced else None,
        flat_logprobs=bool(forced),
        detokenize=not forced,
        extra_args={**extra, **({FORCED: forced} if forced else {})} or None,
    )


def _dense(flat: Any) -> torch.Tensor:
    """[n, V] float32 from vLLM's flat lists of (token, logprob), the whole vocabulary at each position."""
    rows = []
    for start, end in zip(flat.start_indices, flat.end_indices, strict=True):
        ids = torch.tensor(flat.token_ids[start:end])
        row = torch.full((int(ids.max()) + 1,), float("-inf"))
        row[ids] = torch.tensor(flat.logprobs[start:end])
        rows.append(row)
    return torch.stack(rows)
