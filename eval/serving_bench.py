"""What offload and blend mode are worth in a real vLLM: python -m lmcache_blend.eval.serving_bench --model M --data F.

Offload: TTFT of 2,000-token prompts without the connector, with it (cold, storing), and in a second process from the
disk tier (warm), bit for bit and with a codec; a process each, in turns. With --lmcache-python also in a vLLM with
LMCache's multiprocess mode, warm from its server's memory. Blend: TTFT of 10-passage prompts from chunks in memory, per
policy, against plain prefill of the same prompts in the same engine, in turns. Exact: prompts of shuffled passages at
ratio 1.0, and many at once that share prefixes, must have the answers of an engine without the connector. All ratios
are medians of per-prompt ratios. TTFT is the wall time of generate(max_tokens=1). Needs vLLM and the plugin installed.
"""

import argparse
import importlib.util
import json
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lmcache_blend.errors import ConfigError, DataError, LMCacheBlendError, ModelNotFoundError, UnknownNameError
from lmcache_blend.eval import serving_peer
from lmcache_blend.eval.serving_jobs import POLICIES, JobError, child
from lmcache_blend.eval.serving_table import table

EXACT_PROMPTS, SHARING = 30, 50
"""Prompts at ratio 1.0; prompts at once."""
OFFLOAD_TOKENS, WARM_UP, PROMPTS, ROUNDS = 2000, 300, 3, 3
PARTS = ("offload", "blend", "compiled", "exact")
PATIENCE = 60.0, 10.0
"""Seconds for a job of the peer, and how many times as long as this package's own it may take besides."""


