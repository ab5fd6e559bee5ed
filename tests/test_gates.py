"""Every supported architecture, with each rope type that it can carry, runs its own forward exactly on chosen rows."""

import pytest
import torch
from architectures import ARCHITECTURES, VOCAB, build
from transformers import AttentionMaskInterface, AutoModelForCausalLM, GPT2Config

from lmcache_blend.blend import Blender, Plan
from lmcache_blend.config import BlendConfig
from lmcache_blend.errors import UnsupportedModelError
from lmcache_blend.hf import HFRunner, gates, intercept
from lmcache_blend.hf.learn import relative_error
from lmcache_blend.types import Prompt


def tokens(n: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB, (n,), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name):
    model = build(name)
    runner = HFRunner.checked(model)
    for gate in ("full", "partial", "dropped"):
        assert runner.gates[gate]["largest"] <= 1e-4, gate

    # Three chunks, encoded alone and moved: ratio 1.0 is a full prefill, and layer 0 keys need no recompute at all.
    ids = tokens(96)
    prompt = Prompt(ids, ((0, 30), (30, 60), (60, 90)))
    blender = Blender(runner, BlendConfig(policy="epic", recompute_ratio=1.0))
    assert blender.store(prompt) == 3
    with torch.inference_mode():
        reference = model(input_ids=ids[None]).logits[0, -1]
    assert (blender.prefill(prompt).logits - reference).abs().max() <= 1e-4

    reused = blender.prefill(prompt, policy="full_reuse")
    exact = blender.prefill(prompt, policy="full_recompute")
    every = torch.arange(96)
    for moved, true in zip(reused.kv.read(0, every), exact.kv.read(0, every), strict=True):
        assert relative_error(moved, true) <= 1e-5
    assert (reused.logits - reference).abs().max() > 1e-3, "reuse cannot be exact: the test would not see an error"


@pytest.mark.parametrize(
    "name", ["llama-llama3", "mixtral", "qwen3_moe-default", "gemma3", "gpt_oss-yarn", "deepseek_v3"]
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


def bottom_right(batch_size, q_length, kv_length, mask_function, dtype=torch.float32, **kwargs):
    """The mask of other implementations: the gathered rows taken for the last ones of the prompt."""
    forward = intercept.CURRENT.get()
    rows = torch.arange(kv_length - q_length, kv_length)[None]
    return forward.mask(rows, mask_function, dtype)


NEGATIVE = ["llama-default", "mistral-default", "gemma3", "qwen3_moe-default", "deepseek_v3"]


@pytest.mark.parametrize("name", NEGATIVE)
def test_a_bottom_right_mask_fails_the_gates(name, monkeypatch):
    runner = HFRunner.checked(build(name))
    AttentionMaskInterface.register(intercept.NAME, bottom_right)
    try:
        outcome = gates.measure(runner)
    finally:
        AttentionMaskInterface.register(intercept.NAME, intercept.row_mask)
    assert outcome["partial"]["largest"] > 1e-2
    assert not gates.equal(outcome["partial"], torch.float32, outcome["largest_logit"])


@pytest.mark.parametrize("name", NEGATIVE)
def test_positions_off_by_one_fail_the_gates(name, monkeypatch):
    runner = HFRunner.checked(build(name))
    run = runner._run
    # Off by one for chosen rows only, the way a blend that forgets its offset is: a shift of all rows changes nothing.
    shifted = lambda f, ids, at, n: run(f, ids, at if at.shape[1] == f.length else at + 1, n)  # noqa: E731
    monkeypatch.setattr(runner, "_run", shifted)
    outcome = gates.measure(runner)
    assert outcome["partial"]["largest"] > 1e-3
    assert not gates.equal(outcome["partial"], torch.float32, outcome["largest_logit"])


def test_a_failing_gate_refuses_the_model_with_the_reason(monkeypatch):
    monkeypatch.setattr(gates, "REVISION", -1)  # an outcome kept by another test does not count
    AttentionMaskInterface.register(intercept.NAME, bottom_right)
    try:
        with pytest.raises(UnsupportedModelError, match="gate 'partial' failed"):
            HFRunner.checked(build("llama-default"))
    finally:
        AttentionMaskInterface.register(intercept.NAME, intercept.row_mask)


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
