"""`lmcache-blend run` end to end with a tiny random model: what is written, resumed, skipped and reported."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny import POSITIONS, arguments, build_model, lines, one_line_error, passage, results_of, write_data

from lmcache_blend import cli
from lmcache_blend.eval import harness, measure
from lmcache_blend.eval.report import report
from lmcache_blend.hf import load_runner
from lmcache_blend.types import Prompt


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


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "tales.jsonl", 6)


@pytest.fixture(scope="module")
def output(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run of every kind of method at two ratios; tests that change something copy nothing from it."""
    folder = tmp_path_factory.mktemp("results")
    assert cli.main(arguments(model, data, folder, "--recompute-ratio", "0.15,1")) == 0
    return folder


def test_run_writes_one_folder_per_combination(output: Path):
    results = results_of(output)
    ratioless = {("full_recompute", None), ("prefix_cache", None), ("full_reuse", None)}
    policies = ("epic", "cacheblend", "attention_value_norm")
    assert set(results) == ratioless | {(m, r) for m in policies for r in (0.15, 1.0)}
    for folder in output.iterdir():
        assert {p.name for p in folder.iterdir()} == {
            "config.json",
            "results.json",
            "samples.jsonl",
            "trace.npz",
        }
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
    # A little more than the numbers: each value has a header.
    assert reuse.bits_per_element == pytest.approx(32.0, rel=0.01)
    assert reuse.loaded_bytes == pytest.approx(2 * reuse.raw_kv_bytes, rel=0.01)
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
    (board,) = report(tmp_path, plots=False)
    assert sorted(row.note for row in board.rows) == ["", "n 1 of 2"]
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
    command = [
        "run",
        "--model",
        str(model),
        "--task",
        "people_qa",
        "--method",
        "cacheblend,random",
        "--limit",
        "1",
    ]
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


def test_a_model_is_the_same_one_wherever_it_lies(model, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(model, copy)
    first, second = (load_runner(str(path), dtype="float32").fingerprint for path in (model, copy))
    assert first == second
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    assert load_runner(str(copy), dtype="float32").fingerprint != first


def test_stored_kv_goes_through_the_codec(model, data, tmp_path, output):
    spec = '{"id": "raw", "dtype": "bfloat16"}'
    command = arguments(model, data, tmp_path, "--codec", spec, method="full_reuse,prefix_cache", limit=2)
    assert cli.main(command) == 0
    found = results_of(tmp_path)
    assert found["full_reuse", None].codec == {"id": "raw", "dtype": "bfloat16"}
    assert found["full_reuse", None].bits_per_element == pytest.approx(16.0, rel=0.1)  # and headers
    # Rounded keys and values no longer give full prefill's logits to the last bit.
    assert 1e-9 < found["prefix_cache", None].metrics.kl.mean < 1e-2  # pyright: ignore[reportOptionalMemberAccess]


def test_several_codecs_share_a_run_and_are_drawn_against_each_other(model, data, tmp_path, output):
    specs = 'raw,{"id": "int8"},{"id": "kivi", "bits_k": 2, "bits_v": 2, "group": 32}'
    assert cli.main(arguments(model, data, tmp_path, "--codec", specs, method="prefix_cache", limit=2)) == 0
    read = (json.loads(path.read_text()) for path in tmp_path.rglob("results.json"))
    found = {r["codec"]["id"]: r for r in read}
    kl = {name: r["metrics"]["kl"]["mean"] for name, r in found.items()}
    assert kl["raw"] < 1e-9 < kl["int8"] < kl["kivi"]
    bits = {name: r["bits_per_element"] for name, r in found.items()}
    assert bits["kivi"] < bits["int8"] < bits["raw"] == pytest.approx(32, rel=0.01)  # float32, as it is
    assert cli.main(["report", str(tmp_path)]) == 0
    assert list((tmp_path / "plots").glob("codecs__*.png"))


def test_sets_without_answers_measure_fidelity(model, tmp_path):
    rows = [{"id": str(i), "dataset": "f", "task": "fidelity", "question": "Where?", "answers": []} for i in range(2)]
    path = tmp_path / "f.jsonl"
    path.write_text("".join(json.dumps({**r, "contexts": [passage(1), passage(2)]}) + "\n" for r in rows))
    assert cli.main(arguments(model, path, tmp_path / "out", method="epic,full_reuse")) == 0
    results = results_of(tmp_path / "out")
    assert all(not r.signal and r.metrics.nll is None for r in results.values())
    assert results["full_reuse", None].metrics.kl.mean > 0  # pyright: ignore[reportOptionalMemberAccess]
    assert results["epic", 0.15].metrics.flip_rate is not None


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
    capsys.readouterr()
    assert cli.main(arguments(short_model, path, tmp_path / "out", method="epic")) == 2
    error = one_line_error(capsys)
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


def test_other_errors_of_ours_end_with_1(model, data, tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert cli.main(arguments(model, data, blocked, method="epic")) == 1
    assert str(blocked) in capsys.readouterr().err
