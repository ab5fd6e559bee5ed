"""The worker's half: brings KV into vLLM's blocks before the forward, and takes it out after."""

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from lmcache_blend.blend import Blender, get_policy
from lmcache_blend.config import BlendConfig
from lmcache_blend.engine import KVEngine
from lmcache_blend.errors import ChunkLostError
from lmcache_blend.rotary import RotaryTable
from lmcache_blend.serving.config import ServingConfig
from lmcache_blend.serving.kv import PagedKV, PagedLayer
from lmcache_blend.serving.messages import Load, Save
from lmcache_blend.types import KVChunk, Prompt

log = logging.getLogger(__name__)


class WorkerHalf:
    """layers: the model's paged layers. rotary: where chunks are kept before RoPE, None where bit for bit. runner: of
    blend mode, None without it."""

    def __init__(
        self,
        config: ServingConfig,
        engine: KVEngine,
        layers: Sequence[PagedLayer],
        rotary: RotaryTable | None,
        runner: Any = None,
    ):
        self.config, self.engine, self.layers, self.rotary, self.runner = config, engine, layers, rotary, runner
        self.counts: dict[str, float] = {}
        self.reports: dict[str, dict[str, Any]] = {}
        self.busy = False
        self._computed: dict[str, Tensor] = {}
        self._exact: dict[str, int] = {}
        self._failed: set[str] = set()
        self._bad_blocks: set[int] = set()
        self._arrived: set[str] = set()
        self._blenders: dict[str, Blender] = {}
        self._later = ThreadPoolExecutor(1, "kv-arrive")
        self._lock = threading.Lock()

    # ------------------------------------------------------------------ loading
    def load(self, loads: Sequence[Load]) -> None:
        """Bring everything in that a forward waits for; start the rest beside it."""
        if self.busy:  # the nested forward passes the same hooks
            return
        self.busy = True
        try:
            for load in loads:
                if load.asynchronous:
                    # Not on the engine's own threads: these read the layers that a load waits for.
                    self._later.submit(self._bring_later, load)
                else:
                    self._bring(load)
        finally:
            self.busy = False

    def _bring_later(self, load: Load) -> None:
        try:
            self._bring(load)
        finally:
            with self._lock:
                self._arrived.add(load.request)

    @torch.inference_mode()
    def _bring(self, load: Load) -> None:
        """Whatever goes wrong is reported as blocks that could not be loaded: vLLM computes them."""
        began, good = time.perf_counter(), load.start
        kv = PagedKV(self.layers, torch.tensor(load.blocks, device=self.layers[0].cache.device), len(load.tokens))
        try:
            good = self._prefix(load, kv)
            if good < load.prefix_end:
                raise ChunkLostError(load.keys[0][0], f"{load.prefix_end - good} tokens of the prefix did not come")
            self._note(load.request, "load_ms", (time.perf_counter() - began) * 1e3)
            if good > load.start:
                self._count("hit_tokens_prefix", good - load.start)
            if load.blend is not None:
                self._blend(load, kv)
        except Exception as error:
            log.warning("request %s: KV is computed instead of loaded: %s", load.request, error, exc_info=_odd(error))
            self._count("errors")
            with self._lock:
                self._failed.add(load.request)
                block = self.layers[0].block
                self._bad_blocks.update(load.blocks[good // block : -(-load.end // block)])

    def _prefix(self, load: Load, kv: PagedKV) -> int:
        """Write the prefix chunks, layer by layer as they come; how many tokens from the start are there then."""
        if not load.keys:
            return load.start
        began = time.perf_counter()
        stored = self.engine.load([key for key, _, _ in load.keys])
        good, parts = load.start, []
        for found, (_, start, end) in zip(stored, load.keys, strict=True):
            if found is None or not self._fits(found.chunk, load.tokens, start, end):
                break
            good = min(end, load.prefix_end)
            parts.append((found.chunk, start))
        self._note(load.request, "bytes", sum(s.nbytes for s in stored[: len(parts)] if s is not None))
        if good <= load.start:
            return load.start
        positions = torch.arange(load.start, good)
        angles = None if self.rotary is None else self.rotary.at(positions)
        first = load.keys[0][1]
        for i in range(len(self.layers)):
            k, v = (torch.cat([chunk.layers[i][slot] for chunk, _ in parts], 1) for slot in (0, 1))
            k, v = k[:, load.start - first : good - first], v[:, load.start - first : good - first]
            if angles is not None:
                k, v = angles.rotate(i, k, v)
            device = kv.blocks.device
            kv.write(i, positions, k[None].to(device), v[None].to(device))
        self._note(load.request, "prefix_ms", (time.perf_counter() - began) * 1e3)
        return good

    def _fits(self, chunk: KVChunk, tokens: Sequence[int], start: int, end: int) -> bool:
        """A store is not trusted to give the right chunk. The last token of a whole-prompt hit is not in `tokens`."""
        ids = chunk.tokens.tolist()
        wanted = list(tokens[start:end])
        shapes = tuple((x.heads, x.dim, x.heads, x.dim) for x in self.layers)
        return len(ids) == end - start and ids[: len(wanted)] == wanted and tuple(chunk.shapes) == shapes

    # ------------------------------------------------------------------ blending
    def _blender(self, salt: str) -> Blender:
        if salt not in self._blenders:
            if len(self._blenders) > 256:  # a server of many tenants does not keep them all
                self._blenders.clear()
            self._blenders[salt] = Blender(self.runner, BlendConfig(salt=salt), self.engine)
        return self._blenders[salt]

    def _blend(self, load: Load, kv: PagedKV) -> None:
        assert load.blend is not None
        if self.runner is None:
            raise RuntimeError("blend mode was refused at start-up")
        prompt = Prompt(torch.tensor(load.tokens), tuple(s for s in load.blend.spans if s[1] <= len(load.tokens)))
        policy = get_policy(load.blend.policy, load.blend.options)
        began = time.perf_counter()
        work = self._blender(load.salt).fill(
            prompt, kv, load.prefix_end, policy=policy, recompute_ratio=load.blend.recompute_ratio
        )
        spent = (time.perf_counter() - began) * 1e3
        trace, (computed, exact) = work.trace, work.outcome()
        computed[: load.prefix_end] = True
        self._computed[load.request], self._exact[load.request] = computed, exact
        reused = sum(end - max(start, load.prefix_end) for start, end, kind in trace.hits
                     if kind != "miss" and end > load.prefix_end)  # fmt: skip
        recomputed = int((work.candidate & computed).sum())
        self._count("hit_tokens_segment", reused)
        self._count("recomputed_tokens", recomputed)
        self._count("blend_ms", spent)
        self._count("decode_ms", trace.loading_ms)
        self._note(load.request, "segment", reused)
        self._note(load.request, "recomputed", recomputed)
        self._note(load.request, "blend_ms", spent)
        self.reports.setdefault(load.request, {}).update(
            policy=load.blend.policy,
            recompute_ratio=load.blend.recompute_ratio,
            stages_ms={k: round(v, 3) for k, v in trace.stages_ms.items()},
            segments=[[start, end, kind] for start, end, kind in trace.hits],
            rows=len(trace.rows[-1]),
            rows_per_layer=[len(rows) for rows in trace.rows],
            compute_fraction=round(trace.compute_fraction, 6),
            loaded_bytes=trace.loaded_bytes,
        )

    # ------------------------------------------------------------------ saving
    @torch.inference_mode()
    def save(self, saves: Sequence[Save]) -> None:
        """Copy out of the blocks what was computed; encoding and writing go on in the engine's threads."""
        for save in saves:
            if save.request in self._failed:
                continue  # its KV in this step was computed on top of what did not come
            began = time.perf_counter()
            try:
                self._save(save)
            except Exception as error:
                log.warning("request %s: KV is not stored: %s", save.request, error, exc_info=_odd(error))
                self._count("errors")
            self._count("save_ms", (time.perf_counter() - began) * 1e3)

    def _save(self, save: Save) -> None:
        kv = PagedKV(self.layers, torch.tensor(save.blocks, device=self.layers[0].cache.device), len(save.tokens))
        for key, start, end in save.chunks:
            if key in self.engine:
                continue
            angles = None if self.rotary is None else self.rotary.at(torch.arange(start, end))
            layers = []
            for i, layer in enumerate(self.layers):
                k, v = layer.read(kv.blocks, start, end)
                layers.append((k, v) if angles is None else angles.unrotate(i, k, v))
            self.engine.store([key], [KVChunk(torch.tensor(save.tokens[start:end]), layers)])
            self._count("stored_tokens", end - start)
        if save.spans and self.runner is not None:
            prompt = Prompt(torch.tensor(save.tokens), tuple(save.spans))
            computed = self._computed.pop(save.request, None)
            exact = self._exact.pop(save.request, len(prompt))
            whole = torch.ones(len(prompt), dtype=torch.bool)
            if computed is not None:
                n = min(len(computed), len(prompt))
                whole[:n] = computed[:n]
            self._count("stored_segments", self._blender(save.salt).keep(prompt, kv, whole, exact))

    # ------------------------------------------------------------------ what vLLM asks for
    def arrived(self) -> set[str]:
        """Requests whose asynchronous loads ended since the last call, well or not."""
        with self._lock:
            out, self._arrived = self._arrived, set()
        return out

    def bad_blocks(self) -> set[int]:
        with self._lock:
            out, self._bad_blocks = self._bad_blocks, set()
        return out

    def forget(self, requests: set[str]) -> None:
        """Requests that are finished or were aborted."""
        for name in requests:
            self._computed.pop(name, None)
            self._exact.pop(name, None)
            self._failed.discard(name)
            self.reports.pop(name, None)  # of a load that ended after its request

    def close(self) -> None:
        self._later.shutdown(cancel_futures=True)

    def _count(self, name: str, by: float = 1) -> None:
        with self._lock:
            self.counts[name] = self.counts.get(name, 0) + by

    def _note(self, request: str, name: str, by: float) -> None:
        """Into the request's breakdown, and, where it is a time, into the metrics."""
        with self._lock:
            report = self.reports.setdefault(request, {})
            report[name] = round(report.get(name, 0) + by, 3)
            if name == "load_ms":
                self.counts[name] = self.counts.get(name, 0) + by


def _odd(error: Exception) -> bool:
    """Whether an error deserves its stack in the log."""
    return not isinstance(error, ChunkLostError)
