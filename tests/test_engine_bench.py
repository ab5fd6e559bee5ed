"""`lmcache-blend engine bench` on a few chunks: every row has its figures, against limits of the same run."""

import importlib.util
import json

import pytest
import servers
from tiny import one_line_error

from lmcache_blend import cli


def run(tmp_path, *more) -> dict:
    out = tmp_path / "rows.json"
    sizes = ["--bytes", "2097152", "--layers", "2", "--heads", "2", "--rounds", "1"]
    assert cli.main(["engine", "bench", *sizes, "--folder", str(tmp_path), "--json", str(out), *more]) == 0
    return {(row["tier"], row["operation"]): row for row in json.loads(out.read_text())}


def test_tiers_are_measured_against_limits_of_the_same_run(tmp_path, capsys):
    rows = run(tmp_path)
    assert set(rows) == {
        ("cpu", "store"), ("cpu", "retrieve"), ("cpu", "retrieve in place"), ("disk", "write"), ("disk", "read"),
        ("cpu", "lookup"),
    }  # fmt: skip
    assert rows.pop(("cpu", "lookup"))["chunks_per_s"] > 1000
    for row in rows.values():
        assert row["ratio"] == pytest.approx(row["bytes_per_s"] / row["limit_bytes_per_s"])
        assert row["chunks"] == 8
        assert row["ratio_min"] == row["ratio_max"] == pytest.approx(row["ratio"])  # of one round
    assert "memcpy" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("redis") is None, reason="redis-py is not installed")
def test_a_redis_tier_stands_beside_a_bare_client(tmp_path):
    server = servers.redis_server()
    try:
        rows = run(tmp_path, "--url", f"redis://{servers.LOOPBACK}:{server.port}/0")
    finally:
        server.close()
    for op in ("write", "read"):
        assert rows["redis", op]["limit"] == "bare pipelined client"
        assert rows["redis", op]["ratio"] > 0


def test_nothing_to_measure_is_one_line(capsys):
    assert cli.main(["engine", "bench", "--bytes", "1000"]) == 2
    assert "1000 bytes hold no chunk" in one_line_error(capsys)
