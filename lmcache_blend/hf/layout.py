"""What KV a model keeps per layer, read from its config.json alone: no weights, no GPU.

Shapes: per attention layer (H, Dk, H', Dv), as in a container's header; for MLA (1, kv_lora_rank, 1, rope dims), since
the latent is what is kept (DeepSeek-V2, arXiv 2405.04434, section 2.1). transformers' config classes fill in what
a config.json leaves to defaults; a model type that they do not know is read by the usual names.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lmcache_blend.config import MOST_SHOWN
from lmcache_blend.errors import ConfigError, LMCacheBlendError, ModelNotFoundError, UnsupportedModelError
from lmcache_blend.hf.resolve import resolve_model

FULL = {"full_attention", "indexed_attention", "hybrid"}
WINDOWED = {"sliding_attention", "chunked_attention", "hybrid_sliding"}
WITH_STATE = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}
WITHOUT_KV = {"mlp", "moe"}
UNREADABLE = re.compile(r"mamba|ssm|hybrid|block_config|layers_block|linear_att|compress_ra|recurrent")
"""Settings that say of an unknown model type that its layers are not all alike."""


@dataclass(frozen=True)
class LayerKV:
    """One layer. kind: its name in the config's layer_types, "mla" where the latent is kept. attention: mha, gqa, mqa,
    mla, or none. window: tokens that a sliding or chunked layer keeps. state: elements of a state whose size does not
    depend on the context, None where this release cannot tell. indexer: elements per token for sparse attention."""

    kind: str
    attention: str
    shape: tuple[int, int, int, int] = (0, 0, 0, 0)
    window: int | None = None
    state: int | None = 0
    indexer: int = 0

    @property
    def elements_per_token(self) -> int:
        heads, dim, heads_v, dim_v = self.shape
        return heads * dim + heads_v * dim_v + self.indexer

    def kept_tokens(self, tokens: int) -> int:
        """Of a context of so many tokens, how many the layer's KV covers."""
        return tokens if self.window is None else min(tokens, self.window)


@dataclass(frozen=True)
class ModelKV:
    """The layers of a model and the float type that its config names. config: the text model's, of transformers or a
    plain namespace. known: whether transformers has the model type."""

    model_type: str
    dtype: str
    layers: tuple[LayerKV, ...]
    query_heads: int
    config: Any
    known: bool


LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
MOST_LAYERS = 10_000


