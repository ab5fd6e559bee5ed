"""What a codec is, and the registry that finds one by its id or its JSON config."""

import json
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from lmcache_blend.errors import ConfigError
from lmcache_blend.registry import Registry
from lmcache_blend.types import KVChunk


@runtime_checkable
class Codec(Protocol):
    """Turns a KV chunk into bytes and back; stateless, so that one object serves every thread.

    The parameters of a codec are its attributes, and `get_codec(codec.get_config())` builds it again.
    """

    def encode(self, chunk: KVChunk) -> bytes:
        """The chunk as one self-describing byte string."""
        ...

    def decode(self, data: bytes) -> KVChunk:
        """The chunk, on the CPU; raises CorruptChunkError, and nothing else, on bytes that are no chunk."""
        ...

    def get_config(self) -> dict[str, Any]:
        """JSON-able parameters; "id" is the name in the registry."""
        ...


codecs: Registry[type[Codec]] = Registry("codec", "lmcache_blend.codecs")
register_codec = codecs.register


def get_codec(spec: str | dict[str, Any]) -> Codec:
    """The codec of an id or of a JSON config, as text or as a dict.

    Raises UnknownNameError for an id that is not registered, ConfigError for a config that the codec refuses.

    >>> get_codec("raw").get_config()
    {'id': 'raw', 'dtype': None}
    >>> get_codec('{"id": "raw", "dtype": "bfloat16"}').get_config()
    {'id': 'raw', 'dtype': 'bfloat16'}
    """
    config = _parse(spec) if isinstance(spec, str) else dict(spec)
    if not isinstance(config.get("id"), str):
        raise ConfigError(f'codec config {spec!r} has no "id"; known ids: {", ".join(codecs)}')
    name = config.pop("id")
    factory = codecs.get(name)
    try:
        return factory(**config)
    except TypeError as error:
        raise ConfigError(f"codec {name!r} refuses {config}: {error}") from None


def short_name(config: dict[str, Any]) -> str:
    """Id and the settings that differ from the codec's defaults, for tables and plots.

    >>> short_name({"id": "cachegen", "mode": "lmcache", "level": 3, "sinks": 0})
    'cachegen level=3'
    """
    fields = getattr(codecs.get(config["id"]), "model_fields", {})
    own = {k: v for k, v in config.items() if k in fields and v != fields[k].default}
    return " ".join([config["id"], *(f"{k}={Path(v).name if k == 'profile' else v}" for k, v in own.items())])


def _parse(spec: str) -> dict[str, Any]:
    if not spec.lstrip().startswith(("{", "[", '"')):
        return {"id": spec}
    try:
        config = json.loads(spec)
    except json.JSONDecodeError as error:
        raise ConfigError(f"codec config {spec!r} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f'codec config {spec!r} is not a JSON object such as {{"id": "raw"}}')
    return config
