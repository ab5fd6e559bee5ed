"""Hugging Face models as ModelRunners: the only part that imports transformers' model code."""

from typing import Any

from lmcache_blend.hf.resolve import resolve_model
from lmcache_blend.hf.runner import HFRunner


def load_runner(name: str, dtype: str = "auto", device: str = "cpu", **options: Any) -> HFRunner:
    """A model by hub id, local folder or alias (`smollm2-135m`), with its tokenizer, behind the three gates.

    dtype: "float32", "bfloat16", "float16" or "auto" (the checkpoint's own). options go to from_pretrained.
    Raises ModelNotFoundError, UnsupportedModelError, ConfigError.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lmcache_blend.errors import ConfigError, ModelNotFoundError

    kinds = ("auto", "float32", "bfloat16", "float16")
    if dtype not in kinds:
        raise ConfigError(f"dtype = {dtype!r}: choose one of {', '.join(kinds)}")
    path = resolve_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        wanted = dtype if dtype == "auto" else getattr(torch, dtype)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=wanted, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelNotFoundError(f"model {name!r} cannot be loaded: {reason}") from error
    return HFRunner.checked(model.to(device), tokenizer, name)


__all__ = ["HFRunner", "load_runner", "resolve_model"]
