"""Who a model is, told alike by the scheduler (which has no weights) and every worker, in every process."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

from lmcache_blend.errors import ConfigError

SAMPLES, SAMPLE_BYTES = 16, 4096
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")


def fingerprint(vllm_config: Any) -> str:
    """SHA-256 over the model's configuration, its KV type and a sample of its weight files.

    Where the files lie does not count: stored KV outlives a moved folder. A model with random weights (load format
    "dummy") is told by its seed. Raises ConfigError where no file can be found.
    """
    model = vllm_config.model_config
    digest = hashlib.sha256(b"vllm")
    config = {k: v for k, v in model.hf_config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    cache = vllm_config.cache_config.cache_dtype
    digest.update(
        f"{model.dtype} {cache} {model.quantization} {model.max_model_len if _scales(config) else ''}".encode()
    )
    load_format = str(vllm_config.load_config.load_format)
    if load_format == "dummy":
        digest.update(f"dummy {model.seed}".encode())
        return digest.hexdigest()
    files = _files(str(model.model), model.revision)
    if not files:
        raise ConfigError(
            f"model {model.model!r}: no weight files found, so its KV cannot be told from another model's"
        )
    for path in files:
        digest.update(path.name.encode() + _sample(path))
    return digest.hexdigest()


def _scales(config: dict[str, Any]) -> bool:
    """Whether rotary tables depend on the longest prompt that the server was started for."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return "dynamic" in json.dumps(rope, default=str) or "longrope" in json.dumps(rope, default=str)


def _files(model: str, revision: str | None) -> list[Path]:
    path = Path(model)
    if path.is_file():
        return [path]
    if not path.is_dir():
        from huggingface_hub import snapshot_download

        try:
            path = Path(snapshot_download(model, revision=revision, local_files_only=True))
        except Exception as error:  # every kind of "not there" that the hub's client has
            raise ConfigError(f"model {model!r} is neither a folder nor in the hub's cache: {error}") from None
    for pattern in WEIGHTS:
        found = sorted(path.glob(pattern))
        if found:
            return found
    return []


def _sample(path: Path) -> bytes:
    """Size and pieces of a weight file: from each tensor where the file says where they lie, else evenly spread.

    Training moves about every number of a tensor that it touches, so that a piece of it tells two versions apart.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for start in _tensors(file, size) or [
            max(0, (size - SAMPLE_BYTES) * i // (SAMPLES - 1)) for i in range(SAMPLES)
        ]:
            file.seek(start)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.digest()


def _tensors(file: BinaryIO, size: int) -> list[int]:
    """The middle of each tensor of a safetensors file; [] for other files."""
    try:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length)) if 8 + length <= size else {}
        spans = [entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"]
        return [8 + length + (start + max(start, end - SAMPLE_BYTES)) // 2 for start, end in sorted(spans)]
    except (ValueError, KeyError, TypeError, AttributeError, struct.error):
        return []
