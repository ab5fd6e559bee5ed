"""Every supported architecture, with each rope type that it can carry, runs its own forward exactly on chosen rows."""

import pytest
import torch
from architectures import ARCHITECTURES, VOCAB, build, measure, tokens, wrong_mask
from transformers import AutoModelForCausalLM, GPT2Config

from lmcache_blend.blend import Blender, Plan
from lmcache_blend.config import BlendConfig
from lmcache_blend.errors import UnsupportedModelError
from lmcache_blend.hf import HFRunner, gates, intercept
from lmcache_blend.types import Prompt


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name):
    found = measure(name)
    for check in ("full", "partial", "dropped", "ratio_one"):
        assert found[check] <= 1e-4, check
    assert found["layer_0"] <= 1e-5
    for wrong in ("reuse", "wrong_mask", "wrong_positions"):
        assert found[wrong] > 1e-3, f"{wrong} must show, or the checks above see nothing"


@pytest.mark.parametrize(
    "name",
    [
        "llama-llama3",
        "mixtral-default",
        "qwen3_moe-default",
        "gemma3-two-thetas",
        "gpt_oss-yarn",
        "deepseek_v3-default",
    ],
)
def test_bfloat16(name):
    runner = HFRunner.checked(build(name, torch.bfloat16))
    assert all(runner.gates[gate]["relative"] <= 0.05 for gate in ("full", "partial", "dropped"))
    prompt = Prompt(tokens(70), ((0, 30), (30, 60)))
    blender = Blender(runner, BlendConfig(policy="cacheblend", recompute_ratio=0.3))
    blender.store(prompt)
    result = blender.prefill(prompt)
    assert result.logits.isfinite().all()
    assert len(result.generate(4, stop_ids=())) == 4


def test_a_failing_gate_refuses_the_model_with_the_reason(monkeypatch):
    monkeypatch.setattr(gates, "REVISION", -1)  # an outcome kept by another test does not count
    with wrong_mask(), pytest.raises(UnsupportedModelError, match="gate 'partial' failed"):
        HFRunner.checked(build("llama-default"))


def test_a_model_without_rotary_tables_is_refused():
    model = AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=256)
    )
    with pytest.raises(UnsupportedModelError, match=r"cannot be moved|cannot run"):
        HFRunner.checked(model)


def test_outcomes_are_kept(monkeypatch):
    runner = HFRunner.checked(build("llama-default"))
    monkeypatch.setattr(gates, "measure", lambda _: pytest.fail("the gates ran again"))
    again = HFRunner.checked(build("llama-default"))
    assert again.gates == runner.gates
    assert again.cost == runner.cost


def test_the_model_is_untouched_outside_a_forward(tiny):
    ids = tokens(20)
    assert tiny.model.config._attn_implementation != intercept.NAME
    with torch.inference_mode():
        before = tiny.model(input_ids=ids[None]).logits
        tiny.forward([ids], [tiny.new_kv(20)], Plan([torch.arange(20)]))
        assert torch.equal(tiny.model(input_ids=ids[None]).logits, before)


def test_smollm2_ratio_one_on_real_tokens(smollm2):
    """1,500 tokens of real English in five chunks: recomputing all of them is a full prefill."""
    from pydoc_data.topics import topics

    ids = torch.tensor(
        smollm2.tokenizer("\n".join(topics[t] for t in ("assignment", "objects", "naming")))["input_ids"][:1500]
    )
    assert len(ids) == 1500
    prompt = Prompt(ids, tuple((a, a + 290) for a in range(0, 1450, 290)))
    blender = Blender(smollm2, BlendConfig(policy="attention_value_norm", recompute_ratio=1.0))
    blender.store(prompt)
    with torch.inference_mode():
        reference = smollm2.model(input_ids=ids[None], logits_to_keep=1).logits[0, -1]
    assert (blender.prefill(prompt).logits - reference).abs().max() <= 1e-3
