"""Settings: frozen pydantic models that refuse a key they do not know and suggest the nearest one."""

import os
import reprlib
from pathlib import Path
from typing import Any, Literal, Self

import platformdirs
import pydantic

from lmcache_blend.errors import ConfigError, nearest

ENV_PREFIX = "LMCACHE_BLEND_"
MOST_SHOWN = 100
"""Characters of a wrong value in an error message."""
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = _SHOWN.maxlong = MOST_SHOWN


def cache_dir() -> Path:
    """Folder for converted models and gate results: LMCACHE_BLEND_CACHE, else the user's cache folder."""
    return Path(os.environ.get(ENV_PREFIX + "CACHE") or platformdirs.user_cache_dir("lmcache_blend"))


class Config(pydantic.BaseModel):
    """Base of every settings model. `Config(**data)` raises ConfigError in one line, never pydantic's report."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    def __init__(self, /, **data: Any) -> None:
        unknown = [key for key in data if key not in type(self).model_fields]
        if unknown:
            raise ConfigError(f"unknown setting {unknown[0]!r}: {nearest(unknown[0], type(self).model_fields)}")
        try:
            super().__init__(**data)
        except RecursionError:
            raise ConfigError(f"settings of {type(self).__name__} are nested too deeply") from None
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            if isinstance(own := first.get("ctx", {}).get("error"), ConfigError):
                raise own from None  # from a check of ours, which says it all
            where = ".".join(str(part) for part in first["loc"])
            raise ConfigError(f"{where} = {_SHOWN.repr(first['input'])}: {first['msg']}") from None

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, validated anew."""
        return type(self)(**{**self.model_dump(), **changes})

    @classmethod
    def from_env(cls, **overrides: Any) -> Self:
        """Settings from LMCACHE_BLEND_<FIELD> variables; keyword arguments win over the environment."""
        found = {
            f: os.environ[ENV_PREFIX + f.upper()] for f in cls.model_fields if ENV_PREFIX + f.upper() in os.environ
        }
        return cls(**{**found, **overrides})


class BlendConfig(Config):
    """How the Blender reuses and recomputes.

    Example:
        >>> BlendConfig(policy="epic", recompute_ratio=0.15).encode
        'alone'
    """

    policy: str = "attention_value_norm"
    """Name of a registered policy (`lmcache-blend ls methods`)."""
    recompute_ratio: float = pydantic.Field(default=0.15, ge=0.0, le=1.0)
    """Fraction of the reused tokens whose KV is computed anew, 0 to 1."""
    options: dict[str, Any] = {}
    """Fields of the policy, e.g. {"signal": "k"} for cacheblend."""
    encode: Literal["alone", "bos", "prefix"] = "alone"
    """What stands before a chunk while its KV is computed for the store: nothing, the BOS token, or the prompt's own
    shared instruction prefix (its first span)."""
    separator: str = " # # "
    """Text that ends a passage: put behind each of a list of passages, looked for in a prompt that is one string."""
    store_misses: bool = True
    """Whether the KV of passages met for the first time is stored after the first token."""
    salt: str = ""
    """Tenant: chunks stored under another salt are never hit."""
