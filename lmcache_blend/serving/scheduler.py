"""The scheduler's half: for each request what to load, what to blend, and what to store when it is computed."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmcache_blend.blend import by_separator, get_policy
from lmcache_blend.config import cache_dir
from lmcache_blend.engine import Keyer, KVEngine, chunk_key
from lmcache_blend.errors import ConfigError, LMCacheBlendError
from lmcache_blend.serving.config import ServingConfig
from lmcache_blend.serving.matching import SegmentIndex, Span, with_gaps
from lmcache_blend.serving.messages import Blend, Load, Save
from lmcache_blend.types import Prompt

log = logging.getLogger(__name__)


def segment_key(fingerprint: str, salt: str, tokens: Sequence[int]) -> bytes:
    """The Blender's key of a segment that is stored on its own."""
    return chunk_key(fingerprint, salt, b"", torch.tensor(tokens, dtype=torch.long))


@dataclass
class BlendRequest:
    """kv_transfer_params["blend"] of a request, over the server's settings."""

    enabled: bool
    policy: str
    recompute_ratio: float
    options: dict[str, Any]
    spans: list[Span] | None = None

    @classmethod
    def read(cls, raw: Any, config: ServingConfig, tokens: int) -> "BlendRequest | None":
        """None where the server does not blend. Raises ConfigError, UnknownNameError, SegmentError."""
        settings = config.blend
        if settings is None:
            if raw and (not isinstance(raw, dict) or raw.get("enabled", True)):
                raise ConfigError('the server does not blend: start it with "blend" in its kv_connector_extra_config')
            return None
        raw = {"enabled": raw} if isinstance(raw, bool) else ({} if raw is None else raw)
        known = ("enabled", "policy", "recompute_ratio", "options", "spans", "tenant")
        if not isinstance(raw, dict) or set(raw) - set(known):
            raise ConfigError(f"kv_transfer_params blend = {raw!r}: known are {', '.join(known)}")
        policy = raw.get("policy", settings.policy)
        options = raw.get("options", settings.options if policy == settings.policy else {})
        if "oracle" in get_policy(policy, options).needs:
            raise ConfigError(f"policy {policy!r} computes the whole prompt first: it is for analysis, not for serving")
        ratio = raw.get("recompute_ratio", settings.recompute_ratio)
        if not isinstance(ratio, (int, float)) or not 0 <= ratio <= 1:
            raise ConfigError(f"recompute_ratio = {ratio!r}: choose a number in [0, 1]")
        spans = raw.get("spans")
        if spans is not None:
            if not isinstance(spans, list) or not all(isinstance(s, (list, tuple)) and len(s) == 2 for s in spans):
                raise ConfigError(f"spans = {spans!r}: give a list of [start, end] in tokens")
            spans = list(Prompt(torch.zeros(tokens, dtype=torch.long), tuple(map(tuple, spans))).spans)
        return cls(bool(raw.get("enabled", True)), policy, float(ratio), options, spans)


@dataclass
class State:
    """A request on its way.

    whole, tail: how many whole chunks of it are stored, and whether the rest of its prompt is. blended: tokens from
    here on are not exact.
    """

    request: Any
    salt: str
    blend: BlendRequest | None
    report: bool
    error: str = ""
    load: Load | None = None
    whole: int = 0
    tail: bool = False
    blended: int | None = None
    segments_saved: bool = False
    keys: list[bytes] = field(default_factory=list)
    keyed: int = -1
    tokens: np.ndarray | None = None
    hits: dict[str, int] = field(default_factory=dict)


