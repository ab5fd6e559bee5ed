"""TTFT of the blender and speed of the codecs in this tree against an earlier commit, in turns in one run.

    python tests/compare_commits.py 1a22c94 [--profile FILE] [--data FILE.jsonl] [--rounds 9]

Each tree runs in a process of its own, one at a time; a ratio is taken within a round. 1a22c94 is the last commit
before codecs and blender ran on the operators of triton_kernels.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
METHODS = ("full_recompute", "full_reuse", "epic", "cacheblend", "query_attention", "attention_value_norm")
CODECS = ("fisher_klt", "cachegen", "hadamard", "kivi", "int8")


def serve(given: argparse.Namespace) -> None:
    """In a tree's own process: measure once for every line that comes in."""
    sys.path.insert(0, given.tree)
    import torch

    import lmcache_blend
    from lmcache_blend import BlendConfig, Blender, get_codec
    from lmcache_blend.eval.codec_bench import Document
    from lmcache_blend.eval.tasks import build_prompt, load_task
    from lmcache_blend.hf import load_runner

    assert Path(lmcache_blend.__file__).is_relative_to(given.tree), lmcache_blend.__file__
    runner = load_runner("smollm2-135m", dtype="float32")
    task = load_task("people_qa" if given.data is None else given.data.stem, given.data, 100, 0)
    prompts = [build_prompt(s, task.kind, runner.tokenizer) for s in task.samples]
    prompt = min(prompts, key=lambda p: abs(len(p) - 1800))
    blender = Blender(runner, BlendConfig(recompute_ratio=0.15, store_misses=False))
    chunk = Document(runner, prompt.tokens, len(prompt) - 8).chunk
    chunk = type(chunk)(chunk.tokens, tuple((k.bfloat16(), v.bfloat16()) for k, v in chunk.layers))
    profile = {} if given.profile is None else {"profile": str(given.profile)}
    codecs = {name: get_codec({"id": name, **(profile if name == "fisher_klt" else {})}) for name in CODECS}
    for _ in sys.stdin:
        took = {}
        blender.store(prompt)
        for method in METHODS:
            took[f"TTFT {method}"] = blender.prefill(prompt, policy=method).trace.ttft_ms
        for name, codec in codecs.items():
            began = time.perf_counter()
            data = codec.encode(chunk)
            middle = time.perf_counter()
            codec.decode(data)
            took |= {f"encode {name}": 1e3 * (middle - began), f"decode {name}": 1e3 * (time.perf_counter() - middle)}
        print(json.dumps({"torch": torch.__version__, "tokens": len(prompt), "ms": took}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?")
    parser.add_argument("--data", type=lambda p: Path(p).resolve(), help="prompts, e.g. squad_rag10.jsonl")
    parser.add_argument("--profile", type=lambda p: Path(p).resolve(), help="of fisher_klt; by default it needs none")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tree", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.tree:
        return serve(given)
    if given.commit is None:
        parser.error("name a commit to compare with")
    with tempfile.TemporaryDirectory() as folder:
        before = str(Path(folder) / "before")
        subprocess.run(["git", "worktree", "add", "-q", "--detach", before, given.commit], cwd=ROOT, check=True)
        try:
            compare(given, [str(ROOT), before])
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", before], cwd=ROOT, check=True)
    return None


def compare(given: argparse.Namespace, trees: list[str]) -> None:
    """Print a line per measurement: milliseconds here, and the median ratio of here over the earlier commit."""
    more = [x for name in ("data", "profile") if getattr(given, name) for x in (f"--{name}", str(getattr(given, name)))]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = [subprocess.Popen([sys.executable, __file__, "--tree", tree, *more], **pipes) for tree in trees]
    rounds = []
    for turn in range(given.rounds + 1):
        order = (0, 1) if turn % 2 else (1, 0)
        found = {}
        for i in order:
            children[i].stdin.write("\n")
            children[i].stdin.flush()
            found[i] = json.loads(children[i].stdout.readline())
        if turn:  # the first compiles
            rounds.append((found[0]["ms"], found[1]["ms"]))
    for child in children:
        child.communicate()
    print(f"{found[0]['tokens']} tokens, {given.rounds} rounds; ms here, and here / {given.commit} (median, range)")
    for name in rounds[0][0]:
        ratios = sorted(here[name] / there[name] for here, there in rounds)
        ours = statistics.median(here[name] for here, _ in rounds)
        print(f"{name:28}{ours:9.1f}{statistics.median(ratios):8.3f}  ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
