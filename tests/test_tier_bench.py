"""`lmcache-blend engine blend`: TTFT from tiers behind simulated links."""

import json
import time

import pytest
from tiny import build_model, one_line_error

from lmcache_blend import cli
from lmcache_blend.eval.tier_bench import Link, crossings

KEYS = [bytes([i]) * 32 for i in range(4)]


def test_a_link_lets_no_more_through_than_its_speed():
    link = Link("cpu", gbit_s=0.08, capacity_bytes=8 << 20)  # 10 MB/s
    values = [[bytes(500_000)] for _ in KEYS]
    began = time.monotonic()
    assert link.put(KEYS, values) == [500_000] * 4
    assert time.monotonic() - began >= 0.2
    buffers = [bytearray(500_000) for _ in KEYS]
    began = time.monotonic()
    assert link.get(KEYS, [memoryview(b) for b in buffers]) == [500_000] * 4
    assert time.monotonic() - began >= 0.2
    link.gbit_s = float("inf")
    began = time.monotonic()
    link.get(KEYS, [memoryview(b) for b in buffers])
    assert time.monotonic() - began < 0.1


def test_crossings_lie_where_the_lines_meet():
    def row(codec, gbit_s, ratio):
        return {"tier": "disk", "codec": codec, "gbit_s": gbit_s, "ttft_ratio": ratio}

    # raw = .2 + .4 / speed, coded = .3 + .1 / speed: equal at 3 Gbit/s.
    rows = [row("raw", s, 0.2 + 0.4 / s) for s in (1, 5)] + [row("coded", s, 0.3 + 0.1 / s) for s in (1, 5)]
    rows += [row("raw", None, 0.2), row("coded", None, 0.3)]
    assert crossings(rows)["disk"] == [pytest.approx(3.0)]
    assert crossings([{**r, "ttft_ratio": r["ttft_ratio"] + 9 * (r["codec"] == "raw")} for r in rows])["disk"] == (
        "always coded"
    )


def test_blending_over_tiers_end_to_end(tmp_path, capsys):
    model = str(build_model(tmp_path / "tiny", 8192))
    out, plot = tmp_path / "rows.json", tmp_path / "plots" / "tiers.png"
    command = ["engine", "blend", "--model", model, "--rounds", "1", "--tokens", "400", "--codec", "int8"]
    assert cli.main([*command, "--links", "0.05,1", "--json", str(out), "--plot", str(plot)]) == 0
    rows = json.loads(out.read_text())
    assert {(r["tier"], r["codec"].split()[0], r["gbit_s"]) for r in rows} == {
        (tier, codec, speed) for tier in ("cpu", "disk") for codec in ("raw", "int8") for speed in (0.05, 1.0, None)
    }
    by = {(r["tier"], r["codec"].split()[0], r["gbit_s"]): r for r in rows}
    assert by["disk", "int8", None]["loaded_bytes"] < 0.7 * by["disk", "raw", None]["loaded_bytes"]
    for codec in ("raw", "int8"):
        slow = by["disk", codec, 0.05]
        assert slow["simulated_link"]
        assert slow["ttft_ms"] >= 8e3 * slow["loaded_bytes"] / 0.05e9
        assert slow["ttft_ratio"] > by["disk", codec, None]["ttft_ratio"]
    assert plot.stat().st_size > 10_000
    assert "0.05 Gbit/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"), [(["--links", "fast"], "links = 'fast'"), (["--rounds", "0"], "rounds = 0: must be above 0")]
)
def test_bad_settings_are_one_line(more, message, capsys):
    assert cli.main(["engine", "blend", *more]) == 2
    assert message in one_line_error(capsys)
