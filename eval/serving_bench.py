"""What offload and blend mode are worth in a real vLLM: python -m lmcache_blend.eval.serving_bench --model M --data F.

Offload: TTFT of 2,000-token prompts without the connector, with it (cold, storing), and in a second process from the
disk tier (warm), bit for bit and with a codec; a process each, in turns. Blend: TTFT of 10-passage prompts from chunks
in memory, per policy, against plain prefill of the same prompts in the same engine, in turns. Exact: prompts of
shuffled passages at ratio 1.0, and many at once that share prefixes, must have the answers of an engine without the
connector. All ratios are medians of per-prompt ratios. TTFT is the wall time of generate(max_tokens=1). Needs vLLM and
the plugin installed.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

EXACT_PROMPTS, SHARING, ANSWER = 30, 50, 8
"""Prompts at ratio 1.0; prompts at once; tokens of an answer."""
POLICIES = ("epic", "attention_value_norm", "cacheblend")
OFFLOAD_TOKENS, PROMPTS, ROUNDS = 2000, 3, 3
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


class Engine:
    """An offline LLM with or without the connector."""

    def __init__(self, job: dict[str, Any]):
        from vllm import LLM
        from vllm.config import KVTransferConfig

        extra = job.get("extra")
        named: dict[str, Any] = {}
        if extra is not None:
            named["kv_transfer_config"] = KVTransferConfig(
                kv_connector="LMCacheBlendConnector", kv_role="kv_both", kv_connector_extra_config=extra
            )
        self.llm = LLM(
            model=job["model"], dtype="float32", max_model_len=4096, max_num_batched_tokens=4096, max_num_seqs=8,
            enforce_eager=not job.get("compiled", False), **named,
        )  # fmt: skip
        self.salt = 0

    def __call__(
        self, ids: list[int], params: dict[str, Any] | None = None, tokens: int = 1
    ) -> tuple[float, list[int]]:
        """TTFT in ms (for one token) and the answer; vLLM's own prefix cache is emptied first."""
        from vllm import SamplingParams

        self.llm.reset_prefix_cache()
        extra = {"kv_transfer_params": params} if params else None
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args=extra)
        began = time.perf_counter()
        out = self.llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)[0]
        return (time.perf_counter() - began) * 1e3, list(out.outputs[0].token_ids)

    def at_once(self, prompts: list[list[int]]) -> list[list[int]]:
        """Answers to prompts that are served side by side."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
        out = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in out]

    def flush(self) -> None:
        self.llm.llm_engine.engine_core.engine_core.scheduler.connector.engine.flush()  # pyright: ignore


def offload_child(job: dict[str, Any]) -> dict[str, Any]:
    """TTFT and answers of the prompts, and the time from the first to the eighth token (warms nothing)."""
    engine = Engine(job)
    engine(job["warm_up"])
    ttft, answers = [], []
    for ids in job["prompts"]:
        ms, _ = engine(ids)
        ttft.append(ms)
        if job.get("extra") is not None:
            engine.flush()
        answers.append(engine(ids, tokens=8)[1])
    return {"ttft_ms": ttft, "answers": answers}


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


def sharing_prompts(samples: list[dict[str, Any]]) -> list[list[int]]:
    """Prompts of one to four passages, by fives with the same first ones."""
    out = []
    for i in range(SHARING):
        shared, own = samples[i // 5], samples[(7 * i + 11) % len(samples)]
        passages = shared["passages"][: 1 + i % 3] + own["passages"][: i % 2]
        out.append([*shared["head"], *(t for p in passages for t in p), *own["question"]])
    return out


def exact(model: str, samples: list[dict[str, Any]]) -> dict[str, Any]:
    tiers = [{"tier": "cpu", "capacity_bytes": 3 << 30}]
    extra = {"tiers": tiers, "offload": False, "blend": {"match": "spans"}}
    found = child("exact", {"model": model, "samples": samples[:EXACT_PROMPTS], "extra": extra})
    count = min(EXACT_PROMPTS, len(samples))
    prompts = sharing_prompts(samples)
    plain = child("sharing", {"model": model, "prompts": prompts})
    with tempfile.TemporaryDirectory(prefix="lmcache_blend_") as folder:
        ours = child(
            "sharing", {"model": model, "prompts": prompts, "extra": {"tiers": [{"tier": "disk", "path": folder}]}}
        )
    same = {name: sum(a == b for a, b in zip(ours[name], plain["first"], strict=True)) for name in ours}
    return {
        "prompts": count,
        "answers_as_plain": found,
        "sharing_prompts": len(prompts),
        "sharing_as_without_connector": same,
        "without_connector_itself": sum(a == b for a, b in zip(plain["again"], plain["first"], strict=True)),
    }


CHILDREN = {"offload": offload_child, "blend": blend_child, "exact": exact_child, "sharing": sharing_child}


def child(kind: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run a job in a process of its own."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(job, file)
        file.flush()
        command = [sys.executable, "-m", "lmcache_blend.eval.serving_bench", "--child", kind, file.name]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise RuntimeError(f"benchmark process failed: {done.stderr[-2000:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def ratio(over: list[float], under: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(over, under, strict=True)), 4)


def offload(model: str, prompts: list[list[int]], warm_up: list[int], codec: Any, rounds: int) -> dict[str, Any]:
    """Rows cold, warm and, with a codec, coded; ratios to an engine without the connector, prompt by prompt."""
    seen: dict[str, list[float]] = {name: [] for name in ("plain", "cold", "warm", "coded_cold", "coded_warm")}
    sizes, same, job = {}, [], {"model": model, "prompts": prompts, "warm_up": warm_up}
    for _ in range(rounds):
        plain = child("offload", job)
        seen["plain"] += plain["ttft_ms"]
        for prefix, chosen in [("", None)] + ([("coded_", codec)] if codec else []):
            folder = tempfile.mkdtemp(prefix="lmcache_blend_")
            try:
                extra = {"tiers": [{"tier": "disk", "path": folder}], "codec": chosen}
                for name in ("cold", "warm"):
                    result = child("offload", {**job, "extra": extra})
                    seen[prefix + name] += result["ttft_ms"]
                    if not prefix:
                        same.append(result["answers"] == plain["answers"])
                sizes[prefix or "raw_"] = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
            finally:
                shutil.rmtree(folder)
    out = {f"{name}_ttft_ratio": ratio(ms, seen["plain"]) for name, ms in seen.items() if ms and name != "plain"}
    out |= {f"{name}_ttft_ms": round(statistics.median(ms), 1) for name, ms in seen.items() if ms}
    out["identical_answers"] = all(same)
    out["raw_bytes"] = sizes["raw_"]
    if codec:
        out |= {"coded_bytes": sizes["coded_"], "bytes_ratio": round(sizes["coded_"] / sizes["raw_"], 4)}
    return out


def main() -> None:
    if len(sys.argv) == 4 and sys.argv[1] == "--child":
        print("RESULT " + json.dumps(CHILDREN[sys.argv[2]](json.loads(Path(sys.argv[3]).read_text()))), flush=True)
        os._exit(0)  # vLLM's threads must not keep a finished job
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or alias")
    parser.add_argument("--data", required=True, help="JSONL with contexts and question, such as squad_rag10")
    parser.add_argument("--codec", help="id or JSON of the codec to measure beside raw")
    parser.add_argument("--parts", default="offload,blend,compiled,exact")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--output", default="-", help="JSON file, - for stdout only")
    args = parser.parse_args()

    from transformers import AutoTokenizer

    from lmcache_blend.hf import resolve_model

    model = str(resolve_model(args.model))
    tokenizer = AutoTokenizer.from_pretrained(model)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    data = [json.loads(line) for line in Path(args.data).read_text().splitlines() if line.strip()]
    head = ids("Answer the question from the documents.\n\n")
    samples: list[dict[str, Any]] = []
    for row in data:
        passages = [ids(f"Document: {c}\n\n") for c in row["contexts"]]
        samples.append({"head": head, "passages": passages, "question": ids(f"Question: {row['question']}\nAnswer:")})
    near = sorted(samples, key=lambda s: abs(sum(map(len, s["passages"])) - 1760))[: args.prompts]
    stream = [t for s in samples for p in s["passages"] for t in p]
    prompts = [stream[i * OFFLOAD_TOKENS : (i + 1) * OFFLOAD_TOKENS] for i in range(args.prompts)]
    codec = json.loads(args.codec) if args.codec and args.codec.startswith("{") else args.codec
    report: dict[str, Any] = {"model": args.model, "tokens": OFFLOAD_TOKENS, "rounds": args.rounds}
    if "offload" in args.parts:
        report["offload"] = offload(model, prompts, stream[-300:], codec, args.rounds)
    if "exact" in args.parts:
        report["exact"] = exact(model, samples)
    for part in ("blend", "compiled"):
        if part in args.parts.split(","):
            # No prefixes: after a plain request, a blended one of the same prompt would find all of it.
            tiers = [{"tier": "cpu", "capacity_bytes": 2 << 30}]
            extra = {"tiers": tiers, "offload": False, "blend": {"match": "spans"}}
            job = {"model": model, "samples": near, "extra": extra, "compiled": part == "compiled"}
            rows = child("blend", job)
            report[part] = {f"{name}_ttft_ratio": ratio(rows[name], rows["plain"]) for name in POLICIES}
            report[part]["plain_ttft_ms"] = round(statistics.median(rows["plain"]), 1)
    text = json.dumps(report, indent=2)
    print(text)
    if args.output != "-":
        Path(args.output).write_text(text)


if __name__ == "__main__":
    main()
