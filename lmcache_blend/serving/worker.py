"""The worker's half: brings KV into vLLM's blocks before the forward, and takes it out after."""

import hashlib
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lmcache_blend.blend import Blender, get_policy
from lmcache_blend.codecs import PipelineCodec, get_codec
from lmcache_blend.codecs.threads import one_thread_meanwhile
from lmcache_blend.config import BlendConfig
from lmcache_blend.engine import KVEngine
from lmcache_blend.engine.keys import TENANT_BYTES
from lmcache_blend.engine.pipeline import LayerWriter
from lmcache_blend.errors import ChunkLostError, ConfigError
from lmcache_blend.rotary import RotaryTable
from lmcache_blend.serving.coming import Coming
from lmcache_blend.serving.config import ServingConfig
from lmcache_blend.serving.kv import PagedKV, PagedLayer
from lmcache_blend.serving.messages import Load, Save
from lmcache_blend.triton_kernels.place import Pages, place
from lmcache_blend.types import KVChunk, Prompt

log = logging.getLogger(__name__)
WARM_TOKENS = 40
"""Coded when the worker starts: more than the sinks, and no whole number of vectors."""
WARM_BYTES = 256 << 20
"""Of the memory that values are read into, taken from the system when the worker starts."""


class Leaving(NamedTuple):
    """A chunk that is copied out layer by layer, tokens start..end."""

    save: Save
    kv: PagedKV
    writer: LayerWriter
    start: int
    end: int


