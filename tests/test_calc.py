"""The calculator against figures worked out by hand from the models' public configs."""

import json

import pytest
from tiny import one_line_error

from lmcache_blend import cli
from lmcache_blend.errors import ConfigError, UnsupportedModelError
from lmcache_blend.eval.calc import CalcRequest, calculate
from lmcache_blend.hf.layout import prefill_flops, read_layout

LLAMA_3_8B = {
    "model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
    "num_hidden_layers": 32, "intermediate_size": 14336, "vocab_size": 128256, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN2_5_05B = {
    "model_type": "qwen2", "hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2,
    "num_hidden_layers": 24, "intermediate_size": 4864, "use_sliding_window": False, "sliding_window": 32768,
    "max_window_layers": 21, "vocab_size": 151936, "torch_dtype": "bfloat16",
}  # fmt: skip
DEEPSEEK_V2 = {
    "model_type": "deepseek_v2", "hidden_size": 5120, "num_attention_heads": 128, "num_key_value_heads": 128,
    "num_hidden_layers": 60, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "torch_dtype": "bfloat16",
}  # fmt: skip
DEEPSEEK_V3 = {
    **DEEPSEEK_V2, "model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "first_k_dense_replace": 3, "vocab_size": 129280,
}  # fmt: skip
GEMMA_3_4B = {  # heads and their size are defaults of the config class; every sixth layer is global
    "model_type": "gemma3", "torch_dtype": "bfloat16",
    "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
                    "num_hidden_layers": 34, "sliding_window": 1024},
}  # fmt: skip
MISTRAL_7B_01 = {
    "model_type": "mistral", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
    "num_hidden_layers": 32, "sliding_window": 4096, "torch_dtype": "bfloat16",
}  # fmt: skip
FALCON_7B = {
    "model_type": "falcon", "hidden_size": 4544, "num_attention_heads": 71, "num_hidden_layers": 32,
    "multi_query": True, "new_decoder_architecture": False, "num_kv_heads": 71, "torch_dtype": "bfloat16",
}  # fmt: skip
LLAMA_2_7B = {**LLAMA_3_8B, "num_key_value_heads": 32, "intermediate_size": 11008, "torch_dtype": "float16"}
JAMBA = {
    "model_type": "jamba", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
    "num_hidden_layers": 32, "attn_layer_period": 8, "attn_layer_offset": 4, "mamba_d_state": 16, "mamba_d_conv": 4,
    "mamba_expand": 2, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN3_NEXT_80B = {
    "model_type": "qwen3_next", "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 2,
    "head_dim": 256, "num_hidden_layers": 48, "full_attention_interval": 4, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_value_head_dim": 128,
    "linear_num_value_heads": 32, "torch_dtype": "bfloat16",
}  # fmt: skip


HYBRID = {"full_attention": "gqa", "linear_attention": "none"}


def calc(tmp_path, config, **settings):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return calculate(CalcRequest(model=str(tmp_path), prefill_tokens_per_s=1000.0, **settings))


@pytest.mark.parametrize(
    ("config", "per_token", "tokens", "kv_bytes", "kinds"),
    [
        # layers x (K and V) x KV heads x head dim x 2 bytes
        (LLAMA_3_8B, 32 * 2 * 8 * 128 * 2, 8192, 8192 * 131_072, {"full_attention": "gqa"}),
        (LLAMA_2_7B, 32 * 2 * 32 * 128 * 2, 4096, 4096 * 524_288, {"full_attention": "mha"}),
        (QWEN2_5_05B, 24 * 2 * 2 * 64 * 2, 32_768, 32_768 * 12_288, {"full_attention": "gqa"}),
        (FALCON_7B, 32 * 2 * 1 * 64 * 2, 2048, 2048 * 8192, {"full_attention": "mqa"}),
        # MLA: the latent and the shared rope key
        (DEEPSEEK_V2, 60 * (512 + 64) * 2, 1000, 1000 * 69_120, {"mla": "mla"}),
        (DEEPSEEK_V3, 61 * (512 + 64) * 2, 131_072, 131_072 * 70_272, {"mla": "mla"}),
        # 5 global layers hold every token, 29 local ones the last 1,024; 2 x 4 x 256 x 2 bytes a layer
        (
            GEMMA_3_4B,
            34 * 4096,
            32_768,
            5 * 32_768 * 4096 + 29 * 1024 * 4096,
            {"full_attention": "gqa", "sliding_attention": "gqa"},
        ),
        (MISTRAL_7B_01, 131_072, 1000, 1000 * 131_072, {"sliding_attention": "gqa"}),
        (MISTRAL_7B_01, 131_072, 32_768, 4096 * 131_072, {"sliding_attention": "gqa"}),
        # one layer in 8 attends
        (JAMBA, 4 * 2 * 8 * 128 * 2, 262_144, 262_144 * 16_384, HYBRID),
        # one layer in 4 attends
        (QWEN3_NEXT_80B, 12 * 2 * 2 * 256 * 2, 1 << 18, (1 << 18) * 24_576, HYBRID),
    ],
)
def test_bytes_of_public_models(tmp_path, config, per_token, tokens, kv_bytes, kinds):
    result = calc(tmp_path, config, tokens=tokens)
    assert result["kv_bytes_per_token"] == per_token
    assert result["kv_bytes"] == kv_bytes == sum(row["kv_bytes"] for row in result["by_layer_kind"].values())
    assert {kind: row["attention"] for kind, row in result["by_layer_kind"].items()} == kinds
    assert sum(row["kv_bytes_per_token"] for row in result["by_layer_kind"].values()) == per_token


@pytest.mark.parametrize(
    ("config", "elements"),
    [
        (LLAMA_3_8B, 0),
        # 28 Mamba layers of 8,192 channels: 3 past inputs of the convolution and 16 numbers of state each
        (JAMBA, 28 * 8192 * (3 + 16)),
        # 36 gated delta nets: 3 past inputs of 2 x 2,048 + 4,096 channels; 32 heads of a 128 x 128 state
        (QWEN3_NEXT_80B, 36 * (3 * 8192 + 32 * 128 * 128)),
    ],
)
def test_recurrent_state_is_counted_apart_from_kv(tmp_path, config, elements):
    short, long = (calc(tmp_path, config, tokens=n)["state_bytes"] for n in (100, 100_000))
    assert short == long == elements * 2


@pytest.mark.parametrize(
    ("config", "active", "pairs_width"),
    [
        # Parameters that a token meets, embeddings and output head not counted: 8.03e9 less 2 x 128,256 x 4,096
        (LLAMA_3_8B, 32 * (4096 * (4096 * 2 + 1024 * 2) + 3 * 4096 * 14336), 32 * 32 * 256),
        # DeepSeek-V3's report: 37e9 active, of which 2 x 129,280 x 7,168 are embeddings
        (DEEPSEEK_V3, 37e9 - 2 * 129_280 * 7168, 61 * 128 * 320),
    ],
)
def test_prefill_flops(config, active, pairs_width):
    tokens = 4096
    by_hand = 2 * active * tokens + 2 * pairs_width * tokens * (tokens + 1) / 2
    assert prefill_flops(read_layout(config), tokens) == pytest.approx(by_hand, rel=0.015)


def test_load_against_prefill(tmp_path):
    result = calc(tmp_path, LLAMA_3_8B, tokens=8192, bandwidths_gbit_s=(8.0,), tiers={"ram": 10 * 2**30})
    assert result["links"][0]["load_ms"] == pytest.approx(1073.741824)  # 2^30 bytes at 10^9 bytes a second
    assert result["prefill_ms"] == pytest.approx(8192.0)  # at 1,000 tokens a second
    assert result["links"][0]["speedup"] == pytest.approx(8192 / 1073.741824)
    assert result["break_even_gbit_s"] == pytest.approx(8 * 1.073741824 / 8.192)
    assert result["tiers"] == [{"tier": "ram", "capacity_bytes": 10 * 2**30, "contexts": 10}]


def test_codec_size_is_exact_where_it_does_not_depend_on_the_data_and_says_so(tmp_path):
    sources = {
        spec: calc(tmp_path, QWEN2_5_05B, tokens=512, codec=spec)["codec_size_source"]
        for spec in ("raw", "int4", "kivi", "cachegen", "zstd")
    }
    assert sources == {"raw": "exact", "int4": "exact", "kivi": "exact", "cachegen": "gaussian", "zstd": "gaussian"}
    raw = calc(tmp_path, QWEN2_5_05B, tokens=512, codec="raw")
    assert raw["kv_bytes"] < raw["codec_bytes"] < 1.01 * raw["kv_bytes"]  # the container's header, nothing else
    int4 = calc(tmp_path, QWEN2_5_05B, tokens=512, codec="int4")
    assert 4.0 < int4["codec_bits_per_element"] < 4.5
    measured = calc(tmp_path, QWEN2_5_05B, tokens=512, codec="cachegen", bits_per_element=2.7)
    assert measured["codec_bytes"] == -(-512 * 12_288 * 2.7 // 16)


def test_a_codec_runs_on_mla(tmp_path):
    config = {**DEEPSEEK_V2, "num_hidden_layers": 2}
    assert calc(tmp_path, config, tokens=64, codec="raw")["codec_bytes"] >= 64 * 2 * 576 * 2


def test_growth_plot_and_json(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B))
    plot, out = tmp_path / "growth.svg", tmp_path / "calc.json"
    arguments = [
        "calc",
        "--model",
        str(tmp_path / "config.json"),
        "--tokens",
        "1000",
        "--users",
        "3",
        "--codec",
        "int4",
    ]
    assert cli.main([*arguments, "--plot", str(plot), "--json", str(out), "--tier", "nvme=2TB"]) == 0
    text = capsys.readouterr().out
    assert "131,072 B per token" in text
    assert "nvme" in text
    result = json.loads(out.read_text())
    assert {"kv_bytes_per_token", "kv_bytes", "by_layer_kind", "codec_bytes"} <= set(result)
    assert result["total_kv_bytes"] == 3 * 1000 * 131_072
    assert plot.read_text().count("<path") > 10
    assert "users at the same time" in plot.read_text().replace("<!-- ", "").replace(" -->", "")
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["users"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "tokens = 0"),
        (["--tokens", "10", "--users", "-1"], "users = -1"),
        (["--tokens", "10", "--codec", "int5"], "unknown codec 'int5'"),
        (["--tokens", "10", "--bits-per-element", "2"], "name it too"),
        (["--tokens", "10", "--dtype", "int3"], "dtype = 'int3'"),
        (["--tokens", "10", "--tier", "cpu"], "is no size"),
        (["--tokens", "10", "--bandwidth", "fast"], "'fast' is no number"),
        (["--tokens", "10", "--bandwidth", "nan"], "above 0"),
        (["--tokens", "10", "--longest", "1"], "longest = 1"),
        (["--tokens", "9" * 20], "at most 1,000,000,000"),
        (["--tokens", "10", "--tier", "a=0.1"], "tier a = 0: it must be above 0"),
        (["--tokens", "10", "--tier", "=1GiB"], "has no name"),
        (["--tokens", "10", "--tier", "a=1GiB", "--tier", "a=2GiB"], "twice"),
        (["--tokens", "10", "--plot", "growth.bmpx"], ".png, .svg or .pdf"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, capsys, arguments, message):
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_5_05B))
    assert cli.main(["calc", "--model", str(tmp_path), *arguments]) == 2
    assert message in one_line_error(capsys)


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "llama", "num_attention_heads": "many"}', "{}", '"x"'])
def test_a_broken_config_is_one_line(tmp_path, capsys, text):
    (tmp_path / "config.json").write_text(text)
    assert cli.main(["calc", "--model", str(tmp_path), "--tokens", "8"]) == 2
    one_line_error(capsys)


