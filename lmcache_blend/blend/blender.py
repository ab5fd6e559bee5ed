"""Blender: reuse the KV of stored chunks anywhere in a prompt, recompute the rows that a policy chooses."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmcache_blend.blend.chunks import read_layers
from lmcache_blend.blend.policies import RowPolicy, get_policy, policies
from lmcache_blend.blend.prefill import Prefill, generate_batch
from lmcache_blend.blend.runner import Computed, ModelRunner, Plan
from lmcache_blend.blend.segments import by_passages
from lmcache_blend.blend.select import Deviation, Work, base_signals, deviation_chooser, run_probe, top
from lmcache_blend.config import BlendConfig
from lmcache_blend.engine import ChunkStore, MemoryStore, Stored, chunk_key, context_digest
from lmcache_blend.errors import ChunkLostError, ConfigError
from lmcache_blend.rotary import Angles
from lmcache_blend.triton_kernels.place import Pages, place
from lmcache_blend.types import KVChunk, Prompt, Trace


@dataclass
class _Hit:
    """A chunk's place in the prompt, and how many of its first tokens stand there already."""

    start: int
    end: int
    chunk: KVChunk
    exact: bool
    skip: int = 0


class _Loader:
    """Fills a layer's dense buffers from the hits, keys turned. positions: [n], those that it fills, ascending."""

    def __init__(self, hits: list[_Hit], angles: Angles, times: dict[str, float]):
        self.hits, self.times = hits, times
        self.parts = [angles[h.start + h.skip : h.end] for h in hits]
        self.positions = torch.cat([torch.arange(h.start + h.skip, h.end) for h in hits])

    def __call__(self, layer: int, k: Tensor | Pages, v: Tensor | Pages) -> None:
        began = time.perf_counter()
        for hit, part in zip(self.hits, self.parts, strict=True):
            for slot, buffer in ((0, k), (1, v)):
                source = hit.chunk.layers[layer][slot][:, hit.skip :].to(buffer.device)
                place(buffer, source, hit.start + hit.skip, *part.of(layer, slot))
        self.times["place"] = self.times.get("place", 0.0) + time.perf_counter() - began