def sharing_prompts(samples: list[dict[str, Any]], count: int) -> list[list[int]]:
    """Prompts of one to four passages, by fives with the same first ones."""
    out = []
    for i in range(count):
        shared, own = samples[i // 5 % len(samples)], samples[(7 * i + 11) % len(samples)]
        passages = shared["passages"][: 1 + i % 3] + own["passages"][: i % 2]
        out.append([*shared["head"], *(t for p in passages for t in p), *own["question"]])
    return out


def exact(model: str, samples: list[dict[str, Any]], count: int, sharing: int) -> dict[str, Any]:
    tiers = [{"tier": "cpu", "capacity_bytes": 3 << 30}]
    extra = {"tiers": tiers, "offload": False, "blend": {"match": "spans"}}
    found = child("exact", {"model": model, "samples": samples[:count], "extra": extra})
    out = {"prompts": min(count, len(samples)), "answers_as_plain": found}
    if not sharing:
        return out
    prompts = sharing_prompts(samples, sharing)
    plain = child("sharing", {"model": model, "prompts": prompts})
    with tempfile.TemporaryDirectory(prefix="lmcache_blend_") as folder:
        ours = child(
            "sharing", {"model": model, "prompts": prompts, "extra": {"tiers": [{"tier": "disk", "path": folder}]}}
        )
    same = {name: sum(a == b for a, b in zip(ours[name], plain["first"], strict=True)) for name in ours}
    return {
        **out,
        "sharing_prompts": len(prompts),
        "sharing_as_without_connector": same,
        "without_connector_itself": sum(a == b for a, b in zip(plain["again"], plain["first"], strict=True)),
    }


def ratio(over: list[float], under: list[float]) -> float:
    """Median of the ratios, prompt by prompt.

    >>> ratio([1.0, 8.0, 3.0], [2.0, 4.0, 4.0])
    0.75
    """
    return round(statistics.median(a / b for a, b in zip(over, under, strict=True)), 4)


class Runs:
    """Results of the offload job by the name of the run, round after round, against those of `plain`."""

    def __init__(self) -> None:
        self.ttft_ms: dict[str, list[float]] = {}
        self.cached: dict[str, list[int]] = {}
        self.same: dict[str, bool] = {}
        self.plain: dict[str, Any] = {}

    def add(self, name: str, result: dict[str, Any]) -> None:
        """`plain` comes first in every round."""
        if name == "plain":
            self.plain = result
        self.ttft_ms.setdefault(name, []).extend(result["ttft_ms"])
        self.cached.setdefault(name, []).extend(result["cached_tokens"])
        self.same[name] = self.same.get(name, True) and result["answers"] == self.plain["answers"]

    def drop(self, prefix: str) -> None:
        """Forget the runs of a peer that failed in a later round: its prompts are no longer those of `plain`."""
        for seen in (self.ttft_ms, self.cached, self.same):
            for name in [n for n in seen if n.startswith(prefix)]:
                del seen[name]

    def summary(self) -> dict[str, Any]:
        """<run>_ttft_ratio over plain, <run>_ttft_ms and <run>_cached_tokens (medians), and identical answers."""
        plain, runs = self.ttft_ms["plain"], [name for name in self.ttft_ms if name != "plain"]
        out: dict[str, Any] = {f"{name}_ttft_ratio": ratio(self.ttft_ms[name], plain) for name in runs}
        out |= {f"{name}_ttft_ms": round(statistics.median(ms), 1) for name, ms in self.ttft_ms.items()}
        out |= {f"{name}_cached_tokens": statistics.median_low(self.cached[name]) for name in runs}
        out["identical_answers"] = self.same["cold"] and self.same["warm"]
        if "lmcache_cold" in runs:
            out["lmcache_identical_answers"] = self.same["lmcache_cold"] and self.same["lmcache_warm"]
        return out


def offload(
    model: str, prompts: list[list[int]], warm_up: list[int], codec: Any, rounds: int, peer: tuple[str, int] | None
) -> dict[str, Any]:
    """Runs cold, warm and, with a codec, coded; ratios to an engine without the connector, prompt by prompt.

    peer: an interpreter with LMCache and its chunk's tokens. Where it does not run, lmcache_error says why.
    """
    runs, sizes, out = Runs(), {}, {}
    job = {"model": model, "prompts": prompts, "warm_up": warm_up}
    for number in range(1, rounds + 1):
        say(f"offload, round {number} of {rounds}: without connector")
        runs.add("plain", child("offload", job))
        longest = 0.0
        for prefix, chosen in [("", None)] + ([("coded_", codec)] if codec else []):
            folder = tempfile.mkdtemp(prefix="lmcache_blend_")
            try:
                extra = {"tiers": [{"tier": "disk", "path": folder}], "codec": chosen}
                for name in ("cold", "warm"):
                    say(f"offload, round {number} of {rounds}: {prefix}{name}")
                    began = time.monotonic()
                    runs.add(prefix + name, child("offload", {**job, "extra": extra}))
                    longest = max(longest, time.monotonic() - began)
                sizes[prefix or "raw_"] = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
            finally:
                shutil.rmtree(folder)
        if peer and "lmcache_error" not in out:
            say(f"offload, round {number} of {rounds}: LMCache, cold and warm")
            try:
                patience = PATIENCE[0] + PATIENCE[1] * longest
                seen = serving_peer.turn(peer[0], job, sizes["raw_"], patience, peer[1])
                for name, result in seen.items():
                    runs.add(f"lmcache_{name}", result)
                out["lmcache_versions"] = seen["warm"]["versions"]
            except JobError as error:
                runs.drop("lmcache_")
                out = {"lmcache_error": str(error)}
                say(f"LMCache is left out: {error}")
    out = {**runs.summary(), "raw_bytes": sizes["raw_"], **out}
    if codec:
        out |= {"coded_bytes": sizes["coded_"], "bytes_ratio": round(sizes["coded_"] / sizes["raw_"], 4)}
    return out


def blend(model: str, samples: list[dict[str, Any]], compiled: bool) -> dict[str, Any]:
    # No prefixes: after a plain request, a blended one of the same prompt would find all of it.
    tiers = [{"tier": "cpu", "capacity_bytes": 2 << 30}]
    extra = {"tiers": tiers, "offload": False, "blend": {"match": "spans"}}
    rows = child("blend", {"model": model, "samples": samples, "extra": extra, "compiled": compiled})
    out = {f"{name}_ttft_ratio": ratio(rows[name], rows["plain"]) for name in POLICIES}
    return {**out, "plain_ttft_ms": round(statistics.median(rows["plain"]), 1)}


def read_samples(model: str, data: Path) -> list[dict[str, Any]]:
    """Token ids of each line: head, passages, question. Raises DataError, ModelNotFoundError."""
    from transformers import AutoTokenizer

    from lmcache_blend.eval.tasks.jsonl import load_jsonl

    rows = load_jsonl(data, limit=sys.maxsize, seed=0).samples
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(f"{model} holds no tokenizer that transformers reads: {error}") from None

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    head, out = ids("Answer the question from the documents.\n\n"), []
    for row in rows:
        passages = [ids(f"Document: {c}\n\n") for c in row.contexts]
        out.append({"head": head, "passages": passages, "question": ids(f"Question: {row.question}\nAnswer:")})
    return out


def bench(args: argparse.Namespace) -> dict[str, Any]:
    """The report, written to args.output after every part."""
    from lmcache_blend.codecs import get_codec
    from lmcache_blend.eval.writer import write_atomic
    from lmcache_blend.hf import resolve_model

    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("vLLM is not installed here; `make serving` or pip install 'lmcache-blend[vllm]'")
    codec = get_codec(args.codec).get_config() if args.codec else None
    if args.output != "-" and not Path(args.output).absolute().parent.is_dir():
        raise ConfigError(f"cannot write {args.output}: its folder does not exist")
    model = str(resolve_model(args.model))
    samples = read_samples(model, Path(args.data))
    near = sorted(samples, key=lambda s: abs(sum(map(len, s["passages"])) - 1760))[: args.prompts]
    stream = [t for s in samples for p in s["passages"] for t in p]
    if len(stream) < args.prompts * OFFLOAD_TOKENS + WARM_UP:
        raise DataError(
            f"{args.data} holds {len(stream)} tokens, {args.prompts} prompts of {OFFLOAD_TOKENS} and {WARM_UP} to warm "
            "up need more; give more text or fewer --prompts"
        )
    prompts = [stream[i * OFFLOAD_TOKENS : (i + 1) * OFFLOAD_TOKENS] for i in range(args.prompts)]
    report: dict[str, Any] = {"model": args.model, "tokens": OFFLOAD_TOKENS, "rounds": args.rounds}
    report |= {"prompts": args.prompts, "codec": codec}
    peer = (args.lmcache_python, args.lmcache_chunk) if args.lmcache_python else None
    measure = {
        "offload": lambda: offload(model, prompts, stream[-WARM_UP:], codec, args.rounds, peer),
        "exact": lambda: exact(model, samples, args.exact_prompts, args.sharing_prompts),
        "blend": lambda: blend(model, near, False),
        "compiled": lambda: blend(model, near, True),
    }
    for part in (p for p in measure if p in args.parts):
        say(part)
        report[part] = measure[part]()
        if args.output != "-":
            write_atomic(Path(args.output), json.dumps(report, indent=2).encode())
    return report


def say(line: str) -> None:
    print(f"serving_bench: {line}", file=sys.stderr, flush=True)


class Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"serving_bench: {' '.join(message.split())} (see --help)\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="serving_bench", description=__doc__, formatter_class=raw)
    parser.add_argument("--model", required=True, help="folder or alias")
    parser.add_argument("--data", required=True, metavar="FILE", help="JSONL with contexts and question")
    parser.add_argument("--codec", metavar="SPEC", help="id or JSON of the codec to measure beside raw")
    parser.add_argument("--parts", default=",".join(PARTS), metavar="P[,P...]", help=f"default {','.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"of offload (default {ROUNDS})")
    parser.add_argument("--prompts", type=int, default=PROMPTS, metavar="N", help=f"default {PROMPTS}")
    parser.add_argument(
        "--exact-prompts", type=int, default=EXACT_PROMPTS, metavar="N", help=f"at ratio 1.0 (default {EXACT_PROMPTS})"
    )
    parser.add_argument(
        "--sharing-prompts", type=int, default=SHARING, metavar="N", help=f"at once, 0: none (default {SHARING})"
    )
    parser.add_argument("--lmcache-python", metavar="PYTHON", help="of an environment with LMCache and vLLM, as peer")
    parser.add_argument(
        "--lmcache-chunk", type=int, default=serving_peer.CHUNK, metavar="N", help="tokens (default 256, LMCache's own)"
    )
    parser.add_argument("--output", default="-", metavar="FILE", help="JSON; - (default) for stdout, table on stderr")
    args = parser.parse_args(argv)
    args.parts = args.parts.split(",")
    for part in args.parts:
        if part not in PARTS:
            raise UnknownNameError("part", part, PARTS)
    for name in ("rounds", "prompts", "exact_prompts", "sharing_prompts", "lmcache_chunk"):
        least = 0 if name == "sharing_prompts" else 1
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; it is {least} at least")
    if args.lmcache_python and "offload" not in args.parts:
        parser.error("--lmcache-python is for the part offload")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status: 2 for bad input, 1 where an engine of this package fails."""
    try:
        args = parse(argv)
        report = bench(args)
    except (ConfigError, DataError, ModelNotFoundError, UnknownNameError) as error:
        say(" ".join(str(error).split()))
        return 2
    except LMCacheBlendError as error:
        print(getattr(error, "output", ""), file=sys.stderr)  # of a JobError
        say(" ".join(str(error).split()))
        return 1
    if args.output == "-":
        print(json.dumps(report, indent=2), flush=True)
    print("\n" + table(report), file=sys.stderr if args.output == "-" else sys.stdout)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an end on which the peer's server is stopped, too
    sys.exit(main())
