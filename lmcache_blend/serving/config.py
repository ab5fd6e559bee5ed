"""Settings of the connector: kv_connector_extra_config, or one YAML file (LMCache's key names where they fit)."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import pydantic
import yaml

from lmcache_blend.codecs import Lossless, Raw, Zstd, get_codec
from lmcache_blend.config import Config
from lmcache_blend.engine import EngineConfig, TierConfig
from lmcache_blend.errors import ConfigError, nearest

FILE_VARIABLES = ("LMCACHE_BLEND_CONFIG_FILE", "LMCACHE_CONFIG_FILE")
GIB = 1 << 30


class BlendSettings(Config):
    """Blend mode. A request may change policy, recompute_ratio, options and enabled in kv_transfer_params["blend"].

    >>> BlendSettings(policy="epic").match
    'separator'
    """

    enabled: bool = True
    """Whether requests that say nothing are blended."""
    policy: str = "attention_value_norm"
    """Name of a registered policy (`lmcache-blend ls methods`)."""
    recompute_ratio: float = pydantic.Field(default=0.15, ge=0.0, le=1.0)
    """Fraction of the reused tokens whose KV is computed anew."""
    options: dict[str, Any] = pydantic.Field(default_factory=dict)
    """Fields of the policy."""
    match: Literal["spans", "separator", "content"] = "separator"
    """Where segments come from when a request names no spans: nowhere, the separator, or the text itself."""
    separator: str | tuple[int, ...] = " # # "
    """Text (or token ids) that ends a segment."""
    min_tokens: int = pydantic.Field(default=32, ge=1)
    """Shorter segments are neither stored nor looked up."""
    store_misses: bool = True
    """Whether segments met for the first time are stored."""
    index: str = ""
    """File that remembers segments for match = "content"; by default in the cache folder, one per model."""


class ServingConfig(Config):
    """All settings of the connector.

    >>> ServingConfig.read({"chunk_size": 512, "max_local_cpu_size": 2}).chunk_tokens
    512
    """

    tiers: tuple[TierConfig, ...] = (TierConfig(tier="cpu", options={"capacity_bytes": 4 * GIB}),)
    """Nearest first: cpu, disk, remote."""
    codec: str | dict[str, Any] | None = None
    """How chunks are coded in every tier but cpu that names no codec of its own; null keeps them bit for bit."""
    chunk_tokens: int = pydantic.Field(default=256, ge=1)
    """Tokens of a prefix chunk."""
    offload: bool = True
    """Whether prefixes are stored and loaded."""
    partial_chunks: bool = True
    """Whether the rest of a prompt behind its last whole chunk is stored too."""
    save_decode_cache: bool = False
    """Whether whole chunks that fill up while decoding are stored."""
    skip_last_n_tokens: int = pydantic.Field(default=0, ge=0)
    """Tokens at a prompt's end that are not stored."""
    async_load: bool = False
    """Whether prefixes are loaded beside the running batch instead of before the forward. Blending always waits."""
    layerwise: bool | None = None
    """Bring KV in and out layer by layer while the forward computes. None: unless it computes on the CPU, whose cores
    the copies would take from it."""
    salt: str = ""
    """Tenant of all requests of this server; a request's cache_salt and tenant come on top."""
    max_pending_bytes: int = pydantic.Field(default=GIB, ge=0)
    """Of chunks that wait to be written; what comes on top is not stored."""
    threads: int = pydantic.Field(default=2, ge=1)
    """That read and decode in the background."""
    blend: BlendSettings | None = None
    """Blend mode; null serves prefixes only."""

    @pydantic.field_validator("tiers", mode="before")
    @classmethod
    def _flat(cls, tiers: Any) -> Any:
        return TierConfig.read_all(tiers)

    @pydantic.field_validator("blend", mode="before")
    @classmethod
    def _switch(cls, blend: Any) -> Any:
        if isinstance(blend, bool):
            return BlendSettings() if blend else None
        return BlendSettings(**blend) if isinstance(blend, dict) else blend

    @classmethod
    def read(cls, extra: Mapping[str, Any] | None = None) -> Self:
        """From kv_connector_extra_config, over the YAML file that it ("config_file") or the environment names.

        Raises ConfigError for unknown keys, values out of range, and a file that cannot be read.
        """
        extra = dict(extra or {})
        path = extra.pop("config_file", None) or next(
            (os.environ[v] for v in FILE_VARIABLES if os.environ.get(v)), None
        )
        return cls(**_translated({**(_file(path) if path else {}), **extra}))

    def engine(self, without_memory: bool = False) -> EngineConfig:
        """Of the engine below. without_memory: for a process that cannot see this memory; raises ConfigError."""
        tiers = [t if t.codec or t.tier == "cpu" else t.replace(codec=self.codec) for t in self.tiers]
        if without_memory:
            tiers = [t for t in tiers if t.tier != "cpu"]
            if not tiers:
                raise ConfigError(
                    "the scheduler cannot see the cpu tier of other processes' workers: add a disk or remote tier or, "
                    "for one worker on a CPU, start with `lmcache-blend serve`"
                )
        return EngineConfig(tiers=tuple(tiers), max_pending_bytes=self.max_pending_bytes, threads=self.threads)

    @property
    def exact(self) -> bool:
        """Whether every tier gives back the bits that it got."""
        specs = [t.codec for t in self.engine().tiers if t.codec is not None]
        return all(_keeps_bits(get_codec(spec)) for spec in specs)


