"""`lmcache-blend codec fit` and `codec bench` end to end on a tiny random model, and the figures that they print."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import build_model, one_line_error, passage

from lmcache_blend import cli
from lmcache_blend.codecs import Profile
from lmcache_blend.eval import codec_bench
from lmcache_blend.eval.codec_bench import rates
from lmcache_blend.eval.coder_bench import CODERS, bench_coders
from lmcache_blend.eval.texts import documents, windows
from lmcache_blend.hf import load_runner
from lmcache_blend.hf.calibrate import text_digest
from lmcache_blend.types import KVChunk

FIELDS = {"codec", "model", "data", "context_tokens", "bits_per_element", "kl", "top1_agreement", "delta_nll"}
FIELDS |= {"encode_mb_s", "decode_mb_s", "threads", "layer_bits", "layer_error_k", "layer_error_v", "coders"}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMCACHE_BLEND_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(build_model(tmp_path_factory.mktemp("models") / "tiny", 1024))


def write_text(folder: Path, name: str, first: int) -> str:
    for part in range(8):
        lines = [passage(first + 100 * part + i) for i in range(60)]
        (folder / name).mkdir(exist_ok=True)
        (folder / name / f"{part}.txt").write_text("\n".join(lines))
    return str(folder / name)


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> tuple[str, str]:
    """A text to fit on and one to measure on."""
    folder = tmp_path_factory.mktemp("texts")
    return write_text(folder, "fit", 0), write_text(folder, "fresh", 5000)


@pytest.fixture(scope="module", params=["fisher_klt", "fisher_diagonal", "kvtc", "cachegen"])
def profile(request, model, texts, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("profiles") / request.param
    command = ["codec", "fit", "--model", model, "--data", texts[0], "--codec", request.param, "--output", str(path)]
    assert cli.main([*command, "--tokens", "1600", "--context-tokens", "200"]) == 0
    return path


def bench(model, data, codecs, *more) -> int:
    return cli.main(
        ["codec", "bench", "--model", model, "--data", data, "--codecs", codecs, "--context-tokens", "200", *more]
    )


def test_a_fitted_codec_is_measured_on_fresh_text(model, texts, profile, tmp_path, capsys):
    codec = Profile.load(profile).codec
    mode = {"cachegen": {"mode": "paper"}, "kvtc": {"recent": 0, "bits": 4}}.get(codec, {})
    specs = [{"id": codec, "profile": str(profile), **mode}, {"id": "raw", "dtype": "bfloat16"}, {"id": "int4"}]
    out = tmp_path / "rows.json"
    plots = ["--json", str(out), "--plots", str(tmp_path / "plots")]
    assert bench(model, texts[1], ",".join(map(json.dumps, specs)), "--limit", "2", *plots) == 0
    fitted, raw, int4 = json.loads(out.read_text())
    assert set(raw) >= FIELDS
    assert len(raw["layer_bits"]) == 4
    assert raw["bits_per_element"] == pytest.approx(16, rel=0.05)
    assert 0 < raw["kl"] < 1e-3 < int4["kl"]
    assert fitted["bits_per_element"] < raw["bits_per_element"] / 2
    assert fitted["kl"] < 0.5
    assert max(raw["layer_error_k"]) < 0.01 < min(int4["layer_error_k"])
    assert {p.name for p in (tmp_path / "plots").iterdir()} == {"rate_kl.png", "layers.png"}
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("bits", "torchac", "constriction", "zstd"))


def test_text_of_the_fit_is_left_out(model, texts, profile, monkeypatch):
    codec = Profile.load(profile).codec
    spec = {"id": codec, "profile": str(profile), **({"mode": "paper"} if codec == "cachegen" else {})}
    measured = []

    class Seen(codec_bench.Document):
        def __init__(self, runner, window, context):
            measured.append(text_digest(window))
            super().__init__(runner, window, context)

    monkeypatch.setattr(codec_bench, "Document", Seen)
    runner = load_runner(model, dtype="float32")
    first = windows(documents(texts[0]), runner.tokenizer, 296, 8)
    used = Profile.load(profile).texts
    assert {text_digest(w) for w in first} > used, "one of the first eight was left out of the fit"
    codec_bench.bench(runner, [texts[0]], [spec], 200, limit=8, repeat=1)
    assert len(set(measured)) == 8
    assert not used & set(measured)


def test_kl_between_two_settings_is_interpolated_on_a_log_scale():
    def row(step, kl, bits, data="a"):
        return {"codec": {"id": "hadamard", "step": step}, "data": data, "kl": kl, "bits_per_element": bits}

    rows = [row(0.1, 0.001, 4.0), row(0.4, 0.1, 2.0), row(0.1, 0.002, 4.0, "b"), row(0.4, 0.008, 2.0, "b")]
    assert rates(rows, 0.01)["hadamard"] == {"a": pytest.approx(3.0)}
    both = rates(rows, 0.004)["hadamard"]
    assert both["mean"] == pytest.approx((both["a"] + 3.0) / 2)
    assert rates(rows, 0.5) == {}


def test_every_coder_decodes_what_it_coded_and_one_that_is_missing_says_so(monkeypatch):
    torch.manual_seed(0)
    layers = tuple((torch.randn(2, 40, 16), torch.randn(2, 40, 16)) for _ in range(3))
    monkeypatch.setitem(sys.modules, "constriction", None)
    rows = {row["coder"]: row for row in bench_coders(KVChunk(torch.arange(40), layers), repeat=2)}
    assert list(rows) == list(CODERS)
    assert "not run" in rows["constriction, table per layer"]["note"]
    shared = rows["rans, shared tables"]
    assert shared["decode_ratio"] == 1
    assert all(np.isfinite(r["decode_mb_s"]) and 1 < r["bits_per_symbol"] < 8 for r in rows.values() if "note" not in r)


def test_a_compile_that_was_killed_stops_no_later_one(tmp_path, monkeypatch):
    """torch's lock file for extensions outlives its process."""
    pytest.importorskip("ninja")
    if importlib.util.find_spec("torchac") is None:
        pytest.skip("torchac is not installed")
    monkeypatch.setenv("LMCACHE_BLEND_CACHE", str(tmp_path))
    left = tmp_path / "torchac" / torch.__version__ / "torchac_backend" / "lock"
    left.parent.mkdir(parents=True)
    left.touch()
    code = "from lmcache_blend.eval.coder_bench import _import_torchac; _import_torchac()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)
    assert not left.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--limit", "0"], "limit = 0"),
        (["--repeat", "0"], "repeat = 0"),
        (["--context-tokens", "5000"], "context_tokens = 5000: choose 1 to 928"),
    ],
)
def test_bad_settings_are_one_line(model, texts, more, message, capsys):
    assert bench(model, texts[1], "int4", *more) == 2
    assert message in one_line_error(capsys)


def test_the_default_text_has_documents_of_several_kinds():
    found = documents("default")
    assert len(found) > 40
    assert any("import_stmt" in text for text in found)
    assert any("def " in text and "class " in text for text in found)
