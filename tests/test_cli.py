"""The command line end to end, with a tiny random model in a local folder."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lmcache_blend import cli
from lmcache_blend.errors import ResultsError
from lmcache_blend.eval import harness, measure
from lmcache_blend.eval.results import Results
from lmcache_blend.types import Prompt


WORDS = "the river runs past old mill and market town where boats bring salt fish wool from far north".split()
POSITIONS = 1280
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


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    before = os.environ.get("LMCACHE_BLEND_CACHE")
    os.environ["LMCACHE_BLEND_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("LMCACHE_BLEND_CACHE")
    if before is not None:
        os.environ["LMCACHE_BLEND_CACHE"] = before


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "tiny", 4096)


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


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "tales.jsonl", 6)


def arguments(model: Path, data: Path, output: Path, *more: str, method: str = METHODS, limit: int = 3) -> list[str]:
    return [
        *("run", "--model", str(model), "--task", "tales", "--data", str(data), "--method", method),
        *("--limit", str(limit), "--output", str(output), "--option", "max_new_tokens=4", *more),
    ]


@pytest.fixture(scope="module")
def output(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of every kind of method at two ratios; tests that change something copy nothing from it."""
    folder = tmp_path_factory.mktemp("results")
    assert cli.main(arguments(model, data, folder, "--recompute-ratio", "0.15,1")) == 0
    return folder


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


# ---------------------------------------------------------------- run


def test_run_writes_one_folder_per_combination(output: Path):
    results = results_of(output)
    ratioless = {("full_recompute", None), ("prefix_cache", None), ("full_reuse", None)}
    policies = ("epic", "cacheblend", "attention_value_norm")
    assert set(results) == ratioless | {(m, r) for m in policies for r in (0.15, 1.0)}
    for folder in output.iterdir():
        assert {p.name for p in folder.iterdir()} == {"config.json", "results.json", "samples.jsonl", "trace.npz"}
        assert folder.name.startswith("tales__tiny__")
    assert all((r.n, r.complete, r.backend, r.codec["id"]) == (3, True, "hf", "raw") for r in results.values())
    assert {"lmcache_blend", "torch", "transformers", "python"} <= set(results["epic", 0.15].versions)


def test_exact_methods_are_exact_and_reuse_is_not(output: Path):
    kl = {key: r.metrics.kl.mean for key, r in results_of(output).items() if r.metrics.kl}
    for key in [("full_recompute", None), ("prefix_cache", None), *((m, 1.0) for m, r in kl if r == 1.0)]:
        assert kl[key] < 1e-6, key
    assert kl["full_reuse", None] > 1e-3


def test_compute_and_bytes(output: Path):
    results = results_of(output)
    assert results["full_recompute", None].compute_fraction == pytest.approx(1.0)
    assert results["full_recompute", None].ttft_ratio.mean == pytest.approx(1.0)
    assert results["full_recompute", None].loaded_bytes == 0
    assert results["full_recompute", None].bits_per_element is None
    reuse, epic = results["full_reuse", None], results["epic", 0.15]
    assert reuse.compute_fraction < epic.compute_fraction < results["cacheblend", 0.15].compute_fraction < 1.0
    assert reuse.bits_per_element == pytest.approx(32.0)
    assert reuse.loaded_bytes == pytest.approx(2 * reuse.raw_kv_bytes)
    assert 0 < results["prefix_cache", None].loaded_bytes < reuse.loaded_bytes


def test_samples_hold_what_results_are_made_of(output: Path):
    for line in lines(output, "full_reuse"):
        sample = json.loads(line)
        assert {"id", "prediction", "answers", "nll", "kl", "ttft_ms", "rows"} <= set(sample)
        assert len(sample["rows"]) == 4
        assert sample["flip"] in (True, False)
        assert sum(sample["stages_ms"].values()) <= sample["ttft_ms"]


def test_the_first_sample_leaves_its_trace(output: Path):
    (path,) = output.glob("*__full_reuse__*/trace.npz")
    with np.load(path) as trace:
        layers, tokens = trace["rows"].shape
        assert layers == 4
        assert trace["deviation_exact"].shape == (layers, tokens)
        assert np.isnan(trace["deviation_exact"][:, -1]).all()  # the question is never reused
        start, end = trace["spans"][-1]
        assert (trace["deviation_exact"][2, start:end] > 0).all()
        assert trace["deviation_exact"][0, start:end].max() < 1e-3  # layer 0 has seen no context yet
        assert not trace["rows"][:, start:end].any()


