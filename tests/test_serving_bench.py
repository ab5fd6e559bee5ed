"""serving_bench without vLLM: ratios, the table, bad input, and peers that do not run or do not end."""

import contextlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lmcache_blend.eval import serving_bench, serving_peer
from lmcache_blend.eval.serving_bench import Runs, main, offload, ratio
from lmcache_blend.eval.serving_jobs import JobError, reason, result_of
from lmcache_blend.eval.serving_table import table

PROMPTS = [[1, 2, 3], [4, 5, 6]]


def result(*ttft_ms: float, answers: str = "ab", cached: int = 0) -> dict:
    return {"ttft_ms": list(ttft_ms), "answers": list(answers), "cached_tokens": [cached] * len(ttft_ms)}


def program(folder: Path, body: str) -> str:
    """An interpreter that is none: whatever script it is given, it does `body` in sh."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_ratios_are_medians_of_per_prompt_ratios():
    assert ratio([9.0, 1.0, 4.0], [1.0, 10.0, 100.0]) == 0.1  # the medians' own ratio is 4 / 10
    with pytest.raises(ValueError, match="longer than"):
        ratio([1.0], [1.0, 2.0])


def test_runs_are_compared_with_plain_of_their_own_round():
    runs = Runs()
    runs.add("plain", result(10.0, 100.0))
    for name, ms in (("cold", (12.0, 110.0)), ("warm", (1.0, 5.0)), ("lmcache_cold", (10.0, 100.0))):
        runs.add(name, result(*ms))
    runs.add("lmcache_warm", result(3.0, 20.0, answers="ax", cached=1792))
    out = runs.summary()
    assert (out["warm_ttft_ratio"], out["lmcache_warm_ttft_ratio"]) == (0.075, 0.25)
    assert (out["identical_answers"], out["lmcache_identical_answers"]) == (True, False)
    assert out["lmcache_warm_cached_tokens"] == 1792
    runs.add("plain", result(10.0, 100.0, answers="cd"))
    runs.add("cold", result(10.0, 100.0, answers="cd"))
    runs.add("warm", result(2.0, 20.0))
    runs.drop("lmcache_")
    out = runs.summary()
    assert out["identical_answers"] is False
    assert out["warm_ttft_ratio"] == pytest.approx(0.15)
    assert not any("lmcache" in name for name in out)


def test_a_process_without_a_result_says_why():
    with pytest.raises(JobError, match="No module named 'vllm'") as caught:
        result_of("starting\n", "Traceback\nModuleNotFoundError: No module named 'vllm'\nsys:1: leaked\n")
    assert "leaked" in caught.value.output
    assert reason([]) == "it ended without a word"


@pytest.mark.parametrize(
    ("python", "why"),
    [
        ("/nonexistent/python", "cannot run /nonexistent/python: No such file"),
        ("sh:echo 'ImportError: no lmcache' >&2; exit 1", "server ended: ImportError: no lmcache"),
        (sys.executable, "server ended: .*lmcache"),
    ],
)
def test_a_peer_that_does_not_run_gives_the_reason_and_the_bench_goes_on(monkeypatch, tmp_path, python, why):
    """Only the engines of this package are played; the peer's processes are real."""

    def played(kind: str, job: dict) -> dict:
        if "extra" not in job:
            return result(10.0, 10.0)
        (Path(job["extra"]["tiers"][0]["path"]) / "kv").write_bytes(bytes(100))
        return result(2.0, 3.0)

    monkeypatch.setattr(serving_bench, "child", played)
    if python.startswith("sh:"):
        python = program(tmp_path, python[3:])
    out = offload("model", PROMPTS, [1], None, 2, (python, 256))
    assert re.search(why, out["lmcache_error"])
    assert out["warm_ttft_ratio"] == 0.25
    assert out["raw_bytes"] == 100
    assert not any(name.startswith("lmcache_") for name in out if name != "lmcache_error")
    shown = table({"model": "m", "tokens": 2000, "prompts": 2, "rounds": 2, "offload": out})
    assert "LMCache did not run" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_a_peer_that_found_nothing_is_no_measurement(tmp_path):
    """Warm without one token reused would be a second cold run."""
    listen = "import socket, sys, time; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); time.sleep(600)"
    found = json.dumps(result(1.0, 1.0))
    body = f"""if [ "$2" = serve ]; then exec {sys.executable} -c "{listen}" "$3"; fi; echo 'RESULT {found}'"""
    with pytest.raises(JobError, match="found nothing"):
        serving_peer.turn(program(tmp_path, body), {"model": "m", "prompts": PROMPTS, "warm_up": [1]}, 100, 30.0)


def test_the_server_is_dead_afterwards_with_all_that_it_started(tmp_path):
    """A server of which a child answers, which ignores every polite signal."""
    listen = (
        "import os, signal, socket, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); time.sleep(600)"
    )
    pids = tmp_path / "pids"
    body = f'trap "" TERM; {sys.executable} -c "{listen}" "$3" & echo $$ $! > {pids}; wait'
    with contextlib.suppress(KeyboardInterrupt), serving_peer.server(program(tmp_path, body), 1, 256):
        running = [int(pid) for pid in pids.read_text().split()]
        assert len(running) == 2
        assert all(alive(pid) for pid in running)
        raise KeyboardInterrupt
    patience = time.monotonic() + 10
    while any(alive(pid) for pid in running) and time.monotonic() < patience:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in running)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_an_engine_that_hangs_is_ended(tmp_path):
    began = time.monotonic()
    with pytest.raises(JobError, match="did not finish within 1 s"):
        serving_peer.client(program(tmp_path, "sleep 600"), {"prompts": PROMPTS}, 1.0)
    assert time.monotonic() - began < 30


def test_a_result_of_the_peer_comes_back_and_its_shared_memory_goes(tmp_path):
    body = f"touch /dev/shm/lmcache_kv_$$_0; echo $$ > {tmp_path}/pid; echo RESULT $(cat $3)"
    assert serving_peer.client(program(tmp_path, body), {"port": 7}, 30.0) == {"port": 7}
    assert not Path(f"/dev/shm/lmcache_kv_{(tmp_path / 'pid').read_text().strip()}_0").exists()


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--model", "/no/model", "--data", "x"], "no folder '/no/model'"),
        (["--data", "x"], "required"),
        (["--model", "m", "--data", "x", "--parts", "offlaod"], "offload"),
        (["--model", "m", "--data", "x", "--rounds", "0"], "--rounds is 0"),
        (["--model", "m", "--data", "x", "--parts", "exact", "--lmcache-python", "p"], "part offload"),
        (["--model", "m", "--data", "x", "--codec", "zipp"], "zipp"),
    ],
)
def test_bad_input_is_one_line_and_status_2(flags, why):
    done = subprocess.run(
        [sys.executable, "-m", "lmcache_blend.eval.serving_bench", *flags], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert why in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_data_and_tokenizer_that_do_not_exist_are_named(tmp_path, capsys):
    pytest.importorskip("vllm")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    data = tmp_path / "data.jsonl"
    for why in ("data.jsonl: No such file", "holds no tokenizer"):
        assert main(["--model", str(tmp_path), "--data", str(data)]) == 2
        said = capsys.readouterr().err
        assert why in said
        assert len(said.splitlines()) == 1
        row = {"id": "1", "task": "qa", "question": "Who?", "contexts": ["Nobody."], "answers": ["x"]}
        data.write_text(json.dumps(row))
