"""Results on disk: what is written is read back, torn files are mended, a full disk costs nothing."""

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmcache_blend.errors import ConfigError, DataError, ResultsError
from lmcache_blend.eval.aggregate import aggregate
from lmcache_blend.eval.results import Results, RunConfig, SampleResult, Skipped
from lmcache_blend.eval.writer import (
    RESULTS,
    SAMPLES,
    RunFolder,
    find_folders,
    read_folder,
    read_samples,
    write_atomic,
)

FIXED_FIELDS = set(
    [
        "task",
        "model",
        "method",
        "recompute_ratio",
        "codec",
        "backend",
        "n",
        "signal",
        "metrics",
        "ttft_ms",
        "ttft_full_ms",
        "compute_fraction",
        "recomputed_fraction",
        "loaded_bytes",
        "raw_kv_bytes",
        "bits_per_element",
        "versions",
    ]
)
FIXED_METRICS = set(
    [
        "nll",
        "nll_full",
        "nll_no_context",
        "quality",
        "kl",
        "top1_agreement",
        "flip_rate",
        "f1",
        "em",
        "rouge_l",
    ]
)


def config(**changes) -> RunConfig:
    settings = {
        "task": "squad",
        "model": "org/name",
        "fingerprint": "ab",
        "method": "epic",
        "max_new_tokens": 8,
    }
    return RunConfig(**{"recompute_ratio": 0.15, **settings, **changes})


def sample(i: int, **changes) -> SampleResult:
    fields = {
        "id": f"s{i}",
        "prompt_sha256": f"{i:016x}",
        "tokens": 100 + i,
        "answers": ["Oslo"],
        "prediction": "Oslo",
        "prediction_full": "Oslo",
        "nll": 1.0 + 0.01 * i,
        "nll_full": 0.9 + 0.01 * i,
        "nll_no_context": 2.0 + 0.02 * i,
        "kl": 0.1,
        "top1_agreement": 0.9,
        "flip": i % 2 == 0,
        "f1": 0.5,
        "em": 0.0,
        "rouge_l": 0.5,
        "contains": 1.0,
        "f1_full": 0.6,
        "ttft_ms": 20.0 + i,
        "ttft_full_ms": 100.0 + i,
        "rows": [15, 15],
        "compute_fraction": 0.15,
        "recomputed_fraction": 0.15,
        "loaded_bytes": 4000,
        "loaded_kv_bytes": 2000,
        "raw_kv_bytes": 2000,
        "stages_ms": {"load": 1.0, "forward": 19.0 + i},
    }
    return SampleResult(**{**fields, **changes})


def filled(output: Path, n: int = 6, **changes) -> RunFolder:
    folder = RunFolder(output, config(**changes))
    for i in range(n):
        folder.append(sample(i))
    return folder


def test_fields_that_users_rely_on():
    assert set(Results.model_fields) >= FIXED_FIELDS
    results = aggregate(config(), [sample(i) for i in range(4)])
    assert set(results.metrics.model_dump()) >= FIXED_METRICS
    assert all(set(m) == {"mean", "low", "high"} for m in results.metrics.model_dump().values())
    assert {"median", "p95"} <= set(results.ttft_ms.model_dump()) & set(results.ttft_full_ms.model_dump())
    assert {"id", "prediction", "answers", "nll", "kl", "ttft_ms", "rows"} <= set(SampleResult.model_fields)


def test_numbers():
    results = aggregate(config(), [sample(i) for i in range(5)])
    assert results.n == 5
    assert results.signal
    # sums: no context 10.2, method 5.1, full 4.6
    assert results.metrics.quality is not None
    assert results.metrics.quality.mean == pytest.approx(5.1 / 5.6)
    assert results.metrics.flip_rate is not None
    assert results.metrics.flip_rate.mean == pytest.approx(3 / 5)
    assert (results.ttft_ms.median, results.ttft_full_ms.median) == (22.0, 102.0)
    assert results.ttft_ratio.mean == pytest.approx(22 / 102)
    assert results.ttft_ratio.low <= results.ttft_ratio.mean <= results.ttft_ratio.high
    assert results.bits_per_element == pytest.approx(32.0)  # twice the bytes of 16 bit
    assert results.stages_ms == pytest.approx({"load": 1.0, "forward": 21.0})


