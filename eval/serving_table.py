"""The report of serving_bench as a table of at most 80 columns."""

import textwrap
from collections.abc import Iterator
from typing import Any

from lmcache_blend.codecs import short_name
from lmcache_blend.eval.serving_jobs import POLICIES

WIDTH, NAME = 80, 34


def table(report: dict[str, Any]) -> str:
    """Lines of every part that the report has.

    >>> part = {"plain_ttft_ms": 5040.0, "epic_ttft_ratio": 0.22}
    >>> part |= {"attention_value_norm_ttft_ratio": 0.25, "cacheblend_ttft_ratio": 0.26}
    >>> print(table({"model": "smollm2-135m", "blend": part}))
    smollm2-135m
    <BLANKLINE>
    Blend, 10 passages, 15 % recomputed    TTFT ms  of plain
    plain prefill                           5040.0      1.00
    epic                                                0.22
    attention_value_norm                                0.25
    cacheblend                                          0.26
    """
    lines = [str(report["model"])]
    if "offload" in report:
        lines += ["", *_offload(report["offload"], report)]
    for part, title in (("blend", "Blend"), ("compiled", "Blend, compiled model")):
        if part in report:
            lines += ["", *_blend(report[part], f"{title}, 10 passages, 15 % recomputed")]
    if "exact" in report:
        lines += ["", *_exact(report["exact"])]
    return "\n".join(line[:WIDTH].rstrip() for line in lines)


def _offload(part: dict[str, Any], report: dict[str, Any]) -> Iterator[str]:
    yield f"Offload: {report['prompts']} prompts of {report['tokens']:,} tokens, rounds: {report['rounds']}"
    yield f"{'':<{NAME}} {'TTFT ms':>11} {'of plain':>9} {'tokens reused':>15}"
    yield f"{'without connector':<{NAME}} {part['plain_ttft_ms']:>11.1f} {1:>9.3f}"
    codec = short_name(report["codec"]) if report.get("codec") else ""
    peer = f"LMCache {part.get('lmcache_versions', {}).get('lmcache', '')}"
    for prefix, name in (("", "lmcache-blend"), ("coded_", f"with {codec}"), ("lmcache_", peer)):
        for run in ("cold", "warm"):
            if f"{prefix}{run}_ttft_ms" in part:
                ms, of_plain, cached = (part[f"{prefix}{run}_{x}"] for x in ("ttft_ms", "ttft_ratio", "cached_tokens"))
                yield f"{f'{name[: NAME - 6]}, {run}':<{NAME}} {ms:>11.1f} {of_plain:>9.3f} {cached:>15,}"
    same = f"Answers as without connector: lmcache-blend {_yes(part['identical_answers'])}"
    if "lmcache_identical_answers" in part:
        same += f", {peer} {_yes(part['lmcache_identical_answers'])}"
    yield f"{same}."
    if "bytes_ratio" in part:
        yield f"Stored: {part['coded_bytes'] / 1e6:.1f} MB of {part['raw_bytes'] / 1e6:.1f} ({part['bytes_ratio']:.3f})"
    if "lmcache_error" in part:
        yield from textwrap.wrap(f"LMCache did not run: {part['lmcache_error']}", WIDTH)


def _blend(part: dict[str, Any], title: str) -> Iterator[str]:
    width = max(NAME, len(title))
    yield f"{title:<{width}} {'TTFT ms':>10} {'of plain':>9}"
    yield f"{'plain prefill':<{width}} {part['plain_ttft_ms']:>10.1f} {1:>9.2f}"
    for name in POLICIES:
        yield f"{name:<{width}} {'':>10} {part[f'{name}_ttft_ratio']:>9.2f}"


def _exact(part: dict[str, Any]) -> Iterator[str]:
    own, count = part["answers_as_plain"], part["prompts"]
    yield "Exact: answers as plain"
    yield f"{'all tokens recomputed':<{NAME}} {own['ratio_1']:>5} of {count}"
    yield f"{'plain request after a blended one':<{NAME}} {own['plain_afterwards']:>5} of {count}"
    yield f"{'no token recomputed':<{NAME}} {own['full_reuse']:>5} of {count}"
    many = part.get("sharing_prompts")
    if many is None:
        return
    for name, label in (("first", "many at once, cold"), ("again", "many at once, stored")):
        yield f"{label:<{NAME}} {part['sharing_as_without_connector'][name]:>5} of {many}"
    yield f"{'without connector, twice':<{NAME}} {part['without_connector_itself']:>5} of {many}"


def _yes(same: bool) -> str:
    return "identical" if same else "DIFFERENT"
