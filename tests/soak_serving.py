"""Many mixed requests against a real server: `python tests/soak_serving.py [--requests 500] [--concurrency 8]`.

Plain requests, blended ones at two ratios, and ones that the client breaks off. Prints JSON: failures, requests that
the server still counts, KV blocks still taken, memory and hit rate of the first and the second half.
"""

import argparse
import json
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from vllm_server import Traffic, VllmServer, request

HITS = "lmcache_blend:hit_tokens_total"


def soak(server: VllmServer, requests: int, concurrency: int, seed: int = 0) -> dict[str, Any]:
    """Run them; see the module's text. Ratio 1.0 recomputes everything, so its answer must be the plain one."""
    client, traffic = server.client(), Traffic(seed)
    jobs = []
    for number in range(requests):
        tokens, spans = traffic.prompt(traffic.random.randint(2, 5))
        jobs.append((number, ("plain", "blend", "exact", "abort", "blend")[number % 5], tokens, spans))

    def one(job: tuple[int, str, list[int], list[list[int]]]) -> str:
        _, kind, tokens, spans = job
        try:
            if kind == "abort":
                body = json.dumps(client._body(replace(request(tokens, spans, 0.15, 64), stream=True))).encode()
                post = urllib.request.Request(
                    f"{server.url}/v1/completions", body, {"Content-Type": "application/json"}
                )
                with urllib.request.urlopen(post, timeout=300) as reply:
                    reply.readline()  # the rest is never read: the connection closes
                return ""
            ratio = {"plain": None, "blend": 0.15, "exact": 1.0}[kind]
            answer = client.ask(request(tokens, spans, ratio))
            if len(answer.tokens or ()) != 6:
                return f"{kind}: {answer.tokens}"
            if kind == "exact" and answer.tokens != client.ask(request(tokens, spans, None)).tokens:
                return "exact: another answer than the plain one"
        except Exception as error:
            return f"{kind}: {type(error).__name__} {error}"
        return ""

    failures, halves = [], []
    for half in (jobs[: requests // 2], jobs[requests // 2 :]):
        before = server.metric(HITS)
        with ThreadPoolExecutor(concurrency) as pool:
            failures += [failure for failure in pool.map(one, half) if failure]
        prompt_tokens = sum(len(tokens) for _, _, tokens, _ in half)
        halves.append(
            {"rss_bytes": server.rss_bytes(), "hit_rate": (server.metric(HITS) - before) / max(prompt_tokens, 1)}
        )
    client.ask(request(*traffic.prompt(), None))  # a last step, so that gauges tell of an idle server
    return {
        "requests": requests,
        "failures": failures[:20],
        "failed": len(failures),
        "running": server.metric("vllm:num_requests_running"),
        "waiting": server.metric("vllm:num_requests_waiting"),
        "blocks_in_use": server.metric("vllm:kv_cache_usage_perc"),
        "errors": server.metric("lmcache_blend:errors_total"),
        "halves": halves,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--concurrency", type=int, default=8)
    arguments = parser.parse_args()
    server = VllmServer("--cpu-gib", "0.2").start()
    try:
        found = soak(server, arguments.requests, arguments.concurrency)
    finally:
        server.close()
    print(json.dumps(found, indent=2))
    return int(found["failed"] > 0 or found["blocks_in_use"] > 0)


if __name__ == "__main__":
    sys.exit(main())
