"""The vLLM backend of `lmcache-blend run` and a real server under load and faults; skipped where there is no vLLM."""

import importlib.util
import json
import subprocess
import sys

import pytest

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: make test says why", allow_module_level=True)

import serving_faults
from soak_serving import soak
from vllm_server import VllmServer, request

from lmcache_blend.cli import main
from lmcache_blend.eval.boards import make_boards
from lmcache_blend.eval.options import RunRequest, route_options
from lmcache_blend.eval.writer import find_folders, read_folder

METHODS = "full_recompute,full_reuse,epic"
TASK = ["--model", "smollm2-135m", "--task", "people_qa", "--limit", "2"]
TASK += ["--option", "passages=5", "--option", "max_new_tokens=6"]
RATIOS = ["--recompute-ratio", "0.15,1.0"]


@pytest.fixture(scope="module")
def server():
    flags = ("--logits-processors", "lmcache_blend.serving.forced:ForcedTokens")
    started = VllmServer("--max-model-len", "2048", *flags).start()
    yield started
    started.close()


def results(folder) -> dict:
    found = {}
    for path in find_folders(folder):
        one = read_folder(path)
        assert one is not None
        found[one.method, one.recompute_ratio] = one
    return found


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    assert main(["run", *TASK, *RATIOS, "--method", METHODS, "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """In a process of its own, so that vLLM's leaves with it."""
    folder = tmp_path_factory.mktemp("vllm")
    options = ["--backend", "vllm", "--option", "enforce_eager=true", "--option", "concurrency=2"]
    command = [sys.executable, "-m", "lmcache_blend.cli", "run", *TASK, *RATIOS, "--method", METHODS, *options]
    done = subprocess.run([*command, "--output", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_offline_agrees_with_the_hf_runner(hf, offline):
    ours, theirs = results(offline), results(hf)
    assert ours.keys() == theirs.keys()
    for name, one in ours.items():
        other = theirs[name]
        assert one.backend == "vllm"
        assert one.n == other.n == 2
        assert one.metrics.nll_full.mean == pytest.approx(other.metrics.nll_full.mean, abs=1e-3)
        assert one.metrics.nll_no_context.mean == pytest.approx(other.metrics.nll_no_context.mean, abs=1e-3)
        assert one.metrics.nll.mean == pytest.approx(other.metrics.nll.mean, abs=2e-2)
        assert one.metrics.kl.mean == pytest.approx(other.metrics.kl.mean, abs=2e-2)
        # The HF runner takes the instructions as an exact prefix; they are shorter than a block of vLLM's, so here they
        # are a segment like any other, of which the policy's share is computed.
        assert one.compute_fraction == pytest.approx(other.compute_fraction, abs=0.03)
        assert one.recomputed_fraction == pytest.approx(other.recomputed_fraction, abs=0.1)


def test_ratio_one_is_full_prefill_and_full_reuse_is_not(offline):
    found = results(offline)
    assert found["epic", 1.0].metrics.kl.mean < 1e-4
    assert found["epic", 1.0].metrics.top1_agreement.mean == 1
    assert found["full_reuse", None].metrics.kl.mean > 1e-2
    assert found["full_reuse", None].compute_fraction < found["epic", 0.15].compute_fraction < 0.5


def test_times_and_throughput_are_filled(offline):
    for one in results(offline).values():
        assert 0 < one.ttft_ms.median <= one.ttft_ms.p95 <= one.ttft_ms.p99
        assert one.latency_ms.median >= one.ttft_ms.median
        assert one.queries_per_second > 0
        assert one.config.serving == {"concurrency": 2, "enforce_eager": True}
        assert "vllm" in one.versions


def test_rows_of_both_backends_stand_in_one_table(hf, offline, capsys):
    paths = [*find_folders(hf), *find_folders(offline)]
    (board,) = make_boards([(path, read_folder(path)) for path in paths])
    labels = [row.label for row in board.rows]
    assert any("vllm" in label for label in labels)
    assert any("vllm" not in label for label in labels)


def test_a_server_gives_the_same_without_kl(server, offline, tmp_path):
    options = ["--backend", "vllm", "--option", f"server={server.url}"]
    assert main(["run", *TASK, *RATIOS, "--method", METHODS, *options, "--output", str(tmp_path)]) == 0
    for name, one in results(tmp_path).items():
        other = results(offline)[name]
        assert one.metrics.kl is None
        assert one.metrics.nll.mean == pytest.approx(other.metrics.nll.mean, abs=2e-2)
        assert one.metrics.nll_full.mean == pytest.approx(other.metrics.nll_full.mean, abs=1e-3)


def test_a_short_soak(server):
    found = soak(server, 30, 8)
    assert found["failures"] == []
    assert found["running"] == found["waiting"] == found["blocks_in_use"] == 0
    assert found["errors"] == 0
    first, second = found["halves"]
    assert second["hit_rate"] >= 0.8 * first["hit_rate"] > 0
    assert second["rss_bytes"] < 1.2 * first["rss_bytes"]


def test_forced_tokens_must_be_token_ids(server):
    body = server.client()._body(request([1, 2, 3], [], None))
    body["vllm_xargs"] = {"lmcache_blend_forced": "no list"}
    for name in ("stream", "stream_options"):  # a stream has begun before the field is looked at
        body.pop(name, None)
    import urllib.error
    import urllib.request

    post = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(post)
    assert error.value.code == 400


def test_killed_and_started_again_on_the_same_directory():
    rounds = serving_faults.kill()
    assert rounds.wrong == []


def test_a_killed_redis_fails_no_request():
    pytest.importorskip("redis")
    rounds = serving_faults.redis()
    assert rounds.wrong == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "oracle"], ["oracle", "--backend hf"]),
        (["--method", "epic", "--encode", "bos"], ["--encode bos"]),
        (["--method", "epic", "--codec", "raw,int8"], ["one codec"]),
        (["--method", "epic", "--option", "concurrency=0"], ["concurrency"]),
        (["--method", "epic", "--option", "server=http://x", "--codec", "int8"], ["codec"]),
        (["--method", "epic", "--option", "concurency=2"], ["concurency", "concurrency"]),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(arguments, words, capsys, tmp_path):
    assert main(["run", *TASK, *arguments, "--backend", "vllm", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in words:
        assert word in error


def test_options_of_the_server_belong_to_this_backend_alone():
    options = {"concurrency": 4}
    assert route_options(options, ["epic"], "people_qa", "vllm").serving.concurrency == 4
    with pytest.raises(ValueError, match="concurrency"):
        route_options(options, ["epic"], "people_qa", "hf")
    assert RunRequest(model="m", task="t", methods=("epic",), output="o").backend == "hf"  # type: ignore[arg-type]