def test_a_finished_combination_is_left_alone(model, data, tmp_path, capsys):
    command = arguments(model, data, tmp_path, method="epic", limit=2)
    assert cli.main(command) == 0
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert cli.main(command) == 0
    assert "epic 15%: complete with 2 samples" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_larger_limit_goes_on(model, data, tmp_path):
    assert cli.main(arguments(model, data, tmp_path, method="epic", limit=2)) == 0
    first = lines(tmp_path, "epic")
    assert cli.main(arguments(model, data, tmp_path, method="epic,random", limit=4)) == 0
    assert lines(tmp_path, "epic")[:2] == first
    assert len(lines(tmp_path, "epic")) == len(lines(tmp_path, "random")) == 4
    assert {r.n for r in results_of(tmp_path).values()} == {4}


def test_a_killed_run_resumes_to_the_same_results(model, data, tmp_path, output):
    command = arguments(model, data, tmp_path, method="epic,cacheblend")
    assert cli.main(command) == 0
    (path,) = tmp_path.glob("*__epic__*/samples.jsonl")
    whole = lines(tmp_path, "epic")
    os.truncate(path, path.stat().st_size - len(whole[-1]) // 2)
    (path.parent / "results.json").unlink()
    assert cli.main(command) == 0
    again = lines(tmp_path, "epic")
    assert again[:2] == whole[:2]
    timed = {"ttft_ms", "ttft_full_ms", "stages_ms"}
    old, new = ({k: v for k, v in json.loads(x).items() if k not in timed} for x in (whole[-1], again[-1]))
    assert new == old
    # ... and an uninterrupted run elsewhere measured the same.
    assert results_of(tmp_path)["epic", 0.15].metrics == results_of(output)["epic", 0.15].metrics


def test_an_interrupted_run_can_be_reported_and_resumed(model, data, tmp_path, capsys, monkeypatch):
    calls = []

    def stop(*args):
        calls.append(args)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return measure.measure_method(*args)

    command = arguments(model, data, tmp_path, method="epic,random")
    with monkeypatch.context() as patch:
        patch.setattr(harness, "measure_method", stop)
        assert cli.main(command) == 130
    assert "run the same command again" in capsys.readouterr().err
    assert sorted(r.n for r in results_of(tmp_path).values()) == [1, 2]
    assert not any(r.complete for r in results_of(tmp_path).values())
    assert cli.main(["report", str(tmp_path), "--json", str(tmp_path / "board.json")]) == 0
    assert cli.main(command) == 0
    assert all((r.n, r.complete) == (3, True) for r in results_of(tmp_path).values())


def test_a_full_disk_ends_the_run_in_one_line_and_keeps_what_is_there(model, data, tmp_path, capsys, monkeypatch):
    command = arguments(model, data, tmp_path, method="epic", limit=2)
    assert cli.main(command) == 0
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    capsys.readouterr()

    def full(file: int) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert cli.main(arguments(model, data, tmp_path, method="epic", limit=3)) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("lmcache-blend: cannot write")
    assert "free space" in error
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_options_reach_the_policy_the_loop_and_the_task(model, tmp_path):
    command = ["run", "--model", str(model), "--task", "people_qa", "--method", "cacheblend,random", "--limit", "1"]
    options = ["signal=k", "generate=false", "passages=3", "chunk_tokens=40"]
    command += [word for option in options for word in ("--option", option)]
    assert cli.main([*command, "--seed", "7", "--encode", "prefix", "--output", str(tmp_path)]) == 0
    results = results_of(tmp_path)
    config = results["cacheblend", 0.15].config
    assert config.policy_options == {"signal": "k"}
    assert config.task_options == {"passages": 3}
    assert (config.chunk_tokens, config.encode, config.seed) == (40, "prefix", 7)
    assert results["random", 0.15].config.policy_options == {"seed": 7}
    assert results["random", 0.15].metrics.f1 is None
    with np.load(next(tmp_path.glob("*__random__*/trace.npz"))) as trace:
        assert (np.diff(trace["spans"], axis=1)[1:] <= 40).all()


def test_sets_without_answers_measure_fidelity(model, tmp_path):
    rows = [{"id": str(i), "dataset": "f", "task": "fidelity", "question": "Where?", "answers": []} for i in range(2)]
    path = tmp_path / "f.jsonl"
    path.write_text("".join(json.dumps({**r, "contexts": [passage(1), passage(2)]}) + "\n" for r in rows))
    assert cli.main(arguments(model, path, tmp_path / "out", method="epic,full_reuse")) == 0
    results = results_of(tmp_path / "out")
    assert all(not r.signal and r.metrics.nll is None for r in results.values())
    assert results["full_reuse", None].metrics.kl.mean > 0  # pyright: ignore[reportOptionalMemberAccess]
    assert results["epic", 0.15].metrics.flip_rate is not None


# ---------------------------------------------------------------- long contexts


@pytest.fixture(scope="module")
def short_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "short", POSITIONS)


