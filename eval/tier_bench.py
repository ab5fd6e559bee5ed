"""TTFT of blending from each tier, raw against compressed, over links of several speeds: `lmcache-blend engine blend`.

The links are simulated: a token bucket in front of the tier lets so many bits per second through, on top of what the
tier itself takes. Everything behind it is real: servers, files, decoding, loading layer by layer under the forward.
"""

import itertools
import math
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from tqdm import tqdm

from lmcache_blend.blend import Blender
from lmcache_blend.codecs import short_name
from lmcache_blend.config import BlendConfig
from lmcache_blend.engine import KVEngine
from lmcache_blend.engine.tiers.base import Entry, Outcome, Tier, Usage, Value, make_tier
from lmcache_blend.eval.plots import MARKERS, STYLE, save
from lmcache_blend.eval.writer import writing
from lmcache_blend.types import Prompt

RAW = {"id": "raw", "dtype": "bfloat16"}
LINKS = (1.0, 5.0, 20.0)
Row = dict[str, Any]


class Link:
    """A tier behind a link of `gbit_s` (10^9 bits per second, both directions together); infinite lets all through.

    inner: name or URL of the tier. options: its own. All calls share the link.
    """

    def __init__(self, inner: str, gbit_s: float = math.inf, **options: Any):
        self.gbit_s, self._free, self._lock = gbit_s, 0.0, threading.Lock()
        self._inner: Tier = make_tier(inner, **options)
        self.threads, self.capacity_bytes = self._inner.threads, self._inner.capacity_bytes

    def _pass(self, outcomes: list[Outcome]) -> list[Outcome]:
        """Wait until the link has taken what was moved."""
        moved = sum(o for o in outcomes if isinstance(o, int))
        with self._lock:
            self._free = free = max(self._free, time.monotonic()) + 8 * moved / (1e9 * self.gbit_s)
        time.sleep(max(0.0, free - time.monotonic()))
        return outcomes

    def put(self, keys: Sequence[bytes], values: Sequence[Value]) -> list[Outcome]:
        return self._pass(self._inner.put(keys, values))

    def get(
        self, keys: Sequence[bytes], buffers: Sequence[memoryview], offsets: Sequence[int] | None = None
    ) -> list[Outcome]:
        return self._pass(self._inner.get(keys, buffers, offsets))

    def lookup(self, keys: Sequence[bytes]) -> list[Outcome]:
        return self._inner.lookup(keys)

    def delete(self, keys: Sequence[bytes]) -> list[Outcome]:
        return self._inner.delete(keys)

    def entries(self) -> Iterator[Entry]:
        return self._inner.entries()

    def usage(self) -> Usage:
        return self._inner.usage()

    def close(self) -> None:
        self._inner.close()


def bench(
    runner: Any,
    prompts: Sequence[Prompt],
    tiers: Sequence[str],
    codecs: Sequence[dict[str, Any]],
    links: Sequence[float] = LINKS,
    policy: str = "query_attention",
    ratio: float = 0.15,
    rounds: int = 5,
) -> list[Row]:
    """A row per tier, codec and link (None: as fast as the tier itself), all of them and full prefill in turns.

    tiers: "cpu", "disk", URLs. ttft_ratio: median over rounds and prompts of TTFT over that round's full prefill.
    Raises ConfigError, and AssertionError where a chunk that was stored is missed.
    """
    speeds = [*links, math.inf]
    found: dict[tuple[str, str, float], list[tuple[float, Any]]] = {}
    full_ms: list[float] = []
    with ExitStack() as stack:
        blenders = {}
        for tier, codec in itertools.product(tiers, codecs):
            engine = stack.enter_context(_engine(tier, codec, stack))
            config = BlendConfig(policy=policy, recompute_ratio=ratio, salt=f"bench {codec}", store_misses=False)
            blenders[tier, short_name(codec)] = blender = Blender(runner, config, store=engine)
            stack.callback(engine.clear)
            for prompt in prompts:
                blender.store(prompt)
            engine.flush()
        turns = [*itertools.product(prompts, range(rounds + 1))]
        for prompt, turn in tqdm(turns, desc="rounds", unit="round", disable=None):
            full = next(iter(blenders.values())).prefill(prompt, policy="full_recompute").trace.ttft_ms
            full_ms += [full] * bool(turn)
            for (tier, codec), blender in blenders.items():
                for gbit_s in speeds:
                    blender.chunks.levels[0].tier.gbit_s = gbit_s  # pyright: ignore[reportAttributeAccessIssue]
                    trace = blender.prefill(prompt).trace
                    assert all(kind != "miss" for _, _, kind in trace.hits), f"{tier} lost a chunk: {trace.hits}"
                    if turn:  # the first compiles
                        found.setdefault((tier, codec, gbit_s), []).append((trace.ttft_ms / full, trace))
    return [
        {
            "tier": tier.partition("://")[0],
            "codec": codec,
            "gbit_s": None if gbit_s == math.inf else gbit_s,
            "simulated_link": gbit_s != math.inf,
            "ttft_ratio": statistics.median(r for r, _ in seen),
            "ttft_ms": statistics.median(t.ttft_ms for _, t in seen),
            "ttft_full_ms": statistics.median(full_ms),
            "loaded_bytes": statistics.mean(t.loaded_bytes for _, t in seen),
            "loading_ms": statistics.median(t.loading_ms for _, t in seen),
            "waited_ms": statistics.median(t.loading_wait_ms for _, t in seen),
            "tokens": statistics.mean(map(len, prompts)),
            "rounds": len(seen),
        }
        for (tier, codec, gbit_s), seen in found.items()
    ]