class SchedulerHalf:
    """engine: for looking up. fingerprint, ranks: of the model; keys are those of rank 0."""

    def __init__(
        self,
        config: ServingConfig,
        engine: KVEngine,
        fingerprint: str,
        layout: Callable[[int], str],
        tokenizer: Callable[[], Any],
        unsupported: str = "",
    ):
        self.config, self.engine, self.fingerprint = config, engine, fingerprint
        self.layout, self._tokenizer, self.unsupported = layout(0), tokenizer, unsupported
        self.segments = f"{fingerprint}/{self.layout.partition('/')[2]}"
        self.states: dict[str, State] = {}
        self.blend_refused = ""
        self.manager: Any = None
        self.counts: dict[str, float] = {}
        self._queue: list[Load] = []
        self._separator: list[int] | None = None
        self.index: SegmentIndex | None = None
        if config.blend is not None and config.blend.match == "content":
            path = config.blend.index or cache_dir() / "segments" / f"{self.segments.replace('/', '_')}.idx"
            self.index = SegmentIndex(Path(path))

    # ------------------------------------------------------------------ a request comes
    def add(self, request: Any) -> None:
        params = request.kv_transfer_params or {}
        state = State(request, self._salt(request, params), None, bool(params.get("breakdown")))
        self.states[request.request_id] = state
        if self._foreign(request):
            return
        try:
            state.blend = BlendRequest.read(params.get("blend"), self.config, request.num_prompt_tokens)
        except LMCacheBlendError as error:
            # A bad field must not stop the server, nor be passed over in silence: the answer says what was wrong.
            state.error = str(error)
            self._count("errors")
            log.warning("request %s is served without blending: %s", request.request_id, error)
        state.tokens = np.asarray(request.prompt_token_ids)

    def _salt(self, request: Any, params: dict[str, Any]) -> str:
        """Everything that separates tenants, in one string that cannot be forged by another split."""
        blend = params.get("blend")
        tenant = params.get("tenant") or (blend.get("tenant") if isinstance(blend, dict) else None) or ""
        lora = request.lora_request
        adapter = f"{lora.lora_name}:{lora.lora_path}" if lora is not None else ""
        parts = [self.config.salt, request.cache_salt or "", str(tenant), adapter]
        return "" if not any(parts) else "\0".join(f"{len(p)}:{p}" for p in parts)

    def _foreign(self, request: Any) -> bool:
        """Whether the KV depends on more than token ids (images, embeddings)."""
        return bool(request.mm_features) or request.prompt_token_ids is None or request.prompt_embeds is not None

    def _keys(self, state: State, tokens: Sequence[int]) -> list[bytes]:
        if state.keyed != len(tokens):
            keyer = Keyer(self.fingerprint, state.salt, self.layout, self.config.chunk_tokens)
            state.keys, state.keyed = keyer.prefix_keys(tokens), len(tokens)
        return state.keys

    # ------------------------------------------------------------------ what is there
    def matched(self, request: Any, computed: int) -> tuple[int, bool]:
        """Tokens beyond `computed` that this connector brings, and whether beside the running batch."""
        state = self.states.get(request.request_id)
        if state is None or state.tokens is None or request.skip_reading_prefix_cache or self.unsupported:
            return 0, False
        state.load = None
        tokens, size = request.all_token_ids, self.config.chunk_tokens
        prompt = request.num_prompt_tokens
        keys, found = [], computed
        last = request.num_tokens - 1  # one token is left to compute, since its logits give the next
        if self.config.offload and computed < last:
            names = self._keys(state, list(tokens))
            first = computed // size
            n = self.engine.lookup(names[first:]).prefix + first
            state.whole, state.tail = max(state.whole, min(n, len(tokens) // size)), n > len(tokens) // size
            keys = [(names[i], i * size, min((i + 1) * size, len(tokens))) for i in range(first, n)]
            found = max(computed, min(keys[-1][2], last)) if keys else computed
        blend = self._blend(state, found, computed, prompt)
        end = prompt - 1 if blend is not None else found
        if end <= computed:
            return 0, False
        if blend is not None:
            self._make_private(request, found, state)
        keys = keys if found > computed else []
        later = self.config.async_load and blend is None
        state.load = Load(
            request.request_id, list(tokens[:end + 1]), computed, keys, found, end, state.salt, later, blend
        )  # fmt: skip
        return end - computed, later

    def _blend(self, state: State, found: int, computed: int, prompt: int) -> Blend | None:
        want = state.blend
        if want is None or not want.enabled or self.blend_refused or found >= prompt - 1 or not self._reuses(want):
            return None
        spans = self._segments(state, found, prompt)
        wanted = [s for s in spans if s[1] > found]
        keys = [self._segment_key(state, s) for s in wanted]
        there = self.engine.lookup([], keys).segments if keys else []
        hits = [s for s, tier in zip(wanted, there, strict=True) if tier is not None]
        if not hits:
            return None
        return Blend(spans, want.policy, want.recompute_ratio, want.options)

    def _reuses(self, want: BlendRequest) -> bool:
        return get_policy(want.policy, want.options).reuse == "all"

    def _segment_key(self, state: State, span: Span) -> bytes:
        assert state.tokens is not None
        return segment_key(self.segments, state.salt, state.tokens[span[0] : span[1]].tolist())

    def _segments(self, state: State, found: int, prompt: int) -> list[Span]:
        """The spans of a request: its own, or by the separator, or by content."""
        settings, want, ids = self.config.blend, state.blend, state.tokens
        assert settings is not None
        assert want is not None
        assert ids is not None
        if want.spans is not None:
            spans = want.spans
        elif settings.match == "separator":
            spans = list(by_separator(torch.from_numpy(ids.astype(np.int64)), self._mark()).spans)
        elif settings.match == "content":
            assert self.index is not None

            def stored(span: Span) -> bool:
                return self.engine.lookup([], [self._segment_key(state, span)]).segments[0] is not None

            matched = self.index.match(ids, 0, stored)
            spans = with_gaps(ids, 0, matched, settings.min_tokens)
        else:
            spans = []
        return [s for s in spans if s[1] - s[0] >= settings.min_tokens]

    def _mark(self) -> list[int]:
        if self._separator is None:
            assert self.config.blend is not None
            mark = self.config.blend.separator
            text = isinstance(mark, str)
            self._separator = self._tokenizer().encode(mark, add_special_tokens=False) if text else [*map(int, mark)]
        assert self._separator is not None
        return self._separator

    def _make_private(self, request: Any, exact: int, state: State) -> None:
        """Keep blended blocks from every other request's prefix hits.

        vLLM files a block under a hash that chains over all tokens before it, when the block is allocated. From the
        first block that holds a blended token on, this request's chain goes on from a random value instead: the blocks
        before stay shared, and the request itself still finds its own blocks when it is preempted and comes back.
        """
        state.blended = exact if state.blended is None else min(state.blended, exact)
        if request._block_hasher is None or self.manager is None:
            return
        first = exact // self.manager.block_pool.hash_block_size
        del request.block_hashes[first:]
        request.block_hashes.append(os.urandom(32))
        request.update_block_hashes()

    # ------------------------------------------------------------------ a step
    def allocated(self, request: Any, blocks: Any, external: int) -> None:
        state = self.states.get(request.request_id)
        if state is None or state.load is None or external <= 0:
            return
        load, state.load = state.load, None
        load.blocks = list(blocks.get_block_ids()[0])
        self._queue.append(load)
        state.hits = {"local": load.start, "prefix": load.prefix_end - load.start}

    def step(self, output: Any) -> tuple[list[Load], list[Save]]:
        """Loads and saves of this step."""
        loads, self._queue = self._queue, []
        saves = []
        for name, scheduled in output.num_scheduled_tokens.items():
            state = self.states.get(name)
            if state is not None and state.tokens is not None and not self.unsupported:
                save = self._save(state, state.request.num_computed_tokens + scheduled)
                if save is not None:
                    saves.append(save)
        return loads, saves

    def _save(self, state: State, computed: int) -> Save | None:
        request, size = state.request, self.config.chunk_tokens
        prompt = request.num_prompt_tokens
        known = min(computed, request.num_tokens)
        chunks: list[tuple[bytes, int, int]] = []
        if self.config.offload and state.blended is None:
            limit = prompt - self.config.skip_last_n_tokens
            end = known if self.config.save_decode_cache and known > prompt else min(known, limit)
            whole = max(end // size, 0)
            tail = self.config.partial_chunks and not state.tail and known >= prompt and whole * size < end <= limit
            if whole > state.whole or tail:
                keys = self._keys(state, list(request.all_token_ids[: end if tail else whole * size]))
                chunks = [(keys[i], i * size, (i + 1) * size) for i in range(state.whole, whole)]
                if tail:
                    chunks.append((keys[whole], whole * size, end))
                state.whole, state.tail = max(whole, state.whole), state.tail or tail
        spans: list[Span] = []
        if known >= prompt and not state.segments_saved and self._stores_segments(state):
            state.segments_saved = True
            spans = self._segments(state, 0, prompt)
            if self.index is not None and state.tokens is not None:
                for start, end in spans:
                    self.index.add(state.tokens[start:end])
        if not chunks and not spans:
            return None
        end = max([c[2] for c in chunks] + [s[1] for s in spans])
        blocks = self.manager.get_block_ids(request.request_id)[0]
        return Save(request.request_id, list(request.all_token_ids[:end]), list(blocks), state.salt, chunks, spans)

    def _stores_segments(self, state: State) -> bool:
        settings = self.config.blend
        return bool(
            settings and settings.store_misses and state.blend and state.blend.enabled and not self.blend_refused
        )

    def finished(self, request: Any, report: dict[str, Any]) -> dict[str, Any] | None:
        state = self.states.pop(request.request_id, None)
        if state is None:
            return None
        report = {**state.hits, **report, **({"error": state.error} if state.error else {})}
        log.debug("request %s: %d prompt tokens, %s", request.request_id, request.num_prompt_tokens, report)
        return {"lmcache_blend": report} if state.report or state.error else None

    def _count(self, name: str, by: float = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + by
