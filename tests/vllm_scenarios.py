"""Scenarios of tests/test_serving_vllm.py, each in a process of its own: python vllm_scenarios.py NAME MODEL FOLDER.

A scenario prints one line of JSON. Engines come and go with the process, so memory and global state stay bounded.
Without arguments, scenarios come as lines [NAME, MODEL, FOLDER] from stdin and each runs in a fork: vLLM is imported
once, which takes longer than most scenarios.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_CPU_KVCACHE_SPACE="1",
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="WARNING",
    VLLM_PLUGINS="lmcache_blend",
)
VOCABULARY = 2000


def text(seed: int, n: int) -> list[int]:
    return [random.Random(f"{seed} {i}").randrange(5, VOCABULARY) for i in range(n)]


class Server:
    """An offline LLM; extra: the connector's settings, None for no connector."""

    def __init__(self, model: str, extra: dict[str, Any] | None, **options: Any):
        from vllm import LLM
        from vllm.config import KVTransferConfig

        named = {"max_model_len": 2048, "max_num_batched_tokens": 2048, "max_num_seqs": 8, "enforce_eager": True}
        if extra is not None:
            named["kv_transfer_config"] = KVTransferConfig(
                kv_connector="LMCacheBlendConnector", kv_role="kv_both", kv_connector_extra_config=extra
            )
        self.llm = LLM(model=model, dtype="float32", skip_tokenizer_init=True, **{**named, **options})
        self.core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler

    def __call__(self, prompts: list[list[int]], params: Any = None, tokens: int = 6, salt: str = "") -> list[Any]:
        """Answers to all prompts at once: (token ids, kv_transfer_params) each. params: of all, or one each."""
        from vllm import SamplingParams

        params = params if isinstance(params, list) else [params] * len(prompts)
        sampling = [
            SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False,
                           extra_args={"kv_transfer_params": p} if p else None)
            for p in params
        ]  # fmt: skip
        inputs = [{"prompt_token_ids": p, **({"cache_salt": salt} if salt else {})} for p in prompts]
        out = self.llm.generate(inputs, sampling, use_tqdm=False)
        return [(list(o.outputs[0].token_ids), (o.kv_transfer_params or {}).get("lmcache_blend")) for o in out]

    def tokens(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        return [tokens for tokens, _ in self(*args, **kwargs)]

    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def forget(self) -> None:
        """Empty vLLM's own prefix cache."""
        assert self.llm.reset_prefix_cache()

    def flush(self) -> None:
        self.scheduler.connector.engine.flush()


def mixed() -> list[list[int]]:
    """Prompts that share prefixes of several lengths, some twice."""
    a, b = text(1, 300), text(2, 150)
    prompts = [a + text(10 + i, 40 + 13 * i) for i in range(5)] + [b + text(20 + i, 30) for i in range(3)]
    return [*prompts, a, a[:256], prompts[0], text(3, 20)]


def plain(model: str, folder: Path) -> Any:
    return Server(model, None).tokens(mixed())


def disk(folder: Path, **settings: Any) -> dict[str, Any]:
    return {"tiers": [{"tier": "disk", "path": str(folder / "kv")}], "chunk_tokens": 64, **settings}


def offload(model: str, folder: Path, settings: dict[str, Any] | None = None, **options: Any) -> Any:
    """All prompts at once, into and out of the disk tier."""
    server = Server(model, disk(folder, **(settings or {})), **options)
    free = server.free_blocks()
    out = server(mixed(), {"breakdown": True})
    server.flush()
    hits = [(report or {}).get("prefix", 0) for _, report in out]
    return {"tokens": [t for t, _ in out], "hits": hits, "leaked": free - server.free_blocks()}


def chunked(model: str, folder: Path) -> Any:
    """As offload, with prefills in pieces of 100 tokens."""
    server = Server(model, disk(folder), max_num_batched_tokens=100)
    out = server(mixed(), {"breakdown": True})
    server.forget()
    again = server(mixed(), {"breakdown": True})
    return {"tokens": [t for t, _ in out], "again": [t for t, _ in again], "hits": [r["prefix"] for _, r in again]}


def later(model: str, folder: Path) -> Any:
    return offload(model, folder, {"async_load": True})


def layered(model: str, folder: Path) -> Any:
    """KV comes and goes layer by layer while the forward computes, as where that is not on the CPU."""
    return offload(model, folder, {"layerwise": True})


def damaged(model: str, folder: Path) -> Any:
    """Every stored file has a byte flipped: nothing may be served from it, and nothing may fail. The damage lies in
    a late layer, which the forward finds out only in its middle."""
    files = [p for p in (folder / "kv").rglob("*") if p.is_file() and p.stat().st_size > 4096]
    for path in files:
        data = bytearray(path.read_bytes())
        data[len(data) * 3 // 4] ^= 1
        path.write_bytes(data)
    server = Server(model, disk(folder, layerwise=True))
    out = server(mixed(), {"breakdown": True})
    return {"tokens": [t for t, _ in out], "files": len(files)}


def lossy(model: str, folder: Path) -> Any:
    """int8 below a small cpu tier: keys are kept before RoPE; answers may differ, storing and loading must work."""
    server = Server(model, disk(folder, codec="int8"))
    prompt = text(1, 300)
    first = server.tokens([prompt])
    server.flush()
    server.forget()
    again = server([prompt], {"breakdown": True})[0]
    size = sum(p.stat().st_size for p in (folder / "kv").rglob("*") if p.is_file())
    return {"first": first[0], "again": again[0], "hits": again[1]["prefix"], "bytes": size}


def aborts(model: str, folder: Path) -> Any:
    """Requests that are aborted while they wait, load and compute leave no block and no state behind."""
    from vllm import SamplingParams

    server = Server(model, disk(folder, async_load=True))
    engine = server.llm.llm_engine
    server.tokens(mixed())
    server.flush()
    server.forget()
    free = server.free_blocks()
    for steps in (0, 1, 2, 4):
        names = []
        for i, prompt in enumerate(mixed()):
            sampling = SamplingParams(max_tokens=20)
            names.append(engine.add_request(f"{steps}-{i}", {"prompt_token_ids": prompt}, sampling))
        for _ in range(steps):
            engine.step()
        assert engine.output_processor.has_unfinished_requests()
        engine.abort_request(names, internal=True)
        assert not engine.output_processor.has_unfinished_requests()
        for _ in range(200):
            engine.step()
            if not server.scheduler.has_finished_requests() and not server.scheduler.requests:
                break
    left = len(server.scheduler.connector.here.states)
    tokens = server.tokens(mixed())  # an idle scheduler does not ask for loads that came too late: the next step does
    return {"leaked": free - server.free_blocks(), "states": left, "tokens": tokens}


def decode(model: str, folder: Path) -> Any:
    """KV of generated tokens is stored on request, and serves the next turn."""
    server = Server(model, disk(folder, save_decode_cache=True))
    prompt = text(5, 100)
    answer = server.tokens([prompt], tokens=100)[0]
    server.flush()
    server.forget()
    turn = prompt + answer + text(6, 30)
    out = server([turn], {"breakdown": True})[0]
    server.forget()
    plain = server([turn], None, salt="another tenant")[0]
    return {"hits": out[1]["prefix"], "tokens": out[0], "plain": plain[0]}


# ---------------------------------------------------------------------- blend
def passages(n: int = 5) -> list[list[int]]:
    return [text(100 + i, 90 + 17 * i) for i in range(n)]


def joined(pieces: list[list[int]], head: list[int], tail: list[int]) -> tuple[list[int], list[list[int]]]:
    """A prompt and the spans of its pieces."""
    ids, spans = list(head), []
    for piece in pieces:
        spans.append([len(ids), len(ids) + len(piece)])
        ids += piece
    return ids + tail, spans


def blend_settings(folder: Path, **blend: Any) -> dict[str, Any]:
    return {"tiers": ["cpu"], "chunk_tokens": 64, "blend": {"match": "spans", "policy": "epic", **blend}}


POLICIES = [("epic", {}), ("random", {}), ("query_attention", {}), ("attention_value_norm", {}), ("cacheblend", {}),
            ("cacheblend", {"check": "gradual"}), ("full_reuse", {})]  # fmt: skip


def blend(model: str, folder: Path, tiers: Sequence[Any] = ("cpu",), **options: Any) -> Any:
    """Ratio 1.0 in any order, every policy, poisoning, first-time prompts, new and repeated passages."""
    extra = {**blend_settings(folder), "tiers": list(tiers)}
    server = Server(model, extra, **options)
    refused = server.scheduler.connector.here.blend_refused
    free = server.free_blocks()
    head, tail = text(7, 70), text(8, 25)
    pieces = passages()
    out: dict[str, Any] = {"refused": refused, "same": {}, "reports": {}, "policies": {}}
    store = [server([p], {"blend": {"spans": [[0, len(p)]]}}, tokens=1) for p in pieces]
    assert len(store) == len(pieces)
    settle(folder)
    cases = {
        "reordered": [pieces[i] for i in (3, 0, 4, 1, 2)],
        "repeated": [pieces[1], pieces[1], pieces[2], pieces[1]],
        "new in the middle": [pieces[0], text(50, 80), pieces[3]],
        "first time": [text(51, 80), text(52, 90)],
        "all": [pieces[2], pieces[4]],
    }
    for name, chosen in cases.items():
        ids, spans = joined(chosen, [] if name == "all" else head, tail)
        plain = server.tokens([ids], {"blend": False}, salt="reference of its own")[0]
        full = {"blend": {"spans": spans, "recompute_ratio": 1.0}, "breakdown": True}
        got, report = server([ids], full)[0]
        out["same"][name], out["reports"][name] = got == plain, report
        # A plain request after it must not see blended blocks.
        server([ids], {"blend": {"spans": spans, "recompute_ratio": 0.0}})
        out["same"][f"{name}, plain after it"] = server.tokens([ids], {"blend": False})[0] == plain
    ids, spans = joined([pieces[i] for i in (4, 2, 0)], head, tail)
    exact = server.tokens([ids], {"blend": False}, salt="reference of its own")[0]
    for policy, settings in POLICIES:
        ask = {"spans": spans, "policy": policy, "options": settings, "recompute_ratio": 0.2}
        got, report = server([ids], {"blend": ask, "breakdown": True}, salt="")[0]
        out["policies"][f"{policy} {settings}"] = {"tokens": got, **report}
    # Nothing above would show that KV is wrong if this model did not care.
    out["full reuse differs"] = out["policies"]["full_reuse {}"]["tokens"] != exact
    ids, spans = joined([pieces[i] for i in (0, 1, 2)], head, tail)
    plain = server.tokens([ids], {"blend": False}, salt="a third tenant")[0]
    for name, kv in {
        "another tenant": {"blend": {"spans": spans, "recompute_ratio": 0.0, "tenant": "else"}, "breakdown": True},
        "off": {"blend": {"enabled": False}, "breakdown": True},
    }.items():
        got, report = server([ids], kv)[0]
        out["same"][name] = got == plain and not report.get("segment")
    bad = server([ids], {"blend": {"spans": [[5, 2]]}})[0]
    out["bad spans"] = [bad[0] == plain, (bad[1] or {}).get("error")]
    # Several at once, blended and plain.
    prompts = [joined([pieces[i] for i in order], head, tail) for order in ((0, 1, 2), (2, 1, 0), (3, 4), (1, 3))]
    wanted = [server.tokens([p], {"blend": False}, salt="a fourth tenant")[0] for p, _ in prompts]
    ask = [
        {"blend": {"spans": s, "recompute_ratio": 1.0}} if i % 2 else {"blend": False}
        for i, (_, s) in enumerate(prompts)
    ]
    out["same"]["several at once"] = server.tokens([p for p, _ in prompts], ask) == wanted
    out["leaked"] = free - server.free_blocks()
    return out


def two_ranks(model: str, folder: Path) -> Any:
    """Tensor parallel: each of two processes has half of the heads, and its own chunks on the disk that both share."""
    tiers = [{"tier": "disk", "path": str(folder / "kv")}]
    return blend(model, folder, tiers, tensor_parallel_size=2, distributed_executor_backend="mp")


def offload_two_ranks(model: str, folder: Path) -> Any:
    out = offload(model, folder, tensor_parallel_size=2, distributed_executor_backend="mp")
    settle(folder)
    return out


def settle(folder: Path) -> None:
    """Wait until no process writes to the disk tier any more."""
    seen = None
    while seen != (seen := sorted(folder.rglob("*"))):
        time.sleep(0.5)


def slices(model: str, folder: Path) -> Any:
    return blend(model, folder, max_num_batched_tokens=64, max_num_seqs=4)


def compiled(model: str, folder: Path) -> Any:
    return blend(model, folder, enforce_eager=False)


def kernels(model: str, folder: Path) -> Any:
    """Recomputed rows and probes through the operators that CUDA takes; here these run their CPU path."""
    from lmcache_blend.serving import attend

    seen = {"selective_attention": 0, "attention_mass": 0}
    for name in seen:

        def counted(*args: Any, name: str = name, own: Any = getattr(attend, name), **named: Any) -> Any:
            seen[name] += 1
            return own(*args, **named)

        setattr(attend, name, counted)
    attend.DEVICES = frozenset({"cpu"})
    return {**blend(model, folder), "calls": seen}


def by_runs(model: str, folder: Path) -> Any:
    """Recomputed rows by vLLM's own attention, as where this package's operators do not fit."""
    from lmcache_blend.serving import attend

    attend.MASK_NUMBERS = 0
    return blend(model, folder)


def kernels_compiled(model: str, folder: Path) -> Any:
    from lmcache_blend.serving import attend

    attend.DEVICES = frozenset({"cpu"})
    return compiled(model, folder)


def crowded(model: str, folder: Path) -> Any:
    """So few blocks that requests are preempted and come back, blended ones too."""
    server = Server(model, blend_settings(folder), num_gpu_blocks_override=12, max_num_seqs=4, max_model_len=1024)
    pieces, head, tail = passages(), text(7, 70), text(8, 25)
    for p in pieces:
        server([p], {"blend": {"spans": [[0, len(p)]]}}, tokens=1)
    prompts = [joined([pieces[i] for i in order], head, tail) for order in ((0, 1), (1, 0), (2, 1), (1, 3))]
    wanted = [server.tokens([p], {"blend": False}, salt="reference", tokens=120)[0] for p, _ in prompts]
    ask = [{"blend": {"spans": s, "recompute_ratio": 1.0}} for _, s in prompts]
    preempted = []
    own = server.scheduler._preempt_request

    def preempt(request: Any, *args: Any, **named: Any) -> Any:
        preempted.append(request.request_id)
        return own(request, *args, **named)

    server.scheduler._preempt_request = preempt
    got = server.tokens([p for p, _ in prompts], ask, tokens=120)
    return {"same": got == wanted, "preempted": len(preempted)}


def content(model: str, folder: Path) -> Any:
    """No spans, no separator: passages are found by what they say, also in a second process."""
    server = Server(model, {**disk(folder), "blend": {"match": "content", "policy": "epic", "recompute_ratio": 1.0,
                                                      "index": str(folder / "segments.idx")}})  # fmt: skip
    pieces, head, tail = [text(200 + i, 400) for i in range(3)], text(7, 33), text(8, 25)
    first, _ = joined(pieces, head, tail)
    second, _ = joined([pieces[2], text(300, 71), pieces[0]], text(9, 57), tail)
    a = server([first], {"breakdown": True})[0]
    server.flush()
    b = server([second], {"breakdown": True})[0]
    plain = server.tokens([second], {"blend": False}, salt="reference")[0]
    return {"first": (a[1] or {}).get("segment", 0), "second": b[1].get("segment", 0), "same": b[0] == plain}


def separator(model: str, folder: Path) -> Any:
    server = Server(model, {"tiers": ["cpu"], "blend": {"match": "separator", "separator": [3, 4], "policy": "epic",
                                                        "recompute_ratio": 1.0}})  # fmt: skip
    a, b, mark, tail = text(31, 100), text(32, 120), [3, 4], text(8, 25)
    server([a + mark + b + mark + tail])
    ids = b + mark + a + mark + tail
    got, report = server([ids], {"breakdown": True})[0]
    return {"segment": report["segment"], "same": got == server.tokens([ids], {"blend": False}, salt="reference")[0]}


def refused(model: str, folder: Path) -> Any:
    """A model whose nested forward is wrong fails the self-test; prefixes are served all the same."""
    from lmcache_blend.serving.runner import VLLMRunner

    own = VLLMRunner.run

    def shifted(self: Any, ids: Any, kv: Any, rows: Any) -> Any:
        return own(self, ids, kv, rows if len(rows) == 1 or int(rows[0]) == 0 else rows - 1)

    VLLMRunner.run = shifted
    server = Server(model, blend_settings(folder))
    ids = text(1, 200)
    first = server.tokens([ids])
    server.forget()
    again = server([ids], {"breakdown": True})[0]
    here = server.scheduler.connector.here
    return {"refused": here.blend_refused, "same": again[0] == first[0], "hits": again[1]["prefix"]}


SCENARIOS = {
    f.__name__: f
    for f in (plain, offload, chunked, later, layered, damaged, lossy, aborts, decode, blend, slices, compiled, kernels,
              by_runs, kernels_compiled, two_ranks, offload_two_ranks, crowded, content, separator, refused)
}  # fmt: skip

PATIENCE_S = 180


def run(name: str, model: str, folder: str) -> None:
    try:
        print("RESULT " + json.dumps(SCENARIOS[name](model, Path(folder)), default=str), flush=True)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # vLLM's own threads must not keep a finished scenario


def run_lines() -> None:
    import vllm.entrypoints.llm
    import vllm.v1.engine.core
    import vllm.v1.worker.cpu_model_runner
    import vllm.v1.worker.cpu_worker  # noqa: F401

    for line in sys.stdin:
        child = os.fork()
        if not child:
            signal.alarm(PATIENCE_S)
            run(*json.loads(line))
        os.waitpid(child, 0)
        print("END", flush=True)


if __name__ == "__main__":
    run(*sys.argv[1:]) if sys.argv[1:] else run_lines()