class Blender:
    """Prefills prompts from stored KV chunks.

    runner: a ModelRunner (`lmcache_blend.hf.load_runner`). config: BlendConfig, by default from LMCACHE_BLEND_*
    variables.
    store: where chunks live, by default a new MemoryStore.

    Example:
        >>> runner = load_runner("smollm2-135m")                                           # doctest: +SKIP
        >>> blender = Blender(runner, BlendConfig(policy="epic", recompute_ratio=0.15))    # doctest: +SKIP
        >>> blender.generate(["Ada lives in Turin.", "Bo lives in Oslo."], "Where does Bo live?")  # doctest: +SKIP
    """

    def __init__(self, runner: ModelRunner, config: BlendConfig | None = None, store: ChunkStore | None = None):
        self.runner, self.config = runner, BlendConfig.from_env() if config is None else config
        self.chunks: ChunkStore = MemoryStore() if store is None else store
        self.policy = get_policy(self.config.policy, self.config.options)
        # Where ranks hold a part of the heads each: sums a tensor over them, and how many they are.
        self._reduce: Callable[[Tensor], Tensor] | None = getattr(runner, "reduce", None)
        self._ranks: int = getattr(runner, "ranks", 1)

    # ------------------------------------------------------------------ text
    def prompt(self, passages: Prompt | Sequence[str] | str, question: str = "", prefix: str = "") -> Prompt:
        """Text -> a Prompt with one span a passage (and one for the prefix); a Prompt stays as it is.

        passages: a list, or one string cut at config.separator, whose last piece stands before the question.
        """
        if isinstance(passages, Prompt):
            return passages
        if isinstance(passages, str):
            *passages, last = passages.split(self.config.separator)
            question = last + question
        return by_passages(self.runner.tokenizer, passages, question, prefix, self.config.separator)

    def generate(
        self, passages: Prompt | Sequence[str] | str, question: str = "", max_new_tokens: int = 64, prefix: str = ""
    ) -> str:
        """The greedy answer to a question about passages; what was not stored is computed and stored for next time."""
        return self.runner.tokenizer.decode(self.prefill(passages, question, prefix).generate(max_new_tokens))

    # ------------------------------------------------------------------ storing
    def store(self, passages: Prompt | Sequence[str] | str, question: str = "", prefix: str = "") -> int:
        """Compute and store the KV of every span that is not stored yet; returns how many were computed."""
        prompt = self.prompt(passages, question, prefix)
        added = 0
        for i, (start, end) in enumerate(prompt.spans):
            key = self._key(prompt, i)
            if key not in self.chunks:
                self.chunks.put(key, self._encode(prompt.tokens[start:end], self._behind(prompt, i)))
                added += 1
        return added

    def _behind(self, prompt: Prompt, i: int) -> Tensor:
        """Tokens that stand before span i while it is computed for the store."""
        is_prefix = prompt.prefix and i == 0
        if self.config.encode == "prefix" and prompt.prefix and not is_prefix:
            return prompt.tokens[: prompt.spans[0][1]]
        bos = self.runner.bos_id
        if self.config.encode == "bos" and not is_prefix and bos is not None and prompt.spans[i][0] > 0:
            return torch.tensor([bos])
        return prompt.tokens[:0]

    def _key(self, prompt: Prompt, i: int) -> bytes:
        start, end = prompt.spans[i]
        behind = self._behind(prompt, i).numpy().tobytes()
        return chunk_key(self.runner.fingerprint, self.config.salt, behind, prompt.tokens[start:end])

    def _encode(self, tokens: Tensor, behind: Tensor) -> KVChunk:
        ids = torch.cat((behind, tokens))
        kv = self.runner.new_kv(len(ids))
        start, rows = len(behind), torch.arange(len(ids))
        angles = self.runner.rotary.at(rows)
        found = self._checked(self.chunks.get(self._prefix_key(behind)), behind, behind[:0], angles) if start else None
        try:
            if found is not None and found[1]:
                kv.fill_with(_Loader([_Hit(0, start, found[0].chunk, True)], angles, {}))
                rows = rows[start:]
            self.runner.forward([ids], [kv], Plan([rows]))
        except ChunkLostError:
            kv = self.runner.new_kv(len(ids))
            self.runner.forward([ids], [kv], Plan([torch.arange(len(ids))]))
        return self._chunk(ids, kv, start, len(ids), angles, exact=True)

    def _prefix_key(self, behind: Tensor) -> bytes:
        return chunk_key(self.runner.fingerprint, self.config.salt, b"", behind)

    def _chunk(self, ids: Tensor, kv: Any, start: int, end: int, angles: Angles, exact: bool) -> KVChunk:
        """Pre-RoPE copy of positions start..end of kv."""
        layers = read_layers(self.runner, kv, start, end, angles[start:end])
        digest = context_digest(ids[:start], angles.regime()) if exact else None
        return KVChunk(ids[start:end].clone(), layers, digest)

    # ------------------------------------------------------------------ prefill
    def prefill(
        self,
        passages: Prompt | Sequence[str] | str,
        question: str = "",
        prefix: str = "",
        *,
        policy: str | RowPolicy | None = None,
        recompute_ratio: float | None = None,
    ) -> Prefill:
        """Blend one prompt up to its first token.

        passages, question, prefix: as in `prompt`. policy, recompute_ratio: for this call only.
        Raises UnknownNameError, ConfigError, SegmentError, ContextLengthError.
        """
        prompt = self.prompt(passages, question, prefix)
        return self.prefill_batch([prompt], policy=policy, recompute_ratio=recompute_ratio)[0]

    def prefill_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        policy: str | RowPolicy | None = None,
        recompute_ratio: float | None = None,
    ) -> list[Prefill]:
        """Blend several prompts in one forward; stage times in the traces are those of the whole batch."""
        lost: set[bytes] = set()
        while True:
            try:
                return self._prefill_batch(prompts, policy, recompute_ratio, lost)
            except ChunkLostError as error:
                # Found, and then gone or damaged half way: once more without it.
                lost.add(error.key)

    def _prefill_batch(
        self, prompts: Sequence[Prompt], policy: str | RowPolicy | None, recompute_ratio: float | None, lost: set[bytes]
    ) -> list[Prefill]:
        chosen, ratio = self._chosen(policy, recompute_ratio)
        clock = _Clock()
        works = [self._load(p, chosen, ratio, clock, lost) for p in prompts]
        plan = self._plan(works, chosen, ratio, clock)
        with clock("forward"):
            computed = self.runner.forward([w.prompt.tokens for w in works], [w.kv for w in works], plan)
            assert computed.logits is not None
            logits = [row[-1] for row in computed.logits]
            logits[0].argmax().item()  # the first token; waits for the device
        self._complete(works, computed, clock)
        if self.config.store_misses:
            for work in works:
                self._store_misses(work)
        return [Prefill(self.runner, w.prompt, w.kv, x, w.trace) for w, x in zip(works, logits, strict=True)]

    def fill(
        self,
        prompt: Prompt,
        kv: Any,
        done: int = 0,
        *,
        policy: str | RowPolicy | None = None,
        recompute_ratio: float | None = None,
    ) -> Work:
        """Blend one prompt into KV that a host engine allocated, all but its last token, which the engine computes.

        done: first tokens whose exact KV stands in kv already. Misses are not stored; `keep` does that later. Raises
        UnknownNameError, ConfigError, ContextLengthError.
        """
        chosen, ratio = self._chosen(policy, recompute_ratio)
        lost: set[bytes] = set()
        while True:
            clock, work = _Clock(), None
            try:
                work = self._load(prompt, chosen, ratio, clock, lost, kv, done)
            except ChunkLostError as error:
                lost.add(error.key)
            # One rank's loss sends all of them round again.
            failed = torch.full((1,), float(work is None))
            if not float(failed if self._reduce is None else self._reduce(failed)):
                break
        assert work is not None
        plan = self._plan([work], chosen, ratio, clock)
        plan.rows, plan.observer = [work.rows[work.rows < len(prompt) - 1]], None
        with clock("forward"):
            computed = self.runner.forward([prompt.tokens], [kv], plan)
        self._complete([work], computed, clock)
        return work

    def _complete(self, works: Sequence[Work], computed: Computed, clock: "_Clock") -> None:
        """Put into the traces what the forward did."""
        total, stages = clock.total(), clock.stages()
        for b, work in enumerate(works):
            trace = work.trace
            trace.rows = [torch.unique(r[b].cpu()) for r in computed.rows]
            trace.flops += self.runner.cost.forward(trace.rows, len(work.prompt), int(computed.logits is not None))
            trace.deviation, trace.ttft_ms, trace.stages_ms = work.deviation.table, total, stages
            trace.loading_ms = sum(r.seconds for r in work.reads) * 1e3
            trace.loading_wait_ms = sum(r.waited for r in work.reads) * 1e3

    def _chosen(self, policy: str | RowPolicy | None, recompute_ratio: float | None) -> tuple[RowPolicy, float]:
        """The policy and ratio of one call."""
        chosen = self.policy if policy is None else get_policy(policy) if isinstance(policy, str) else policy
        ratio = self.config.recompute_ratio if recompute_ratio is None else recompute_ratio
        if not 0.0 <= ratio <= 1.0:
            raise ConfigError(f"recompute_ratio = {ratio}: choose a number in [0, 1]")
        return chosen, ratio if chosen.fixed_ratio is None else chosen.fixed_ratio

    generate_batch = staticmethod(generate_batch)

    def _load(
        self,
        prompt: Prompt,
        policy: RowPolicy,
        ratio: float,
        clock: "_Clock",
        lost: set[bytes],
        kv: Any = None,
        done: int = 0,
    ) -> Work:
        """Look the spans up, and set the KV up so that each layer is placed when the forward comes to it.

        kv: where to put them, by default a new one. done: first tokens whose exact KV stands there already.
        """
        with clock("load"):
            kv = self.runner.new_kv(len(prompt)) if kv is None else kv
            angles = self.runner.rotary.at(torch.arange(len(prompt)))
            hits, kinds, loaded, reads, covered = [], [], 0, [], done
            keys = [self._key(prompt, i) for i in range(len(prompt.spans))] if policy.reuse != "none" else []
            wanted = [key for key, (_, end) in zip(keys, prompt.spans, strict=False) if end > done]
            stored = self._agreed(self._get([key for key in dict.fromkeys(wanted) if key not in lost]))
            for i, (start, end) in enumerate(prompt.spans):
                tokens = prompt.tokens
                found = None
                if end <= done:
                    kinds.append((start, end, "exact"))
                    continue
                if keys:
                    found = self._checked(stored.get(keys[i]), tokens[start:end], tokens[:start], angles)
                if found is None:
                    kinds.append((start, end, "miss"))
                    continue
                piece, exact = found
                leading = exact and start <= covered
                if policy.reuse == "prefix" and not leading:
                    kinds.append((start, end, "miss"))
                    continue
                covered = end if leading else covered
                hits.append(_Hit(start, end, piece.chunk, exact, max(0, done - start)))
                kinds.append((start, end, "exact" if exact else "reused"))
                loaded += piece.nbytes
                if piece.reads is not None and piece.reads not in reads:
                    reads.append(piece.reads)
            if hits:
                kv.fill_with(_Loader(hits, angles, clock.times))
            candidate = torch.zeros(len(prompt), dtype=torch.bool)
            uncached = torch.ones(len(prompt), dtype=torch.bool)
            uncached[:done] = False
            for hit in hits:
                uncached[hit.start : hit.end] = False
                candidate[hit.start + hit.skip : hit.end] = not hit.exact
            uncached[-1] = True
            candidate[-1] = False
        trace = Trace(
            method=_name(policy),
            recompute_ratio=ratio if policy.fixed_ratio is None else None,
            tokens=len(prompt),
            loaded_bytes=loaded,
            hits=kinds,
            full_flops=self.runner.cost.full(len(prompt)),
        )
        signals = base_signals(prompt, candidate)
        deviation = Deviation(self.runner.num_layers, candidate)
        rows = uncached.nonzero().flatten()
        return Work(prompt, kv, trace, candidate, uncached, rows, signals, deviation, reads)

    def _agreed(self, stored: dict[bytes, Stored | None]) -> dict[bytes, Stored | None]:
        """What every rank that holds a part of the heads has found: all of them must compute the same rows."""
        if self._reduce is None or not stored:
            return stored
        found = self._reduce(torch.tensor([float(chunk is not None) for chunk in stored.values()])).round().tolist()
        return {key: stored[key] if n == self._ranks else None for key, n in zip(stored, found, strict=True)}

    def _get(self, keys: Sequence[bytes]) -> dict[bytes, Stored | None]:
        """Chunks by key; from a store that can, all in one call and layer by layer."""
        load = getattr(self.chunks, "load", None)
        found = [self.chunks.get(key) for key in keys] if load is None else load(keys)
        return dict(zip(keys, found, strict=True))

    def _checked(
        self, stored: Stored | None, tokens: Tensor, before: Tensor, angles: Angles
    ) -> tuple[Stored, bool] | None:
        """The stored chunk of `tokens`, and whether its KV is exact behind the tokens `before`.

        A store is not trusted to return the right chunk: one of other tokens or shapes is a miss.
        """
        if stored is None:
            return None
        if not torch.equal(stored.chunk.tokens, tokens) or stored.chunk.shapes != self.runner.kv_shapes:
            return None
        return stored, stored.chunk.exact_after == context_digest(before, angles.regime())

    def _plan(self, works: list[Work], policy: RowPolicy, ratio: float, clock: "_Clock") -> Plan:
        schedule = policy.schedule(self.runner.num_layers, ratio) if 0.0 < ratio < 1.0 else {0: ratio}
        open_ = any(bool(w.candidate.any()) for w in works)
        checks = {}
        if not open_ or ratio == 0.0:
            pass  # nothing to choose from, or nothing to choose
        elif ratio == 1.0:
            for w in works:
                w.rows = (w.candidate | w.uncached).nonzero().flatten()
        elif 0 in schedule:
            with clock("probe"):
                for w in works:
                    self._probe(w, policy)
            with clock("select"):
                for w in works:
                    # Scores are means over heads, so that a mean over the ranks is exact.
                    scores = policy.score(w.signals)
                    scores = w.note_scores(scores if self._reduce is None else self._reduce(scores) / self._ranks)
                    picked = top(scores, w.candidate, round(schedule[0] * int(w.candidate.sum())))
                    w.rows = torch.cat((picked, w.rows)).sort().values
        else:
            for w in works:
                w.rows = (w.candidate | w.uncached).nonzero().flatten()
            checks = {
                i: deviation_chooser(policy, works, share, self.runner.cost.check[i], self._reduce)
                for i, share in schedule.items()
            }

        def observe(layer: int, b: int, *seen: Tensor) -> None:
            works[b].deviation(layer, *seen)

        return Plan([w.rows for w in works], checks=checks, observer=observe)

    def _probe(self, work: Work, policy: RowPolicy) -> None:
        limit = getattr(policy, "max_queries", 64)
        last_cached = int((~work.uncached).nonzero()[-1])
        question = torch.arange(max(last_cached + 1, len(work.prompt) - limit), len(work.prompt))
        if "oracle" in policy.needs:
            self._true(work, question)
        elif "query_probe" in policy.needs:
            hidden = work.uncached.clone()
            hidden[question] = False
            work.trace.flops += run_probe(self.runner, work.prompt, work.kv, question, hidden, work.signals)

    def _true(self, work: Work, question: Tensor) -> None:
        """What only a full prefill knows: the true deviation of the reused KV and the question's true attention."""
        every, tokens = torch.arange(len(work.prompt)), work.prompt.tokens
        fresh = self.runner.new_kv(len(tokens))
        self.runner.forward([tokens], [fresh], Plan([every]))
        deviation = Deviation(self.runner.num_layers, work.candidate)
        for i in range(self.runner.num_layers):
            k, v = fresh.read(i, every)
            deviation(i, every, k[0], v[0], *work.kv.layer(i))
        work.signals.true_deviation = deviation.table
        none = torch.zeros(len(tokens), dtype=torch.bool)
        work.trace.flops += self.runner.cost.full(len(tokens))
        work.trace.flops += run_probe(self.runner, work.prompt, fresh, question, none, work.signals)

    def _store_misses(self, work: Work) -> None:
        """Keep the KV of spans met for the first time; it is exact only where nothing approximate stands before it."""
        self.keep(work.prompt, work.kv, *work.outcome())

    def keep(self, prompt: Prompt, kv: Any, computed: Tensor, exact_tokens: int) -> int:
        """Store the spans that are not stored yet, from KV that stands in `kv`; how many.

        computed: [T] bool, tokens whose KV was computed for this prompt: a span is stored if all of it was.
        exact_tokens: how many tokens from the start have exact KV.
        """
        angles, added = None, 0
        for i, (start, end) in enumerate(prompt.spans):
            key = self._key(prompt, i)
            if bool(computed[start:end].all()) and key not in self.chunks:
                if angles is None:  # most prompts bring nothing new
                    angles = self.runner.rotary.at(torch.arange(len(prompt)))
                exact = start <= exact_tokens
                self.chunks.put(key, self._chunk(prompt.tokens, kv, start, end, angles, exact=exact))
                added += 1
        return added


class _Clock:
    """Wall time per stage, in the order of the stages; placing happens inside forwards and is taken out of them."""

    def __init__(self) -> None:
        self.began, self.times = time.perf_counter(), {}
        self._stage: list[tuple[str, float, float]] = []

    def __call__(self, stage: str) -> "_Clock":
        self._stage.append((stage, time.perf_counter(), self.times.get("place", 0.0)))
        return self

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        stage, began, placed = self._stage.pop()
        spent = time.perf_counter() - began - (self.times.get("place", 0.0) - placed)
        self.times[stage] = self.times.get(stage, 0.0) + spent

    def total(self) -> float:
        return (time.perf_counter() - self.began) * 1e3

    def stages(self) -> dict[str, float]:
        return {s: self.times.get(s, 0.0) * 1e3 for s in ("load", "place", "probe", "select", "forward")}


def _name(policy: RowPolicy) -> str:
    return next((name for name in policies if policies.get(name) is type(policy)), type(policy).__name__)
