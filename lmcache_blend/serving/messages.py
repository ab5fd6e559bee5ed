"""What the scheduler's half tells the worker's, once a step; and what they share when they live in one process."""

import threading
from dataclasses import dataclass, field
from typing import Any

from lmcache_blend.engine import EngineConfig, KVEngine

Span = tuple[int, int]


@dataclass
class Blend:
    """How the tokens behind the prefix are blended. spans: segments, in prompt positions."""

    spans: list[Span]
    policy: str
    recompute_ratio: float
    options: dict[str, Any]


@dataclass
class Load:
    """KV to bring in before (or, where asynchronous, beside) a forward.

    tokens: of the prompt. start: first tokens that stand in vLLM's own cache. keys: prefix chunks (key, end) that cover
    start..prefix_end. end: all tokens that vLLM takes as computed. blocks: of the request, from its first.
    """

    request: str
    tokens: list[int]
    start: int
    keys: list[tuple[bytes, int, int]]
    prefix_end: int
    end: int
    salt: str
    asynchronous: bool = False
    blend: Blend | None = None
    blocks: list[int] = field(default_factory=list)


@dataclass
class Save:
    """KV to store after a forward. chunks: prefix chunks (key, start, end). spans: segments, of a prompt that is
    computed to its end. tokens: at least up to the last of these."""

    request: str
    tokens: list[int]
    blocks: list[int]
    salt: str
    chunks: list[tuple[bytes, int, int]] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)


class Shared:
    """One engine a process and configuration, so that scheduler and worker in one process see the same memory.

    reports: what workers of this process did for a request, until it is finished.
    """

    def __init__(self) -> None:
        self._engines: dict[str, tuple[KVEngine, int]] = {}
        self._lock = threading.Lock()
        self.reports: dict[str, dict[str, Any]] = {}

    def acquire(self, config: EngineConfig) -> KVEngine:
        with self._lock:
            engine, users = self._engines.get(config.model_dump_json()) or (KVEngine(config), 0)
            self._engines[config.model_dump_json()] = engine, users + 1
            return engine

    def release(self, engine: KVEngine) -> None:
        """Closes the engine when its last user has left."""
        with self._lock:
            for name, (one, users) in list(self._engines.items()):
                if one is engine:
                    if users > 1:
                        self._engines[name] = one, users - 1
                        return
                    del self._engines[name]
        engine.close()


shared = Shared()