@pytest.fixture(scope="module")
def mixed_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed")
    long = write_data(folder / "long.jsonl", 2, passages=30, name="long").read_text()
    (folder / "mixed.jsonl").write_text(write_data(folder / "short.jsonl", 1, passages=1).read_text() + long)
    return folder / "mixed.jsonl"


def test_samples_that_are_too_long_are_skipped_visibly(short_model, mixed_data, tmp_path, capsys):
    assert cli.main(arguments(short_model, mixed_data, tmp_path, method="epic")) == 0
    assert f"2 of 3 samples are longer than the model's {POSITIONS} tokens" in capsys.readouterr().err
    (result,) = results_of(tmp_path).values()
    assert result.n == 1
    assert {s.id for s in result.skipped} == {"long0", "long1"}
    assert all(s.limit == POSITIONS < s.tokens for s in result.skipped)


def test_samples_that_are_too_long_are_truncated_on_request(short_model, mixed_data, tmp_path):
    command = arguments(short_model, mixed_data, tmp_path, "--option", "long_context=truncate", method="epic")
    assert cli.main(command) == 0
    (result,) = results_of(tmp_path).values()
    assert (result.n, result.skipped) == (3, [])
    assert max(json.loads(x)["tokens"] for x in lines(tmp_path, "epic")) < POSITIONS


def test_nothing_but_too_long_samples_is_an_error(short_model, tmp_path, capsys):
    path = write_data(tmp_path / "long.jsonl", 2, passages=30)
    assert cli.main(arguments(short_model, path, tmp_path / "out", method="epic")) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(POSITIONS) in error
    assert "long_context=truncate" in error


@pytest.mark.parametrize("limit", [12, 20, 33, 47])
def test_truncation_cuts_the_middle_of_the_longest_passages(limit: int):
    prompt = Prompt.join([range(10, 30), range(40, 44), range(50, 66)], [1, 2, 3], prefix=[7, 8, 9])
    cut = measure.truncate(prompt, limit)
    assert len(cut) == min(limit, len(prompt))
    assert cut.tokens[:3].tolist() == [7, 8, 9]
    assert cut.tokens[-3:].tolist() == [1, 2, 3]
    assert len(cut.spans) == 4
    sizes = [end - start for start, end in cut.spans[1:]]
    longest = max(sizes)
    for size, whole, (start, end) in zip(sizes, (20, 4, 16), cut.spans[1:], strict=True):
        assert size == whole or size >= longest - 1
        part = cut.tokens[start:end].tolist()
        assert part == sorted(set(part))
        assert whole < 3 or part[0] in (10, 40, 50)


# ---------------------------------------------------------------- report and ls


def test_report_of_a_real_run(output: Path, capsys):
    capsys.readouterr()
    assert cli.main(["report", str(output), "--json", "-"]) == 0
    (board,) = json.loads(capsys.readouterr().out)
    assert len(board["rows"]) == 9
    assert all(row["n"] == 3 for row in board["rows"])
    assert (output / "leaderboard.md").read_text().count("| cacheblend |") == 2
    assert len((output / "leaderboard.csv").read_text().splitlines()) == 10
    assert len(list((output / "plots").glob("*.png"))) == 4
    assert cli.main(["report", str(output)]) == 0
    assert "attention_value_norm" in capsys.readouterr().out
    # Leave what the other tests count as it was.
    for path in [*(output / "plots").iterdir(), output / "leaderboard.md", output / "leaderboard.csv"]:
        path.unlink()
    (output / "plots").rmdir()


