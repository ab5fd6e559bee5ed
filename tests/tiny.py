"""Helpers of the end-to-end tests: a tiny random model in a local folder, texts for it, what a run wrote."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lmcache_blend.eval.results import Results

WORDS = [
    "the",
    "river",
    "runs",
    "past",
    "old",
    "mill",
    "and",
    "market",
    "town",
    "where",
    "boats",
    "bring",
    "salt",
    "fish",
    "wool",
    "from",
    "far",
    "north",
]
POSITIONS = 1280
"""Positions of the short model."""
METHODS = "full_recompute,prefix_cache,full_reuse,epic,cacheblend,attention_value_norm"


def passage(i: int) -> str:
    rng = np.random.default_rng(i)
    return " ".join(rng.choice(WORDS, 24)) + f". Number {i} is {rng.choice(WORDS)}."


def build_model(folder: Path, positions: int) -> Path:
    """A Llama of 4 layers and the byte-level tokenizer of its own texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([passage(i) for i in range(50)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_data(path: Path, n: int, passages: int = 4, name: str = "q") -> Path:
    with path.open("w") as file:
        for i in range(n):
            row = {
                "id": f"{name}{i}",
                "dataset": "tales",
                "task": "qa",
                "question": f"What is number {4 * i}?",
                "contexts": [passage(4 * i + j) for j in range(passages)],
                "answers": [WORDS[i % len(WORDS)]],
            }
            file.write(json.dumps(row) + "\n")
    return path


def arguments(model: Path, data: Path, output: Path, *more: str, method: str = METHODS, limit: int = 3) -> list[str]:
    return [
        *("run", "--model", str(model), "--task", "tales", "--data", str(data), "--method", method),
        *("--limit", str(limit), "--output", str(output), "--option", "max_new_tokens=4", *more),
    ]


def results_of(output: Path) -> dict[tuple[str, float | None], Results]:
    found = [Results.model_validate_json(p.read_bytes()) for p in output.glob("*/results.json")]
    return {(r.method, r.recompute_ratio): r for r in found}


def lines(output: Path, method: str) -> list[bytes]:
    (path,) = output.glob(f"*__{method}__*/samples.jsonl")
    return path.read_bytes().splitlines()


def one_line_error(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("lmcache-blend: ")
    assert captured.err.count("\n") == 1
    return captured.err