class WorkerHalf:
    """layers: the model's paged layers. rotary: where chunks are kept before RoPE, None where bit for bit. runner: of
    blend mode, None without it. rank: of this worker among those that share the heads."""

    def __init__(
        self,
        config: ServingConfig,
        engine: KVEngine,
        layers: Sequence[PagedLayer],
        rotary: RotaryTable | None,
        runner: Any = None,
        rank: int = 0,
    ):
        self.config, self.engine, self.layers, self.rotary, self.runner = config, engine, layers, rotary, runner
        self.rank = rank
        self.counts: dict[str, float] = {}
        self.reports: dict[str, dict[str, Any]] = {}
        self.busy = False
        self._computed: dict[str, Tensor] = {}
        self._exact: dict[str, int] = {}
        self._failed: set[str] = set()
        self._bad_blocks: set[int] = set()
        self._arrived: set[str] = set()
        self._blenders: dict[str, Blender] = {}
        on_cpu = layers[0].cache.device.type == "cpu"
        self.layerwise = not on_cpu if config.layerwise is None else config.layerwise
        self._index = {layer.name: i for i, layer in enumerate(layers)}
        self._coming: list[Coming] = []
        self._leaving: list[Leaving] = []
        self._later = ThreadPoolExecutor(1, "kv-arrive")
        self._lock = threading.Lock()
        self._warm_up()

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """Code a few tokens both ways: compiling, reading profiles and taking memory belong to starting."""
        shapes = [(x.heads, WARM_TOKENS, x.dim) for x in self.layers]
        blocks = torch.zeros(WARM_TOKENS // self.layers[0].block + 1, dtype=torch.int64)
        k, v = self.layers[0].read(blocks.to(self.layers[0].cache.device), 0, WARM_TOKENS)
        if self.rotary is not None and k.is_cpu:
            angles = self.rotary.at(torch.arange(WARM_TOKENS))
            angles.unrotate(0, k, v)
            place(Pages(torch.zeros_like(k)[None], blocks[:1]), k, 0, *angles.of(0, 0))
        if any(level.memory is None for level in self.engine.levels):
            self.engine.landing(WARM_BYTES).fill(0)
        for level in self.engine.levels:
            if level.codec is None:
                continue
            codec = get_codec(level.codec.get_config())  # not the level's own, which watches its rate
            layers = tuple((torch.zeros(s, dtype=k.dtype), torch.zeros(s, dtype=v.dtype)) for s in shapes)
            try:
                data = codec.encode(KVChunk(torch.arange(WARM_TOKENS), layers))
                if isinstance(codec, PipelineCodec):
                    coded = codec.open(memoryview(bytearray(data)))
                    codec.decode_together([coded, coded], 0)
                else:
                    codec.decode(data)
            except ConfigError as error:
                log.warning("tier %s: chunks of this model cannot be coded: %s", level.name, error)

    # ------------------------------------------------------------------ loading
    def load(self, loads: Sequence[Load]) -> None:
        """Blend, and begin to bring in prefixes: their layers are there when the forward asks for them."""
        self.settle()
        self.busy = True  # a blend's nested forward passes the same hooks
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
        kv = PagedKV(self.layers, torch.tensor(load.blocks, device=self.layers[0].cache.device), len(load.tokens))
        good, trouble = load.start, None
        try:
            coming = self._open(load, kv)
            short = load.prefix_end - coming.good
            if self.layerwise and not (short or load.asynchronous or load.blend is not None):
                self._coming.append(coming)
                return
            began = time.perf_counter()
            with one_thread_meanwhile() if kv.blocks.is_cpu and coming.reads else nullcontext():
                self._place_all(coming)
            coming.spent_ms += (time.perf_counter() - began) * 1e3
            good = coming.good
            self._came(coming)
            if short:
                raise ChunkLostError(load.keys[0][0], f"{short} tokens of the prefix did not come")
        except Exception as error:
            trouble = error
        try:
            if load.blend is not None and self._all_have_come(trouble):
                self._blend(load, kv)
        except Exception as error:
            trouble = trouble or error
        if trouble is not None:
            self._lost(load, good, trouble)

    def _all_have_come(self, trouble: Exception | None) -> bool:
        """Whether no rank lacks a part of the prefix: a blend waits for all of them, in each of its forwards."""
        reduce = None if self.runner is None else self.runner.reduce
        if reduce is None:
            return trouble is None
        others = float(reduce(torch.tensor([float(trouble is not None)]))) > 0
        if others and trouble is None:
            raise RuntimeError("another rank lacks a part of the prefix")
        return not others

    def _lost(self, load: Load, good: int, error: Exception) -> None:
        log.warning("request %s: KV is computed instead of loaded: %s", load.request, error, exc_info=_odd(error))
        self._count("errors")
        with self._lock:
            self._failed.add(load.request)
            block = self.layers[0].block
            self._bad_blocks.update(load.blocks[good // block : -(-load.end // block)])

    def _open(self, load: Load, kv: PagedKV) -> Coming:
        """Begin to read the prefix chunks; good: as far as they are there, one after another."""
        began = time.perf_counter()
        stored = self.engine.load([self._own(key) for key, _, _ in load.keys]) if load.keys else []
        good, parts = load.start, []
        for found, (_, start, end) in zip(stored, load.keys, strict=True):
            if found is None or not self._fits(found.chunk, load.tokens, start, end):
                break
            good = min(end, load.prefix_end)
            parts.append((found.chunk, start))
        self._note(load.request, "bytes", sum(s.nbytes for s in stored[: len(parts)] if s is not None))
        left = set(range(len(self.layers))) if good > load.start else set()
        reads = list({id(s.reads): s.reads for s in stored[: len(parts)] if s is not None and s.reads}.values())
        return Coming(load, kv, parts, good, left, self.rotary, reads, (time.perf_counter() - began) * 1e3)

    def _place_all(self, coming: Coming) -> None:
        """On CPU, threads that read place what they have decoded; this one does what came before they were asked to,
        and waits, for the last layers first: so it is not woken by each. Raises what placing raises.
        """
        errors: list[Exception] = []

        def place_if_there(layer: int) -> None:
            try:
                if coming.there(layer):
                    coming.place(layer)
            except Exception as error:
                errors.append(error)

        try:
            if coming.kv.blocks.is_cpu and coming.left:
                _ = coming.angles  # before several threads ask for them
                for reads in coming.reads:
                    reads.then(place_if_there)
                for layer in sorted(coming.left):
                    place_if_there(layer)
            for layer in sorted(coming.left, reverse=coming.kv.blocks.is_cpu):
                coming.place(layer)
        finally:
            coming.close()
        if errors:
            raise errors[0]

    def _came(self, coming: Coming) -> None:
        self._note(coming.load.request, "load_ms", coming.spent_ms)
        if coming.good > coming.load.start:
            self._count("hit_tokens_prefix", coming.good - coming.load.start)

    @torch.inference_mode()
    def wait(self, name: str) -> None:
        """Before the attention of a layer: its part of every prefix that this forward reads."""
        if self.busy:
            return
        self._bring_layer(self._index.get(name))

    def _bring_layer(self, layer: int | None) -> None:
        for coming in list(self._coming):
            began = time.perf_counter()
            try:
                for i in sorted(coming.left) if layer is None else coming.left & {layer}:
                    coming.place(i)
                coming.spent_ms += (time.perf_counter() - began) * 1e3
            except Exception as error:
                self._coming.remove(coming)
                self._lost(coming.load, coming.load.start, error)
                continue
            if not coming.left:
                self._coming.remove(coming)
                self._came(coming)

    @torch.inference_mode()
    def settle(self) -> None:
        """After a forward, or where there was none: whatever no layer has asked for."""
        if self._coming:
            self._bring_layer(None)

    def _own(self, key: bytes) -> bytes:
        """This rank's key of a prefix chunk; the scheduler names rank 0's. The tenant's bytes stay."""
        if self.rank == 0:
            return key
        digest = hashlib.sha256(b"rank %d" % self.rank + key).digest()
        return key[:TENANT_BYTES] + digest[: len(key) - TENANT_BYTES]

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
    def begin(self, saves: Sequence[Save]) -> None:
        """Before a forward: take room for the chunks that it completes."""
        types = [(layer.cache.dtype, layer.cache.dtype) for layer in self.layers]
        shapes = [(x.heads, x.dim, x.heads, x.dim) for x in self.layers]
        self._leaving = []
        for save in saves:
            kv = PagedKV(self.layers, torch.tensor(save.blocks, device=self.layers[0].cache.device), len(save.tokens))
            try:
                for key, start, end in save.chunks:
                    key = self._own(key)
                    if key not in self.engine:
                        tokens = torch.tensor(save.tokens[start:end])
                        writer = self.engine.store_layers(key, tokens, shapes, types)
                        if writer.taken:
                            self._leaving.append(Leaving(save, kv, writer, start, end))
            except Exception as error:
                self._unsaved(save, error)

    @torch.inference_mode()
    def save_layer(self, name: str) -> None:
        """After the attention of a layer: copy it out of the blocks."""
        if self.layerwise and not self.busy and self._leaving:
            self._copy_out(self._index.get(name))

    def _copy_out(self, layer: int | None) -> None:
        """One layer of all chunks that are to be stored, or, with None, all layers that are not copied yet."""
        began = time.perf_counter()
        for leaving in list(self._leaving):
            save, kv, writer, start, end = leaving
            if save.request in self._failed:  # its KV in this step is computed on top of what did not come
                self._leaving.remove(leaving)
                continue
            try:
                angles = None if self.rotary is None else self.rotary.at(torch.arange(start, end))
                for i in sorted(writer.left if layer is None else writer.left & {layer}):
                    k, v = self.layers[i].read(kv.blocks, start, end)
                    writer.put(i, *((k, v) if angles is None else angles.unrotate(i, k, v)))
            except Exception as error:
                self._leaving.remove(leaving)
                self._unsaved(save, error)
                continue
            if not writer.left:
                self._leaving.remove(leaving)
                self._count("stored_tokens", end - start)
        self._count("save_ms", (time.perf_counter() - began) * 1e3)

    @torch.inference_mode()
    def save(self, saves: Sequence[Save]) -> None:
        """After a forward: layers that no hook has copied, and segments; writing goes on in the engine's threads."""
        self.settle()
        if self._leaving:
            self._copy_out(None)
        for save in saves:
            if not save.spans or self.runner is None or save.request in self._failed:
                continue
            began = time.perf_counter()
            try:
                self._save_segments(save)
            except Exception as error:
                self._unsaved(save, error)
            self._count("save_ms", (time.perf_counter() - began) * 1e3)

    def _unsaved(self, save: Save, error: Exception) -> None:
        log.warning("request %s: KV is not stored: %s", save.request, error, exc_info=_odd(error))
        self._count("errors")

    def _save_segments(self, save: Save) -> None:
        kv = PagedKV(self.layers, torch.tensor(save.blocks, device=self.layers[0].cache.device), len(save.tokens))
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
