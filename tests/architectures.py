"""Tiny random models of every supported architecture, each with the rope types that it can carry."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 200
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
MLA = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
SLIDING = ["sliding_attention", "full_attention"] * 2


def rope(kind: str, half: int = 8, **more) -> dict:
    """rope_parameters of each scaling variant; half: R/2, the number of distinct angles (longrope needs it)."""
    kinds = {
        "default": {},
        "linear": {"factor": 4.0},
        "dynamic": {"factor": 2.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
        "llama3": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "longrope": {
            "short_factor": [1.0 + 0.1 * i for i in range(half)],
            "long_factor": [2.0 + 0.3 * i for i in range(half)],
            "original_max_position_embeddings": 64,
            "factor": 4.0,
        },
    }
    settings = {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **kinds[kind], **more}}
    if kind == "dynamic":  # scaling sets in above the model's own positions
        settings["max_position_embeddings"] = 64
    if kind == "longrope":
        settings["original_max_position_embeddings"] = 64
    return settings


ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")

# name -> (model type, settings)
ARCHITECTURES: dict[str, tuple[str, dict]] = {
    **{f"llama-{kind}": ("llama", rope(kind)) for kind in ROPE_TYPES},
    **{f"mistral-{kind}": ("mistral", {"sliding_window": 24, **rope(kind)}) for kind in ("default", "yarn")},
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    **{f"qwen2-{kind}": ("qwen2", rope(kind)) for kind in ("default", "yarn", "dynamic")},
    "qwen2-sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}),
    **{f"qwen3-{kind}": ("qwen3", {"head_dim": 16, **rope(kind)}) for kind in ("default", "yarn", "linear")},
    **{f"qwen3_moe-{kind}": ("qwen3_moe", {"head_dim": 16, **MOE, **rope(kind)}) for kind in ("default", "yarn")},
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma2-softcap": ("gemma2", {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16}),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 16,
            "sliding_window": 24,
            "query_pre_attn_scalar": 16,
            "layer_types": SLIDING,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
            },
        },
    ),
    **{f"phi-{kind}": ("phi", {"partial_rotary_factor": 0.5, **rope(kind, partial_rotary_factor=0.5)})
       for kind in ("default", "linear", "dynamic")},
    **{f"phi3-{kind}": ("phi3", rope(kind)) for kind in ("default", "longrope")},
    **{f"gpt_neox-{kind}": ("gpt_neox", {"rotary_pct": 0.25, "hidden_act": "gelu",
       **rope(kind, partial_rotary_factor=0.25)}) for kind in ("default", "linear", "dynamic")},
    "stablelm": ("stablelm", {"partial_rotary_factor": 0.25}),
    "glm4": ("glm4", {"head_dim": 16, "partial_rotary_factor": 0.5}),
    **{f"cohere-{kind}": ("cohere", rope(kind)) for kind in ("default", "llama3")},
    **{f"granite-{kind}": ("granite", {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0,
       **rope(kind)}) for kind in ("default", "yarn")},
    **{f"olmo2-{kind}": ("olmo2", rope(kind)) for kind in ("default", "yarn")},
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "smollm3-yarn": ("smollm3", {"no_rope_layer_interval": 2, **rope("yarn")}),
    "gpt_oss-yarn": ("gpt_oss", {"head_dim": 16, "sliding_window": 24, "num_local_experts": 4,
        "num_experts_per_tok": 2}),
    "deepseek_v2": ("deepseek_v2", {"topk_method": "greedy", **MLA}),
    "deepseek_v3": ("deepseek_v3", {"rope_interleave": True, **MLA}),
    "deepseek_v3-yarn": (
        "deepseek_v3",
        {"rope_interleave": True, **MLA, **rope("yarn", mscale=1.0, mscale_all_dim=0.8)},
    ),
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model, with weights large enough that attention matters and errors show in the logits."""
    kind, settings = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**BASE, **settings}), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(10.0 if "embed" in parameter_name else 3.0)
            elif "sinks" in parameter_name:
                parameter.normal_()
    return model.to(dtype)


def main() -> None:
    """Print what the gates measure for every architecture: `make gates`."""
    from lmcache_blend.hf import HFRunner

    print("largest |logit difference| to the model's own forward, float32; rotation: relative error of the fit")
    print(f"{'model and rope':20s} {'rotation':>9s} {'full':>9s} {'partial':>9s} {'dropped':>9s}")
    for name in ARCHITECTURES:
        gates = HFRunner.checked(build(name)).gates
        errors = [gates["rotation_error"], *(gates[g]["largest"] for g in ("full", "partial", "dropped"))]
        print(f"{name:20s} " + " ".join(f"{e:9.1e}" for e in errors), flush=True)


if __name__ == "__main__":
    main()