def _keeps_bits(codec: Any) -> bool:
    return isinstance(codec, (Lossless, Zstd)) or (isinstance(codec, Raw) and codec.get_config()["dtype"] is None)


def _file(path: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"config file {path}: {str(error).splitlines()[0]}") from None
    if data is not None and not (isinstance(data, dict) and all(isinstance(name, str) for name in data)):
        raise ConfigError(f"config file {path} is not a mapping of settings")
    return data or {}


def _same(name: str) -> Callable[[Any, dict[str, Any]], None]:
    def put(value: Any, out: dict[str, Any]) -> None:
        out.setdefault(name, value)

    return put


def _in_blend(name: str, first: bool = False) -> Callable[[Any, dict[str, Any]], None]:
    def put(value: Any, out: dict[str, Any]) -> None:
        blend = out.setdefault("blend", {})
        if isinstance(blend, dict):
            blend.setdefault(name, value[0] if first and isinstance(value, (list, tuple)) else value)

    return put


def _gib(name: str, value: Any) -> int:
    try:
        size = float(value)
    except (TypeError, ValueError):
        size = 0.0
    if not 0 < size < 1 << 30:
        raise ConfigError(f"{name} = {value!r:.100}: give GiB above 0")
    return int(size * GIB)


TIER_NAMES = ("local_cpu", "max_local_cpu_size", "local_disk", "max_local_disk_size", "remote_url")
RENAMED: dict[str, Callable[[Any, dict[str, Any]], None]] = {
    "chunk_size": _same("chunk_tokens"),
    "save_unfull_chunk": _same("partial_chunks"),
    "enable_async_loading": _same("async_load"),
    "blend_recompute_ratios": _in_blend("recompute_ratio", first=True),
    "blend_special_str": _in_blend("separator"),
    "blend_min_tokens": _in_blend("min_tokens"),
}
"""LMCache's names of settings that mean the same here."""


def _translated(raw: dict[str, Any]) -> dict[str, Any]:
    known = [*ServingConfig.model_fields, *TIER_NAMES, *RENAMED, "enable_blending", "config_file"]
    for key in raw:
        if key not in known:
            raise ConfigError(f"unknown setting {key!r} of the connector: {nearest(key, known)}")
    out = {k: v for k, v in raw.items() if k in ServingConfig.model_fields}
    if isinstance(out.get("blend"), dict):
        out["blend"] = dict(out["blend"])
    for key, put in RENAMED.items():
        if key in raw and (raw.get("enable_blending") or not key.startswith("blend_")):
            put(raw[key], out)
    if raw.get("enable_blending"):
        out.setdefault("blend", {})
    old = {k: raw[k] for k in TIER_NAMES if k in raw}
    if old and "tiers" in raw:
        raise ConfigError(f"{', '.join(old)} and tiers both say where chunks live: give one of them")
    if old:
        out["tiers"] = _tiers(**old)
    return out


def _tiers(
    local_cpu: bool = True,
    max_local_cpu_size: float = 5.0,
    local_disk: str | None = None,
    max_local_disk_size: float | None = None,
    remote_url: str | None = None,
) -> list[dict[str, Any]]:
    """Tiers of LMCache's settings; sizes are GiB."""
    out: list[dict[str, Any]] = []
    if local_cpu:
        out.append({"tier": "cpu", "capacity_bytes": _gib("max_local_cpu_size", max_local_cpu_size)})
    if local_disk:
        limit = {} if not max_local_disk_size else {"capacity_bytes": _gib("max_local_disk_size", max_local_disk_size)}
        out.append({"tier": "disk", "path": str(local_disk).removeprefix("file://"), **limit})
    if remote_url:
        out.append({"tier": remote_url})
    if not out:
        raise ConfigError("local_cpu is off and neither local_disk nor remote_url is given: nothing can be stored")
    return out
