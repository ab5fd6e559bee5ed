"""What serving_bench runs in processes of their own: a vLLM engine with or without the connector, and a job for it."""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmcache_blend.errors import LMCacheBlendError

ANSWER = 8
"""Tokens of an answer."""
POLICIES = ("epic", "attention_value_norm", "cacheblend")
ENGINE = {
    "dtype": "float32",
    "max_model_len": 4096,
    "max_num_batched_tokens": 4096,
    "max_num_seqs": 8,
    "enforce_eager": True,
}
"""Arguments of every engine that is compared."""
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


class JobError(LMCacheBlendError, RuntimeError):
    """A process of the benchmark gave no result; `output` is the end of what it wrote."""

    def __init__(self, reason: str, output: str = ""):
        super().__init__(reason)
        self.output = output


class Engine:
    """An offline LLM with or without the connector."""

    def __init__(self, job: dict[str, Any]):
        from vllm import LLM
        from vllm.config import KVTransferConfig

        extra = job.get("extra")
        named: dict[str, Any] = {**ENGINE, "enforce_eager": not job.get("compiled", False)}
        if extra is not None:
            named["kv_transfer_config"] = KVTransferConfig(
                kv_connector="LMCacheBlendConnector", kv_role="kv_both", kv_connector_extra_config=extra
            )
        self.llm = LLM(model=job["model"], **named)
        self.cached_tokens = 0

    def __call__(
        self, ids: list[int], params: dict[str, Any] | None = None, tokens: int = 1
    ) -> tuple[float, list[int]]:
        """TTFT in ms (for one token) and the answer; vLLM's own prefix cache is emptied first. `cached_tokens` is then
        how many of the prompt's tokens were not computed."""
        from vllm import SamplingParams

        if not self.llm.reset_prefix_cache():
            raise JobError("vLLM's own prefix cache could not be emptied: the connector holds blocks")
        extra = {"kv_transfer_params": params} if params else None
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=extra)
        began = time.perf_counter()
        out = self.llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)[0]
        spent = (time.perf_counter() - began) * 1e3
        self.cached_tokens = out.num_cached_tokens or 0
        return spent, list(out.outputs[0].token_ids)

    def at_once(self, prompts: list[list[int]]) -> list[list[int]]:
        """Answers to prompts that are served side by side."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
        out = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in out]

    def flush(self) -> None:
        self.llm.llm_engine.engine_core.engine_core.scheduler.connector.engine.flush()  # pyright: ignore


def offload_child(job: dict[str, Any]) -> dict[str, Any]:
    """TTFT, answers and cached tokens of the prompts."""
    engine = Engine(job)
    engine(job["warm_up"])
    out: dict[str, list[Any]] = {"ttft_ms": [], "answers": [], "cached_tokens": []}
    for ids in job["prompts"]:
        out["ttft_ms"].append(engine(ids)[0])
        out["cached_tokens"].append(engine.cached_tokens)
        if job.get("extra") is not None:
            engine.flush()
        out["answers"].append(engine(ids, tokens=ANSWER)[1])
    return out


def shuffled(sample: dict[str, Any], seed: int) -> tuple[list[int], list[list[int]]]:
    """Token ids of a prompt of passages in another order, and their spans."""
    ids, spans = list(sample["head"]), []
    for passage in random.Random(seed).sample(sample["passages"], len(sample["passages"])):
        spans.append([len(ids), len(ids) + len(passage)])
        ids += passage
    return ids + sample["question"], spans


def store_passages(engine: Engine, samples: list[dict[str, Any]]) -> None:
    for sample in samples:
        for passage in sample["passages"]:
            engine(passage, {"blend": {"spans": [[0, len(passage)]]}})


def blend_child(job: dict[str, Any]) -> dict[str, Any]:
    engine = Engine(job)
    rows: dict[str, list[float]] = {name: [] for name in ("plain", *POLICIES)}
    store_passages(engine, job["samples"])
    for i, sample in enumerate([job["samples"][0], *job["samples"]]):
        ids, spans = shuffled(sample, i)
        for name in random.Random(i).sample(list(rows), len(rows)):
            ask = {"blend": False if name == "plain" else {"spans": spans, "policy": name, "recompute_ratio": 0.15}}
            ms, _ = engine(ids, ask)
            if i:  # the first prompt warms up
                rows[name].append(ms)
    return rows


def exact_child(job: dict[str, Any]) -> dict[str, Any]:
    """How many prompts have the plain answer when all, when none of their tokens are recomputed, and plain afterwards:
    nothing of the blended ones may be left in vLLM's cache, which is not emptied before."""
    engine, found = Engine(job), {"ratio_1": 0, "full_reuse": 0, "plain_afterwards": 0}
    for i, sample in enumerate(job["samples"]):
        store_passages(engine, [sample])
        ids, spans = shuffled(sample, i)
        plain = engine(ids, {"blend": False}, ANSWER)[1]
        for name, policy, ratio in (("full_reuse", "full_reuse", 0.0), ("ratio_1", "epic", 1.0)):
            ask = {"spans": spans, "policy": policy, "recompute_ratio": ratio}
            found[name] += engine(ids, {"blend": ask}, ANSWER)[1] == plain
            if name == "full_reuse":
                found["plain_afterwards"] += engine.at_once([ids]) == [plain]
    return found


def sharing_child(job: dict[str, Any]) -> dict[str, Any]:
    engine = Engine(job)
    first = engine.at_once(job["prompts"])
    if job.get("extra") is not None:
        engine.flush()
    engine.llm.reset_prefix_cache()
    return {"first": first, "again": engine.at_once(job["prompts"])}


CHILDREN = {"offload": offload_child, "blend": blend_child, "exact": exact_child, "sharing": sharing_child}


def child(kind: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run a job in a process of its own. Raises JobError."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(job, file)
        file.flush()
        command = [sys.executable, "-m", "lmcache_blend.eval.serving_jobs", kind, file.name]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
    return result_of(done.stdout, done.stderr)


def result_of(stdout: str, stderr: str) -> dict[str, Any]:
    """What the last RESULT line of a process says. Raises JobError with the process's own reason where there is none.

    >>> result_of("loading\\nRESULT {\\"ttft_ms\\": [1.5]}\\n", "")
    {'ttft_ms': [1.5]}
    """
    lines = [line for line in stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise JobError(reason(stderr.splitlines()), stderr[-2000:])
    return json.loads(lines[-1].removeprefix("RESULT "))


def reason(lines: Sequence[str]) -> str:
    """The line that says best why a process ended: the last that names an error, or the last at all.

    >>> reason(["Traceback:", "ModuleNotFoundError: No module named 'vllm'", "", "sys:1: leaked"])
    "ModuleNotFoundError: No module named 'vllm'"
    """
    said = [line.strip() for line in lines if line.strip()]
    named = [line for line in said if line.split(":")[0].endswith(("Error", "Exception", "Exit"))]
    return (named or said or ["it ended without a word"])[-1]


if __name__ == "__main__":
    print("RESULT " + json.dumps(CHILDREN[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))), flush=True)
    os._exit(0)  # vLLM's threads must not keep a finished job