@pytest.mark.parametrize("config", [GEMMA_3_4B, QWEN3_NEXT_80B, DEEPSEEK_V3, LLAMA_2_7B])
def test_the_tables_fit_into_80_columns_uncut(tmp_path, capsys, monkeypatch, config):
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(tmp_path)
    arguments = ["calc", "--model", "config.json", "--tokens", "1000000", "--users", "1000", "--codec", "cachegen"]
    assert cli.main([*arguments, "--bits-per-element", "2.5"]) == 0
    text = capsys.readouterr().out
    assert "\u2026" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_what_cannot_be_read_is_refused_instead_of_guessed():
    with pytest.raises(UnsupportedModelError, match="block_configs"):
        read_layout({"model_type": "deci-like", "num_hidden_layers": 2, "num_attention_heads": 2, "block_configs": [1]})
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        read_layout({"model_type": "t5"})
    with pytest.raises(ConfigError, match="tier x = 0"):
        CalcRequest(model="m", tokens=1, tiers={"x": 0})


def test_a_model_type_that_transformers_does_not_know_is_read_by_the_usual_names(tmp_path):
    config = {
        "model_type": "own",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "dtype": "float32",
    }
    result = calculate(CalcRequest(model=_write(tmp_path, config), tokens=10))
    assert result["kv_bytes_per_token"] == 3 * 2 * 64 * 4
    assert result["prefill_ms"] is None
    assert result["break_even_gbit_s"] is None


def _write(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)
