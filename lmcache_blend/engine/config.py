"""Settings of the engine and of each of its tiers."""

import reprlib
from typing import Annotated, Any, Literal

import pydantic

from lmcache_blend.config import Config
from lmcache_blend.engine.eviction import policies
from lmcache_blend.engine.faults import FaultConfig
from lmcache_blend.errors import ConfigError, UnknownNameError


class TierConfig(Config):
    """One tier of an engine, and how the engine treats it.

    >>> TierConfig.read("disk", path="/kv", capacity_bytes=10**9, codec="int8").options
    {'path': '/kv', 'capacity_bytes': 1000000000}
    """

    tier: str
    """A registered name, a URL, or a dotted path ("package.module:Class")."""
    options: dict[str, Any] = pydantic.Field(default_factory=dict)
    """Arguments of the tier's class, e.g. path, capacity_bytes, fsync."""
    name: str = ""
    """In metrics and operations; by default the registered name or the URL's scheme. Unique in an engine."""
    codec: str | dict[str, Any] | None = None
    """How chunks are coded there; null keeps K and V as they are."""
    write: Literal["through", "back"] = "through"
    """Whether a new chunk is written here at once, or only when the tier above evicts it. The first tier gets all."""
    eviction: str = "lru"
    """Name of the eviction policy: lru, lfu, fifo, s3fifo, arc, cost."""
    quotas: dict[str, Annotated[int, pydantic.Field(ge=0)]] = pydantic.Field(default_factory=dict)
    """Bytes that the chunks of a salt may take here, at most; 0 keeps the tenant out."""
    promote: bool = True
    """Whether a hit here is copied into the first tier."""
    faults: FaultConfig = FaultConfig()
    """Deadlines, retries and the breaker."""

    @classmethod
    def read(cls, tier: "str | dict[str, Any] | TierConfig", **settings: Any) -> "TierConfig":
        """From a name or URL, or from one flat dict {"tier": ..., settings and the tier's own options}."""
        if isinstance(tier, TierConfig):
            return tier
        flat: Any = {"tier": tier, **settings} if isinstance(tier, str) else tier
        if not isinstance(flat, dict) or not all(isinstance(k, str) for k in flat):
            raise ConfigError(f"a tier is a name, a URL or a mapping of settings, not {reprlib.repr(tier)}")
        flat = {**flat, **settings}
        if not isinstance(flat.get("options", {}), dict):
            raise ConfigError(f"options = {reprlib.repr(flat['options'])}: they are a mapping")
        own = {k: v for k, v in flat.items() if k in cls.model_fields and k != "options"}
        options = {**flat.get("options", {}), **{k: v for k, v in flat.items() if k not in cls.model_fields}}
        if "tier" not in own:
            raise ConfigError(
                f'tier settings {reprlib.repr(flat)} have no "tier", e.g. {{"tier": "cpu", "capacity_bytes": 1}}'
            )
        return cls(**own, options=options)

    @classmethod
    def read_all(cls, tiers: Any) -> "tuple[TierConfig, ...]":
        """`read` of each of a list. Raises ConfigError."""
        if not isinstance(tiers, list | tuple):
            raise ConfigError(f"tiers = {reprlib.repr(tiers)}: give a list")
        return tuple(cls.read(tier) for tier in tiers)

    @pydantic.field_validator("eviction")
    @classmethod
    def _known(cls, name: str) -> str:
        try:
            policies.get(name)
        except UnknownNameError as error:
            raise ValueError(str(error)) from None
        return name

    @property
    def label(self) -> str:
        return self.name or self.tier.partition("://")[0].rpartition(":")[2].rpartition(".")[2]


class EngineConfig(Config):
    """An engine: its tiers from the nearest to the farthest.

    >>> EngineConfig(tiers=("cpu", {"tier": "disk", "path": "/kv"})).tiers[1].tier
    'disk'
    """

    tiers: tuple[TierConfig, ...] = (TierConfig(tier="cpu", options={"capacity_bytes": 1 << 30}),)
    """Nearest first: cpu, disk, remote."""
    max_pending_bytes: int = pydantic.Field(default=1 << 30, ge=0)
    """Chunks that wait to be written, at most; what comes on top is dropped from the write, and counted."""
    threads: int = pydantic.Field(default=2, ge=1)
    """That load and decode in the background."""
    high_water: float = pydantic.Field(default=0.9, gt=0, le=1)
    """Share of the first tier above which chunks not yet written below are written in the background."""

    @pydantic.field_validator("tiers", mode="before")
    @classmethod
    def _flat(cls, tiers: Any) -> Any:
        return TierConfig.read_all(tiers)

    @pydantic.field_validator("tiers")
    @classmethod
    def _distinct(cls, tiers: tuple[TierConfig, ...]) -> tuple[TierConfig, ...]:
        labels = [t.label for t in tiers]
        if not labels or len(set(labels)) < len(labels):
            raise ValueError(f"tiers are named {labels}: give at least one, and each a name of its own")
        return tiers