def _engine(tier: str, codec: dict[str, Any], stack: ExitStack) -> KVEngine:
    link: dict[str, Any] = {"tier": f"{__name__}:Link", "inner": tier, "codec": codec}
    link["faults"] = {"timeout_s": 120.0}  # a slow link is no fault
    if tier == "cpu":
        link["capacity_bytes"] = 4 << 30
    if tier == "disk":
        link["path"] = stack.enter_context(tempfile.TemporaryDirectory())
    return KVEngine(tiers=[link])


def crossings(rows: Sequence[Row]) -> dict[str, list[float] | str]:
    """Per tier: the speeds of link, in Gbit/s, at which the two codecs take equally long; or which is always faster.

    Between measured speeds TTFT is taken as linear in seconds per bit.
    """
    out: dict[str, list[float] | str] = {}
    for tier in dict.fromkeys(row["tier"] for row in rows):
        curves: dict[str, dict[float, float]] = {}
        for row in rows:
            if row["tier"] == tier:
                pace = 0.0 if row["gbit_s"] is None else 1 / row["gbit_s"]
                curves.setdefault(row["codec"], {})[pace] = row["ttft_ratio"]
        (first, a), (second, b) = curves.items()
        gaps = sorted((pace, a[pace] - b[pace]) for pace in a)
        zeros = [
            p + (q - p) * x / (x - y) for (p, x), (q, y) in itertools.pairwise(gaps) if (x < 0) != (y < 0) and x != y
        ]
        out[tier] = [1 / z for z in zeros if z > 0] or f"always {first if gaps[-1][1] < 0 else second}"
    return out


def figure(rows: Sequence[Row]) -> Figure:
    """A panel per tier: TTFT against the link's speed."""
    tiers, codecs = (list(dict.fromkeys(row[field] for row in rows)) for field in ("tier", "codec"))
    out = Figure(figsize=(3.2 * len(tiers) + 0.6, 3.6), layout="constrained")
    for ax, tier in zip(out.subplots(1, len(tiers), sharey=True, squeeze=False)[0], tiers, strict=True):
        for codec, colour, marker in zip(codecs, ("#222222", "#d1495b"), MARKERS, strict=False):
            mine = [r for r in rows if r["tier"] == tier and r["codec"] == codec]
            linked = sorted((r["gbit_s"], r["ttft_ratio"]) for r in mine if r["gbit_s"] is not None)
            ax.plot(*zip(*linked, strict=True), color=colour, marker=marker, ms=5, lw=1.4, label=codec)
            free = next(r["ttft_ratio"] for r in mine if r["gbit_s"] is None)
            ax.axhline(free, color=colour, lw=0.9, ls=":", label=f"{codec}, no link")
        ax.set(xscale="log", title=tier, xlabel="simulated link, Gbit/s")
        ax.set_ylim(0, 1.08 * max(r["ttft_ratio"] for r in rows))
        ticks = sorted({r["gbit_s"] for r in rows if r["gbit_s"] is not None})
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
        ax.grid(visible=True, axis="y", lw=0.5, color="#dddddd")
    out.axes[0].set_ylabel("TTFT, full prefill = 1")
    handles, labels = out.axes[0].get_legend_handles_labels()
    out.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return out


def write_plot(rows: Sequence[Row], path: Path) -> Path:
    """Write the figure. Raises ResultsError."""
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        return save(figure(rows), path)