def read_config(name: str) -> dict[str, Any]:
    """config.json of a folder, a file, a hub id in the local cache, or else on the hub. Raises ModelNotFoundError or
    ConfigError."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        try:
            cached = try_to_load_from_cache(name, "config.json")
        except HFValidationError:
            cached = None
        if isinstance(cached, str):
            path = Path(cached)
        else:
            found = resolve_model(name)
            path = Path(found, "config.json") if Path(found).is_dir() else Path(hf_hub_download(found, "config.json"))
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelNotFoundError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds no JSON object; give a model's config.json")
    return config


def read_layout(raw: dict[str, Any]) -> ModelKV:
    """The layers that a config.json describes. Raises UnsupportedModelError, with the field that is missing or unknown,
    rather than guess."""
    for part in (raw, *(value for value in raw.values() if isinstance(value, dict))):
        for name in LAYERS:
            if isinstance(part.get(name), int) and part[name] > MOST_LAYERS:
                raise ConfigError(f"{name} = {part[name]:.3g} in the config; calc reads up to {MOST_LAYERS:,} layers")
    try:
        layout = _read(raw)
        if not all(type(n) is int and n >= 0 for layer in layout.layers for n in layer.shape):
            raise ConfigError("the config is malformed: heads and their sizes are not all numbers")
        return layout
    except LMCacheBlendError:
        raise
    except Exception as error:  # of whatever config class and whatever values
        raise ConfigError(f"the config is malformed: {type(error).__name__}: {str(error)[:MOST_SHOWN]}") from None


def _read(raw: dict[str, Any]) -> ModelKV:
    config, known = _config(raw)
    model_type = str(raw.get("model_type", "unknown"))[:MOST_SHOWN]
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{model_type} is an encoder-decoder model; calc reads decoder-only models")
    kinds = _kinds(config, model_type)
    heads = _number(config, model_type, "num_attention_heads", "n_head", "n_heads", "num_heads")
    # Newer transformers keep what differs between layers (Gemma 4's head dims) in a config per layer.
    each = getattr(config, "per_layer_config", [config] * len(kinds))
    layers = [_layer(each[i], kind, i, heads, model_type) for i, kind in enumerate(kinds)]
    # The last layers of such a model read the KV of earlier ones.
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    for i in range(len(layers) - shared, len(layers)):
        layers[i] = LayerKV("shared_kv", "none")
    dtype = next(
        (str(d) for c in (config, SimpleNamespace(**raw)) for d in _values(c, "dtype", "torch_dtype")), "bfloat16"
    )
    return ModelKV(model_type, dtype.removeprefix("torch."), tuple(layers), heads, config, known)


def prefill_flops(model: ModelKV, tokens: int) -> float | None:
    """Multiply-adds, counted twice, of prefilling a context: linear layers by the parameters that a token meets, and
    attention's two products over the pairs that the mask lets through.

    None where transformers cannot build the model, and for sparse attention by an indexer.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if not model.known or any(layer.indexer for layer in model.layers):
        return None
    try:
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(model.config)
    except Exception:
        # Whatever a model's own constructor raises, the meaning is the same: no count.
        return None
    experts = next(_values(model.config, "num_experts", "num_local_experts", "n_routed_experts"), 1)
    used = next(_values(model.config, "num_experts_per_tok", "top_k_experts", "moe_topk"), 1)
    head = network.get_output_embeddings()
    outside = {id(p) for m in (network.get_input_embeddings(), head) if m is not None for p in m.parameters()}
    parameters = 0.0
    for name, parameter in network.named_parameters():
        if id(parameter) not in outside and parameter.dim() > 1:
            share = used / experts if re.search(r"(^|\.)experts\.", name) else 1
            parameters += parameter.numel() * share
    pairs = 0
    for layer in model.layers:
        width = layer.kept_tokens(tokens)
        seen = width * (width + 1) // 2 + (tokens - width) * width
        pairs += seen * _score_dims(model.config, layer)
    return 2.0 * parameters * tokens + 2.0 * model.query_heads * pairs


def _score_dims(config: Any, layer: LayerKV) -> int:
    """Key plus value dims of one query head."""
    if layer.attention == "mla":
        return config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    return layer.shape[1] + layer.shape[3]


def _config(raw: dict[str, Any]) -> tuple[Any, bool]:
    from transformers import CONFIG_MAPPING
    from transformers.utils import logging

    if raw.get("model_type") in CONFIG_MAPPING:
        logging.set_verbosity_error()
        try:
            config = CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw))
            return config.get_text_config(decoder=True), True
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            raise ConfigError(f"transformers refuses this {raw['model_type']} config: {text}") from None
    text = next((raw[k] for k in ("text_config", "llm_config", "language_config") if isinstance(raw.get(k), dict)), raw)
    odd = [key for key in text if UNREADABLE.search(key)]
    if odd:
        raise UnsupportedModelError(
            f"model type {raw.get('model_type')!r} is unknown to this transformers and has {odd[0]!r}: its layers "
            "differ in a way that calc cannot read; install a transformers that knows it"
        )
    return SimpleNamespace(**text), False


def _kinds(config: Any, model_type: str) -> Sequence[str]:
    layers = _number(config, model_type, *LAYERS)
    kinds = next(_values(config, "layer_types", "layers_block_type"), None)
    if kinds is None:
        sliding = next(_values(config, "sliding_window"), None) and getattr(config, "use_sliding_window", True)
        kind = "sliding_attention" if sliding else "full_attention"
        kinds = ["chunked_attention" if next(_values(config, "attention_chunk_size"), None) else kind] * layers
    unknown = set(kinds) - FULL - WINDOWED - WITH_STATE - WITHOUT_KV
    if unknown:
        raise UnsupportedModelError(f"layers of kind {sorted(unknown)[0]!r} ({model_type}) are unknown to calc")
    return kinds


