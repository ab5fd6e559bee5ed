"""The connector in a real vLLM engine: each scenario of vllm_scenarios.py in a process of its own.

The models are tiny and random, with weights so large that every key matters: wrong KV changes the answer at once
(`full reuse differs` and `refused` show that it would).
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: make test says why", allow_module_level=True)
if "lmcache_blend" not in {p.name for p in entry_points(group="vllm.general_plugins")}:
    pytest.skip("vLLM does not see the plugin: install this package beside it", allow_module_level=True)

HERE = Path(__file__).parent
SIZES = {"vocab_size": 2000, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64,
         "num_key_value_heads": 2, "max_position_embeddings": 4096, "initializer_range": 0.15}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=10, tie_word_embeddings=False, **SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> Path:
    """Gemma 3: two thetas, norms of queries and keys, four of six layers with a window of 128."""
    folder = tmp_path_factory.mktemp("gemma")
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    torch.manual_seed(0)
    config = Gemma3TextConfig(num_hidden_layers=6, sliding_window=128, layer_types=kinds, **SIZES)
    model = Gemma3ForCausalLM(config)
    with torch.no_grad():  # or the scaled embedding drowns what the layers add, and the answer cares for no key
        model.get_input_embeddings().weight.mul_(0.05)
    model.save_pretrained(folder)
    return folder


Run = Callable[[str, Path, Path], Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Iterator[Run]:
    """A scenario's result; all are forks of one process."""
    log = tmp_path_factory.mktemp("log") / "stderr"
    command, pipe = [sys.executable, str(HERE / "vllm_scenarios.py")], subprocess.PIPE
    with (
        open(log, "wb") as errors,
        subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=errors) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        written, printed = process.stdin, process.stdout

        def one(name: str, model: Path, folder: Path) -> Any:
            written.write(json.dumps([name, str(model), str(folder)]) + "\n")
            written.flush()
            found = ""
            while (line := printed.readline()) not in ("END\n", ""):
                found = line.removeprefix("RESULT ") if line.startswith("RESULT ") else found
            assert found, log.read_text()[-3000:]
            return json.loads(found)

        yield one


@pytest.fixture(scope="module")
def plain(run, llama, tmp_path_factory) -> list[list[int]]:
    """Answers of an engine without a connector."""
    return run("plain", llama, tmp_path_factory.mktemp("plain"))


def test_offload_serves_other_processes_and_survives_damage(run, llama, plain, tmp_path):
    first, second = run("offload", llama, tmp_path), run("offload", llama, tmp_path)
    assert first["tokens"] == plain
    assert second["tokens"] == plain
    assert sum(second["hits"]) > 1000 > sum(first["hits"])
    assert not first["leaked"]
    assert not second["leaked"]
    layered = run("layered", llama, tmp_path)
    assert layered["tokens"] == plain
    assert layered["hits"] == second["hits"]
    fresh = run("layered", llama, tmp_path / "fresh")
    assert fresh["tokens"] == plain
    assert run("layered", llama, tmp_path / "fresh") == layered
    damaged = run("damaged", llama, tmp_path)
    assert damaged["files"] > 10
    assert damaged["tokens"] == plain


def test_chunked_prefill(run, llama, plain, tmp_path):
    result = run("chunked", llama, tmp_path)
    assert result["tokens"] == result["again"] == plain
    assert all(result["hits"])


def test_asynchronous_loads_and_aborts(run, llama, plain, tmp_path):
    run("offload", llama, tmp_path)
    result = run("later", llama, tmp_path)
    assert result["tokens"] == plain
    assert all(result["hits"])
    result = run("aborts", llama, tmp_path)
    assert (result["leaked"], result["states"]) == (0, 0)
    assert result["tokens"] == plain


def test_generated_tokens_are_stored_on_request(run, llama, tmp_path):
    result = run("decode", llama, tmp_path)
    assert result["hits"] >= 192  # 100 of the prompt, 99 generated with KV: three whole chunks of 64
    assert result["tokens"] == result["plain"]


def test_a_lossy_codec_stores_keys_before_rope(run, llama, tmp_path):
    result = run("lossy", llama, tmp_path)
    assert result["hits"] == 299
    assert result["bytes"] < 300 * 10 * 2 * 2 * 64 * 4 / 3
    assert result["again"] == result["first"]  # int8 does not move these logits' largest


def check_blend(result: dict[str, Any]) -> None:
    assert result["refused"] == ""
    assert all(result["same"].values()), result["same"]
    assert result["full reuse differs"]
    assert result["leaked"] == 0
    exact, error = result["bad spans"]
    assert exact
    assert "span" in error
    assert result["reports"]["reordered"]["segment"] == result["reports"]["reordered"]["recomputed"] > 500
    assert all(r["segment"] > 300 for r in result["policies"].values())
    share = {name: r["recomputed"] / r["segment"] for name, r in result["policies"].items()}
    assert share.pop("full_reuse {}") == 0
    share.pop("cacheblend {'check': 'gradual'}")
    assert all(0.19 < s < 0.21 for s in share.values()), share


def test_blend(run, llama, tmp_path):
    check_blend(run("blend", llama, tmp_path))


def test_blend_of_prompts_longer_than_the_batch_budget(run, llama, tmp_path):
    check_blend(run("slices", llama, tmp_path))


def test_blend_with_sliding_windows(run, gemma, tmp_path):
    check_blend(run("blend", gemma, tmp_path))


def test_blend_compiled(run, llama, tmp_path):
    check_blend(run("compiled", llama, tmp_path))


def test_tensor_parallel(run, llama, plain, tmp_path):
    check_blend(run("two_ranks", llama, tmp_path / "blend"))
    first, second = (run("offload_two_ranks", llama, tmp_path / "offload") for _ in range(2))
    assert first["tokens"] == second["tokens"] == plain
    assert sum(second["hits"]) > 1000 > sum(first["hits"])


def test_blend_through_the_kernels_operators(run, llama, gemma, tmp_path):
    """As on CUDA; every answer is held against vLLM's own attention, the policies' rows against its run-split path."""
    for model in (llama, gemma):
        result = run("kernels", model, tmp_path / model.name)
        # Two policies probe every layer.
        assert result["calls"]["attention_mass"] == 2 * (10 if model is llama else 6)
        assert result["calls"]["selective_attention"] > 50
        check_blend(result)
        stock = run("by_runs", model, tmp_path / f"{model.name} stock")
        check_blend(stock)
        answers = [{name: p["tokens"] for name, p in x["policies"].items()} for x in (result, stock)]
        assert answers[0] == answers[1]
    check_blend(run("kernels_compiled", llama, tmp_path / "compiled"))


def test_blended_requests_are_preempted_and_come_back(run, llama, tmp_path):
    result = run("crowded", llama, tmp_path)
    assert result["preempted"]
    assert result["same"]


def test_content_and_separator_matching(run, llama, tmp_path):
    result = run("content", llama, tmp_path)
    assert result["first"] == 0
    assert result["second"] > 200
    assert result["same"]
    assert run("separator", llama, tmp_path) == {"segment": 224, "same": True}


def test_a_model_that_fails_the_self_test_is_served_without_blending(run, llama, tmp_path):
    result = run("refused", llama, tmp_path)
    assert "over noise" in result["refused"]
    assert result["same"]
    assert result["hits"] > 0
