"""`lmcache-blend kernels`: what it writes, and its exit status on bad input and on a kernel that breaks a rule."""

import json
import sys

import pytest
from tiny import one_line_error

from lmcache_blend import cli
from lmcache_blend.triton_kernels import example as examples
from lmcache_blend.triton_kernels import measure

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton has wheels for Linux only")


def test_check_writes_a_row_per_kernel_and_target(tmp_path, capsys):
    out = tmp_path / "check.json"
    command = ["kernels", "check", "--targets", "sm90,gfx942", "--match", "^rans_decode$", "--json", str(out)]
    assert cli.main(command) == 0
    rows = json.loads(out.read_text())
    fields = {"kernel", "target", "ok", "registers", "spills", "shared_bytes", "loads_128", "tensor_core"}
    assert all(fields | {"instructions_per_symbol", "floor_us", "board"} <= set(row) for row in rows)
    assert {row["target"] for row in rows} == {"sm90", "gfx942"}
    decoder = next(r for r in rows if r["kernel"] == "rans_decode/decode_streams" and r["target"] == "sm90")
    assert 0 < decoder["instructions_per_symbol"] <= 1
    assert "sm90" in capsys.readouterr().out


def test_validate_and_bench_write_one_value(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "BUDGET_S", 0.01)
    for command, field in (("validate", "error_ratio"), ("bench", "ratio")):
        assert cli.main(["kernels", command, "--small", "--match", "^histogram$", "--json", "-"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["environment"]["copy_bytes_per_s"] > 0
        assert result["rows"][0][field] is not None
        assert result["rows"][0]["ms"] > 0


def test_a_wrong_kernel_fails_validation(monkeypatch, capsys):
    good = next(e for e in examples.examples() if e.name == "histogram")
    wrong = good.__class__(**{**vars(good), "run": lambda q, reach: good.run(q, reach) + 1})
    monkeypatch.setattr(measure, "chosen", lambda match: [wrong])
    monkeypatch.setattr(measure, "BUDGET_S", 0.01)
    assert cli.main(["kernels", "validate", "--json", "-"]) == 1
    captured = capsys.readouterr()
    assert "1 of 1 differ from their reference: histogram: 0." in captured.err
    assert not json.loads(captured.out)["rows"][0]["ok"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "--targets", "sm91"], "unknown target 'sm91': did you mean 'sm90'"),
        (["check", "--match", "no_such"], "no example matches 'no_such'"),
        (["validate", "--match", "no_such"], "no example matches 'no_such'"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    assert cli.main(["kernels", *arguments]) == 2
    assert message in one_line_error(capsys)
