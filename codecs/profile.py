"""Profiles: what a codec was fitted to a model with. A safetensors file, never code."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lmcache_blend.codecs.container import Shape
from lmcache_blend.errors import ConfigError

FORMAT = "lmcache-blend profile 1"


@dataclass(frozen=True)
class Profile:
    """Tensors fitted to one model. codec: id of the codec that reads them. model: its name, for people.

    fingerprint: of the model's weights and configuration. shapes: per layer (H, Dk, H', Dv). settings: options of the
    fit, and what it measured. texts: digests of the documents it read, so that a benchmark can keep away from them.
    """

    codec: str
    model: str
    fingerprint: str
    shapes: tuple[Shape, ...]
    tensors: Mapping[str, np.ndarray]
    settings: dict[str, Any] = field(default_factory=dict)
    texts: frozenset[str] = frozenset()

    @cached_property
    def digest(self) -> str:
        """SHA-256 over everything that decoding depends on."""
        digest = hashlib.sha256(json.dumps([self.codec, self.fingerprint, self.shapes], sort_keys=True).encode())
        for name in sorted(self.tensors):
            x = self.tensors[name]
            digest.update(f"{name} {x.dtype.str} {x.shape}".encode() + np.ascontiguousarray(x).tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Write it, whole or not at all."""
        path = Path(path)
        meta = {
            "format": FORMAT,
            "codec": self.codec,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "shapes": json.dumps(self.shapes),
            "settings": json.dumps(self.settings),
            "texts": json.dumps(sorted(self.texts)),
            "digest": self.digest,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        save_file({name: np.ascontiguousarray(x) for name, x in self.tensors.items()}, part, meta)
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "Profile":
        """Read and check a profile. Raises ConfigError with the remedy."""
        path = Path(path)
        if not path.is_file():
            raise ConfigError(f"profile {str(path)!r} does not exist; make one with `lmcache-blend codec fit`")
        stat = path.stat()
        return _load(path, stat.st_mtime_ns, stat.st_size)

    def check_model(self, fingerprint: str, name: str) -> None:
        """Raises ConfigError where the profile was fitted to another model."""
        if fingerprint != self.fingerprint:
            raise ConfigError(
                f"the profile was fitted to {self.model} ({self.fingerprint[:12]}), not to {name} "
                f"({fingerprint[:12]}); fit one with `lmcache-blend codec fit --model {name}`"
            )

    def check_shapes(self, shapes: tuple[Shape, ...]) -> None:
        """Raises ConfigError where a chunk has other layers than the model of the profile."""
        if shapes != self.shapes:
            raise ConfigError(
                f"the profile was fitted to {len(self.shapes)} layers of {self.shapes[:1]}, "
                f"the chunk has {len(shapes)} of {shapes[:1]}; fit one for this model"
            )


@lru_cache(maxsize=8)
def _load(path: Path, modified: int, size: int) -> Profile:
    try:
        with safe_open(path, "np") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if meta.get("format") != FORMAT:
            raise ConfigError(f"{str(path)!r} is no profile of this version ({meta.get('format')!r})")
        profile = Profile(
            meta["codec"],
            meta["model"],
            meta["fingerprint"],
            tuple(tuple(s) for s in json.loads(meta["shapes"])),
            tensors,
            json.loads(meta["settings"]),
            frozenset(json.loads(meta["texts"])),
        )
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError, OSError) as error:
        raise ConfigError(f"{str(path)!r} is no readable profile: {error}") from None
    if profile.digest != meta.get("digest"):
        raise ConfigError(f"profile {str(path)!r} does not match its digest: it is damaged; fit it again")
    return profile
