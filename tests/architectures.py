"""Tiny random models of every supported architecture, each with the rope types that it can carry."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AttentionMaskInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lmcache_blend import BlendConfig, Blender, Prompt
from lmcache_blend.hf import HFRunner, gates, intercept
from lmcache_blend.hf.learn import relative_error

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

# model type -> (settings, share of the head's dims that turn)
KINDS: dict[str, tuple[dict, float]] = {
    "llama": ({}, 1.0),
    "mistral": ({"sliding_window": 24}, 1.0),
    "mixtral": ({"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}, 1.0),
    "qwen2": ({}, 1.0),
    "qwen3": ({"head_dim": 16}, 1.0),
    "qwen3_moe": ({"head_dim": 16, **MOE}, 1.0),
    "gemma": ({"head_dim": 16}, 1.0),
    "gemma2": ({"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16}, 1.0),
    "phi": ({}, 0.5),
    "gpt_neox": ({"hidden_act": "gelu"}, 0.25),
    "stablelm": ({}, 0.25),
    "glm4": ({"head_dim": 16}, 0.5),
    "cohere": ({}, 1.0),
    "granite": ({"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}, 1.0),
    "olmo2": ({}, 1.0),
    "smollm3": ({"no_rope_layer_interval": 2}, 1.0),
    "gpt_oss": ({"head_dim": 16, "sliding_window": 24, "num_local_experts": 4, "num_experts_per_tok": 2}, 1.0),
    "deepseek_v2": ({"topk_method": "greedy", **MLA}, 0.5),
    "deepseek_v3": ({"rope_interleave": True, **MLA}, 0.5),
}


def of_kind(kind: str, rope_type: str) -> tuple[str, dict]:
    settings, share = KINDS[kind]
    partial = {} if share == 1.0 or settings.get("qk_rope_head_dim") else {"partial_rotary_factor": share}
    return kind, {**settings, **partial, **rope(rope_type, half=int(8 * share), **partial)}


# name -> (model type, settings): every kind with every rope type that its configuration takes
ARCHITECTURES: dict[str, tuple[str, dict]] = {
    **{f"{kind}-{rope_type}": of_kind(kind, rope_type) for kind in KINDS for rope_type in ROPE_TYPES},
    "qwen2-sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}),
    "phi3-default": ("phi3", rope("default")),
    "phi3-longrope": ("phi3", rope("longrope")),
    "gemma3-two-thetas": ("gemma3_text", {"head_dim": 16, "sliding_window": 24, "query_pre_attn_scalar": 16,
        "layer_types": SLIDING, "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0}}}),
    "deepseek_v3-yarn-mscale": ("deepseek_v3", {"rope_interleave": True, **MLA,
        **rope("yarn", mscale=1.0, mscale_all_dim=0.8)}),
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


def tokens(n: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(seed))


def measure(name: str) -> dict[str, float]:
    """What must be exact for an architecture in float32, as largest |logit difference| to the model's own forward.

    full, partial, dropped: the gates. ratio_one: three chunks encoded alone, moved and all recomputed. reuse: the
    same, none recomputed (far from 0, or the check would see nothing). layer_0: relative error of the moved keys and
    values of layer 0. wrong_mask, wrong_positions: the partial gate with a bottom-right mask, and with rows one
    position off.
    """
    model = build(name)
    runner = HFRunner.checked(model)
    found = {"rotation": runner.gates["rotation_error"], **{g: runner.gates[g]["largest"] for g in gates.GATES}}
    ids, every = tokens(96), torch.arange(96)
    prompt = Prompt(ids, ((0, 30), (30, 60), (60, 90)))
    blender = Blender(runner, BlendConfig(policy="epic", recompute_ratio=1.0))
    blender.store(prompt)
    with torch.inference_mode():
        reference = model(input_ids=ids[None]).logits[0, -1]
    exact, reused = blender.prefill(prompt, policy="full_recompute"), blender.prefill(prompt, policy="full_reuse")
    found["ratio_one"] = float((blender.prefill(prompt).logits - reference).abs().max())
    found["reuse"] = float((reused.logits - reference).abs().max())
    moved_and_true = zip(reused.kv.read(0, every), exact.kv.read(0, every), strict=True)
    found["layer_0"] = max(relative_error(moved, true) for moved, true in moved_and_true)
    with wrong_mask():
        found["wrong_mask"] = gates.measure(runner)["partial"]["largest"]
    with wrong_positions(runner):
        found["wrong_positions"] = gates.measure(runner)["partial"]["largest"]
    return found


@contextmanager
def wrong_mask() -> Iterator[None]:
    """The mask of other implementations: the gathered rows taken for the last ones of the prompt."""

    def bottom_right(batch_size, q_length, kv_length, mask_function, dtype=torch.float32, **kwargs):
        rows = torch.arange(kv_length - q_length, kv_length)[None]
        return intercept.CURRENT.get().mask(rows, mask_function, dtype)

    AttentionMaskInterface.register(intercept.NAME, bottom_right)
    try:
        yield
    finally:
        AttentionMaskInterface.register(intercept.NAME, intercept.row_mask)


@contextmanager
def wrong_positions(runner: HFRunner) -> Iterator[None]:
    """Chosen rows one position off, as in a blend that forgets its offset; a shift of all rows would change nothing."""
    run = runner.run_rows
    runner.run_rows = lambda f, ids, at, n: run(f, ids, at if at.shape[1] == f.length else at + 1, n)
    try:
        yield
    finally:
        del runner.run_rows


def main() -> None:
    """Print what must be exact, and what must not be, for every architecture: `make gates`."""
    print("rotation, layer 0: relative error; the rest: largest |logit difference| to the model's own, float32")
    print(
        f"{'model and rope':20s} {'rotation':>9s} {'layer 0':>9s} {'full':>9s} {'partial':>9s} {'dropped':>9s} ", end=""
    )
    print(f"{'ratio 1.0':>9s} | must fail: {'mask':>9s} {'position':>9s}")
    for name in ARCHITECTURES:
        found = measure(name)
        exact = [found[k] for k in ("rotation", "layer_0", "full", "partial", "dropped", "ratio_one")]
        wrong = [found[k] for k in ("wrong_mask", "wrong_positions")]
        numbers = [" ".join(f"{x:9.1e}" for x in xs) for xs in (exact, wrong)]
        print(f"{name:20s} {numbers[0]} |           {numbers[1]}", flush=True)


if __name__ == "__main__":
    main()