def _layer(config: Any, kind: str, index: int, heads: int, model_type: str) -> LayerKV:
    state = _state(config, index) if kind in WITH_STATE else 0
    if kind not in FULL | WINDOWED:
        return LayerKV(kind, "none", state=state)
    names = ("attention_chunk_size",) if kind == "chunked_attention" else ("sliding_window", "attention_window_size")
    window = _number(config, model_type, *names) if kind in WINDOWED else None
    if next(_values(config, "kv_lora_rank"), None):
        shape = (1, config.kv_lora_rank, 1, config.qk_rope_head_dim)
        indexer = _number(config, model_type, "index_head_dim") if kind == "indexed_attention" else 0
        return LayerKV("mla" if kind in FULL else kind, "mla", shape, window, state, indexer)
    if kind == "indexed_attention":
        raise UnsupportedModelError(f"{kind} without a latent ({model_type}) is unknown to calc")
    kv_heads, dim, dim_v = _heads(config, kind, index, heads, model_type)
    attention = "mqa" if kv_heads == 1 else "mha" if kv_heads == heads else "gqa"
    return LayerKV(kind, attention, (kv_heads, dim, kv_heads, dim_v), window, state)


def _heads(config: Any, kind: str, index: int, heads: int, model_type: str) -> tuple[int, int, int]:
    """KV heads and the dims of their keys and values."""
    prefixed = ("swa_",) if kind in WINDOWED else ()
    nested = [c for c in (getattr(config, "attn_config", None),) if c is not None]
    nested = [SimpleNamespace(**c) if isinstance(c, dict) else c for c in nested]
    found = next((v for c in nested for v in _values(c, "kv_n_heads")), None)
    if (
        found is None
        and getattr(config, "multi_query", False)
        and not getattr(config, "new_decoder_architecture", False)
    ):
        found = 1  # Falcon-7B and GPTBigCode, whatever their num_kv_heads says
    if found is None and kind not in WINDOWED:
        found = next(_values(config, "num_global_key_value_heads"), None)
    names = [f"{p}num_key_value_heads" for p in prefixed]
    names += ["num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num"]
    if found is None:
        found = next(_values(config, *names), heads)
    kv_heads = found[index] if isinstance(found, list | tuple) else found
    dim = next(_values(config, "global_head_dim"), None) if kind not in WINDOWED else None
    names = [f"{p}head_dim" for p in prefixed] + ["head_dim", "attention_head_dim", "kv_channels"]
    if dim is None:
        dim = next(_values(config, *names), None)
    if dim is None:
        dim = _number(config, model_type, "hidden_size", "n_embd", "d_model") // heads
    dim_v = next(_values(config, *(f"{p}v_head_dim" for p in prefixed), "v_head_dim"), dim)
    return kv_heads, dim, dim_v


def _state(config: Any, index: int) -> int | None:
    """Elements of a recurrent layer's state: what the convolution still needs, and the recurrence."""

    def get(*names: str) -> Any:
        return next(_values(config, *names), None)

    if heads := get("linear_num_value_heads"):  # gated delta net (Qwen3-Next)
        keys = config.linear_num_key_heads * config.linear_key_head_dim
        values = heads * config.linear_value_head_dim
        return (config.linear_conv_kernel_dim - 1) * (2 * keys + values) + values * config.linear_key_head_dim
    if heads := get("mamba_n_heads", "mamba_num_heads"):  # Mamba-2 (arXiv 2405.21060)
        dim, size = get("mamba_d_head", "mamba_head_dim"), get("mamba_d_state", "ssm_state_size")
        kernel, groups = get("mamba_d_conv", "conv_kernel"), get("mamba_n_groups", "n_groups")
        if None not in (dim, size, kernel, groups):
            return (kernel - 1) * (heads * dim + 2 * groups * size) + heads * dim * size
    elif (size := get("mamba_d_state")) and (kernel := get("mamba_d_conv")):  # Mamba (arXiv 2312.00752)
        inner = int(config.mamba_expand * config.hidden_size)
        return inner * (kernel - 1 + size)
    return None


def _values(config: Any, *names: str) -> Any:
    """The fields of these names that are set, in turn."""
    for name in names:
        value = getattr(config, name, None)
        if value is not None:
            yield value


def _number(config: Any, model_type: str, *names: str) -> int:
    value = next(_values(config, *names), None)
    if type(value) is not int or value < 1:
        raise UnsupportedModelError(
            f"the config of {model_type!r} has no usable {names[0]} ({str(value)[:MOST_SHOWN]}); calc needs it"
        )
    return value