@pytest.mark.parametrize(
    ("kind", "some"),
    [
        ("tasks", {"needle", "people_qa", "hotpotqa"}),
        ("methods", {"full_recompute", "prefix_cache", "full_reuse", "random", "epic", "cacheblend", "oracle"}),
        ("codecs", {"raw"}),
        ("tiers", {"memory"}),
    ],
)
def test_ls(kind: str, some: set[str], capsys, tmp_path):
    assert cli.main(["ls", kind]) == 0
    text = capsys.readouterr().out
    assert some <= {line.split()[0] for line in text.splitlines()}
    assert cli.main(["ls", kind, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert some <= {row["name"] for row in rows}
    assert all(row["description"] for row in rows)
    assert cli.main(["ls", kind, "--json", str(tmp_path / "ls.json")]) == 0
    assert json.loads((tmp_path / "ls.json").read_text()) == rows


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--method": "epik"}, r"unknown policy 'epik': did you mean 'epic'"),
        ({"--method": "epic,cacheblnd"}, r"did you mean 'cacheblend'"),
        ({"--task": "needel"}, r"unknown task 'needel': did you mean 'needle'"),
        ({"--recompute-ratio": "1.5"}, r"1\.5 is outside \[0, 1\]"),
        ({"--recompute-ratio": "0.15,-0.1"}, r"-0\.1 is outside \[0, 1\]"),
        ({"--recompute-ratio": "nan"}, r"nan is outside \[0, 1\]"),
        ({"--recompute-ratio": "some"}, r"'some' is not a number"),
        ({"--codec": "rwa"}, r"unknown codec 'rwa': did you mean 'raw'"),
        ({"--option": "singal=k"}, r"unknown option 'singal': did you mean 'signal'"),
        ({"--option": "signal=q"}, r"choose k, v or kv"),
        ({"--option": "signal=3"}, r"signal = 3"),
        ({"--option": "generate"}, r"'generate' is not key=value"),
        ({"--option": "long_context=cut"}, r"long_context = 'cut'"),
        ({"--option": "words=some"}, r"words"),
        ({"--limit": "0"}, r"limit = 0"),
        ({"--limit": "ten"}, r"invalid int value: 'ten'"),
        ({"--backend": "gguf"}, r"invalid choice: 'gguf'"),
        ({"--data": "missing.jsonl"}, r"missing\.jsonl"),
    ],
)
def test_bad_arguments_are_one_line_before_any_model_is_loaded(changes, message, capsys, tmp_path):
    settings = {"--model": "no-such-model", "--task": "needle", "--method": "cacheblend", "--output": str(tmp_path)}
    command = ["run", *(word for pair in {**settings, **changes}.items() for word in pair)]
    try:
        status = cli.main(command)
    except SystemExit as error:
        status = error.code
    assert status == 2
    error = one_line_error(capsys)
    assert re.search(message, error), error
    assert list(tmp_path.iterdir()) == []


def test_a_broken_data_line_is_named(model, tmp_path, capsys):
    path = write_data(tmp_path / "tales.jsonl", 2)
    path.write_text(path.read_text() + '{"id": "q2", "question": \n')
    assert cli.main(arguments(model, path, tmp_path / "out", method="epic")) == 2
    error = one_line_error(capsys)
    assert "tales.jsonl" in error
    assert "3" in error


def test_a_model_that_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cli.main(["run", "--model", "./no-such-folder", "--task", "needle", "--method", "epic", "--output", "x"]) == 2
    assert "no-such-folder" in one_line_error(capsys)


@pytest.mark.parametrize("command", [[], ["rnu"], ["run"], ["report"], ["ls", "tiles"], ["report", "x", "--jsn", "-"]])
def test_wrong_usage_is_one_line(command, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(command)
    assert error.value.code == 2
    one_line_error(capsys)


def test_report_without_results_is_bad_input(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "missing"):
        assert cli.main(["report", str(folder)]) == 2
        assert str(folder) in one_line_error(capsys)


def test_other_errors_of_ours_end_with_1(model, data, tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert cli.main(arguments(model, data, blocked, method="epic")) == 1
    assert issubclass(ResultsError, OSError)
    assert str(blocked) in capsys.readouterr().err