def test_fidelity_sets_have_no_answers_and_no_signal():
    none = {"answers": [], "nll": None, "nll_full": None, "nll_no_context": None, "f1": None, "em": None}
    results = aggregate(config(), [sample(i, **none) for i in range(3)])
    assert not results.signal
    assert not results.has_answers
    assert results.metrics.quality is None
    assert results.metrics.nll is None
    assert results.metrics.kl is not None
    Results.model_validate_json(results.model_dump_json())


def test_a_task_that_context_does_not_help_has_no_signal():
    results = aggregate(config(), [sample(i, nll_no_context=0.9 + 0.01 * i + (-1) ** i * 0.1) for i in range(6)])
    assert not results.signal


def test_round_trip(tmp_path: Path):
    folder = filled(tmp_path)
    written = aggregate(
        folder.config,
        list(folder.samples.values()),
        skipped=[Skipped(id="x", tokens=9, limit=8)],
        complete=True,
        versions={"python": "3", "threads": 2},
    )
    folder.write_results(written)
    assert read_folder(folder.path) == written
    assert RunFolder(tmp_path, config()).samples == folder.samples
    assert find_folders(tmp_path) == [folder.path]
    json.loads((folder.path / RESULTS).read_text())


def test_the_folder_name_is_the_combination_and_not_the_limit(tmp_path: Path):
    assert config().folder.startswith("squad__org--name__epic__")
    assert len(config().folder.rsplit("__", 1)[1]) == 8
    assert config().folder == config().folder
    assert len({config(**c).folder for c in ({}, {"seed": 1}, {"recompute_ratio": 0.3}, {"encode": "bos"})}) == 4
    assert "limit" not in RunConfig.model_fields


def test_a_torn_last_line_is_dropped_and_written_anew(tmp_path: Path):
    folder = filled(tmp_path)
    path = folder.path / SAMPLES
    whole = path.read_bytes()
    os.truncate(path, len(whole) - 30)
    assert len(read_samples(path)[0]) == 5
    again = RunFolder(tmp_path, config())
    assert not again.has("s5", sample(5).prompt_sha256)
    again.append(sample(5))
    assert path.read_bytes() == whole


def test_a_line_broken_inside_is_an_error_with_its_number(tmp_path: Path):
    path = filled(tmp_path).path / SAMPLES
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:40], *lines[2:]]) + "\n")
    with pytest.raises(DataError, match=r"samples\.jsonl, line 2"):
        RunFolder(tmp_path, config())


def test_a_changed_prompt_is_measured_anew_and_the_last_line_counts(tmp_path: Path):
    folder = filled(tmp_path)
    assert folder.has("s1", sample(1).prompt_sha256)
    assert not folder.has("s1", "other")
    folder.append(sample(1, prompt_sha256="other", kl=0.7))
    samples, _ = read_samples(folder.path / SAMPLES)
    assert len(samples) == 6
    assert samples["s1"].kl == 0.7


def test_results_older_than_the_samples_are_computed_from_them(tmp_path: Path):
    folder = filled(tmp_path, 3)
    assert read_folder(folder.path).n == 3  # pyright: ignore[reportOptionalMemberAccess]
    folder.write_results(aggregate(folder.config, list(folder.samples.values()), complete=True))
    folder.append(sample(3))
    stale = read_folder(folder.path)
    assert stale is not None
    assert (stale.n, stale.complete) == (4, False)


def test_no_results(tmp_path: Path):
    with pytest.raises(ConfigError, match="no results below"):
        find_folders(tmp_path)
    with pytest.raises(ConfigError, match="not a folder"):
        find_folders(tmp_path / "missing")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 kB, where this process may mount one."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def append_many(folder: RunFolder, n: int) -> None:
    for i in range(n):
        folder.append(sample(i))


def test_a_full_disk_keeps_whole_lines(small_disk: Path):
    folder = RunFolder(small_disk, config())
    with pytest.raises(ResultsError, match=r"No space left.*free space.*intact"):
        append_many(folder, 1000)
    kept, good = read_samples(folder.path / SAMPLES)
    assert list(kept) == list(folder.samples)
    assert good == (folder.path / SAMPLES).stat().st_size
    with pytest.raises(ResultsError, match="cannot write"):
        folder.write_results(aggregate(folder.config, [sample(i) for i in range(4)]))
    assert not list(folder.path.glob(".*"))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str):
    path = tmp_path / "results.json"
    write_atomic(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(ResultsError, match="free space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failing_append_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = filled(tmp_path, 2)
    before = (folder.path / SAMPLES).read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResultsError, match="free space"):
        folder.append(sample(2))
    assert (folder.path / SAMPLES).read_bytes() == before
    assert "s2" not in folder.samples
