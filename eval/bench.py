"""TTFT of every method against the model's own full prefill, in turns in one process: `make bench`.

Each round runs transformers' own forward (logits of the last token only, KV kept), the runner's full prefill, and every
method on the same prompt; ratios are taken within a round, so that a machine that slows down slows both sides. The
overhead of a method is its TTFT ratio over its true compute fraction.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from lmcache_blend.blend import Blender, policies
from lmcache_blend.config import BlendConfig
from lmcache_blend.eval.tasks import load_task, nearest_prompts
from lmcache_blend.hf import HFRunner, load_runner
from lmcache_blend.types import Prompt

METHODS = ("full_recompute", "prefix_cache", "full_reuse", "random", "epic", "cacheblend", "query_attention",
           "attention_value_norm")  # fmt: skip


def own_prefill_ms(runner: HFRunner, prompt: Prompt) -> float:
    """Wall time of model(input_ids) of transformers up to the first token, with its own attention and cache."""
    began = time.perf_counter()
    with torch.inference_mode():
        out = runner.model(input_ids=prompt.tokens[None].to(runner.device), logits_to_keep=1, use_cache=True)
        out.logits[0, -1].argmax().item()
    return (time.perf_counter() - began) * 1e3


def bench(
    runner: HFRunner, prompts: Sequence[Prompt], methods: Sequence[str], ratio: float, repeats: int
) -> list[dict[str, Any]]:
    """One row a method: medians over all rounds of its TTFT over transformers' and the runner's full prefill."""
    blender = Blender(runner, BlendConfig(recompute_ratio=ratio, store_misses=False))
    against_own: dict[str, list[float]] = {m: [] for m in methods}
    against_full: dict[str, list[float]] = {m: [] for m in methods}
    fractions: dict[str, list[float]] = {m: [] for m in methods}
    rounds = [(p, r) for p in prompts for r in range(repeats)]
    for prompt, repeat in tqdm(rounds, desc="rounds", unit="round", disable=None):
        blender.store(prompt)
        if repeat == 0:  # code is compiled and buffers are taken outside the measurement
            own_prefill_ms(runner, prompt)
            for method in methods:
                blender.prefill(prompt, policy=method)
        own = own_prefill_ms(runner, prompt)
        full = blender.prefill(prompt, policy="full_recompute").trace.ttft_ms
        for method in methods:
            trace = blender.prefill(prompt, policy=method).trace if method != "full_recompute" else None
            spent = full if trace is None else trace.ttft_ms
            against_own[method].append(spent / own)
            against_full[method].append(spent / full)
            fractions[method].append(1.0 if trace is None else trace.compute_fraction)
    return [
        {
            "method": m,
            "recompute_ratio": None if policies.get(m).fixed_ratio is not None else ratio,
            "ttft_over_transformers": statistics.median(against_own[m]),
            "ttft_over_full_recompute": statistics.median(against_full[m]),
            "compute_fraction": statistics.mean(fractions[m]),
            "overhead": statistics.median(o / f for o, f in zip(against_full[m], fractions[m], strict=True)),
            "rounds": len(rounds),
            "tokens": statistics.mean(len(p) for p in prompts),
            "threads": torch.get_num_threads(),
        }
        for m in methods
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lmcache_blend.eval.bench", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--task", default="people_qa")
    parser.add_argument("--data", type=Path, help="JSONL of prompts, e.g. squad_rag10.jsonl")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--recompute-ratio", type=float, default=0.15)
    parser.add_argument("--tokens", type=int, default=1800, help="prompts nearest to this length are taken")
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3, help="rounds a prompt")
    parser.add_argument("--json", help="write the rows there too, - for stdout")
    given = parser.parse_args(argv)
    runner = load_runner(given.model, dtype="float32")
    task = load_task(given.task, given.data, 100, 0)
    prompts = nearest_prompts(task, runner, given.tokens, given.prompts)
    rows = bench(runner, prompts, given.methods.split(","), given.recompute_ratio, given.repeats)
    title = (
        f"{given.model}, {task.name}, {rows[0]['tokens']:.0f} tokens, ratio {given.recompute_ratio}, "
        f"{rows[0]['rounds']} rounds, {rows[0]['threads']} threads (median of ratios)"
    )
    table = Table(title=title)
    for head in ("method", "TTFT / transformers", "TTFT / full prefill", "true compute", "overhead"):
        table.add_column(head, justify="left" if head == "method" else "right")
    for row in rows:
        figures = (
            row[k] for k in ("ttft_over_transformers", "ttft_over_full_recompute", "compute_fraction", "overhead")
        )
        table.add_row(row["method"], *(f"{x:.3f}" for x in figures))
    Console(width=110).print(table)
    if given.json:
        text = json.dumps(rows, indent=1)
        print(text) if given.json == "-" else Path(given.json).write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
