"""The command line: listing, and bad input, which ends with status 2 and one line."""

import json
import re

import pytest
from tiny import one_line_error, write_data

from lmcache_blend import cli


@pytest.mark.parametrize(
    ("kind", "some"),
    [
        ("tasks", {"needle", "people_qa", "hotpotqa"}),
        (
            "methods",
            {"full_recompute", "prefix_cache", "full_reuse", "random", "epic", "cacheblend", "oracle"},
        ),
        ("codecs", {"raw"}),
        ("tiers", {"cpu", "disk", "redis", "rediss", "s3", "file"}),
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
    settings = {
        "--model": "no-such-model",
        "--task": "needle",
        "--method": "cacheblend",
        "--output": str(tmp_path),
    }
    command = ["run", *(word for pair in {**settings, **changes}.items() for word in pair)]
    try:
        status = cli.main(command)
    except SystemExit as error:
        status = error.code
    assert status == 2
    error = one_line_error(capsys)
    assert re.search(message, error), error
    assert list(tmp_path.iterdir()) == []


def test_a_broken_data_line_is_named(tmp_path, capsys):
    path = write_data(tmp_path / "tales.jsonl", 2)
    path.write_text(path.read_text() + '{"id": "q2", "question": \n')
    command = ["run", "--model", "no-such-model", "--task", "tales", "--data", str(path), "--method", "epic"]
    assert cli.main([*command, "--output", str(tmp_path / "out")]) == 2
    error = one_line_error(capsys)
    assert "tales.jsonl" in error
    assert "3" in error


def test_a_model_that_is_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert (
        cli.main(["run", "--model", "./no-such-folder", "--task", "needle", "--method", "epic", "--output", "x"]) == 2
    )
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
