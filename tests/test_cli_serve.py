"""`lmcache-blend serve` without a server: the command that it prints, what it refuses, and the repairs for CPU."""

import json
import shlex
import subprocess
import sys
from importlib import metadata

import pytest

from lmcache_blend.cli import main
from lmcache_blend.serving import cpu_setup, launch

CPU_VARIABLES = (
    "VLLM_CPU_OMP_THREADS_BIND",
    "OMP_NUM_THREADS",
    "VLLM_CPU_KVCACHE_SPACE",
    "VLLM_NO_USAGE_STATS",
    "HF_HUB_OFFLINE",
)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(launch, "on_cpu", lambda: True)
    for name in CPU_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(launch, "on_cpu", lambda: False)


def printed(capsys, *arguments: str) -> tuple[dict[str, str], list[str], dict]:
    """Variables, arguments and the connector's configuration of a dry run."""
    assert main(["serve", *arguments, "--dry-run"]) == 0
    words = shlex.split(capsys.readouterr().out)
    at = words.index("vllm")
    command = words[at + 1 :]
    config = json.loads(command[command.index("--kv-transfer-config") + 1])
    return dict(word.split("=", 1) for word in words[:at]), command, config


def test_flags_of_vllm_go_through_in_order(capsys, on_gpu):
    flags = ["--max-model-len", "4096", "--enforce-eager", "--port=8123", "--override-x", '{"a": 1}']
    variables, command, config = printed(capsys, "org/model", *flags)
    assert variables == {}
    assert command[: 2 + len(flags)] == ["serve", "org/model", *flags]
    assert config["kv_connector"] == "LMCacheBlendConnector"
    assert config["kv_role"] == "kv_both"
    assert config["kv_load_failure_policy"] == "recompute"


def test_own_options_become_the_connectors_settings(capsys, on_gpu, tmp_path):
    _, command, config = printed(
        capsys,
        "org/model",
        *("--disk", str(tmp_path), "--cpu-gib", "0.5", "--remote", "redis://h:1/0"),
        *("--codec", '{"id": "int8"}', "--policy", "epic", "--recompute-ratio", "0.2"),
        *("--separator", " ## ", "--match", "content"),
    )
    assert config["kv_connector_extra_config"] == {
        "tiers": [
            {"tier": "cpu", "capacity_bytes": 1 << 29},
            {"tier": "disk", "path": str(tmp_path)},
            {"tier": "redis://h:1/0"},
        ],
        "codec": {"id": "int8"},
        "blend": {"policy": "epic", "recompute_ratio": 0.2, "separator": " ## ", "match": "content"},
    }
    assert "--disk" not in command


def test_offload_has_no_blend_settings(capsys, on_gpu):
    _, _, config = printed(capsys, "org/model", "--preset", "offload", "--codec", "lossless")
    assert "blend" not in config["kv_connector_extra_config"]
    assert config["kv_connector_extra_config"]["codec"] == "lossless"


def test_cpu_gets_its_variables_and_dtype(capsys, on_cpu):
    variables, command, _ = printed(capsys, "org/model")
    assert variables["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert variables["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert "HF_HUB_OFFLINE" not in variables
    assert command[command.index("--dtype") + 1] == "float32"


@pytest.mark.parametrize("flag", [["--dtype", "bfloat16"], ["--dtype=bfloat16"]])
def test_what_the_user_set_stays(capsys, on_cpu, monkeypatch, flag):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "8")
    variables, command, _ = printed(capsys, "org/model", *flag)
    assert "VLLM_CPU_KVCACHE_SPACE" not in variables
    assert "float32" not in command


def test_an_alias_is_served_under_its_name_from_its_folder(capsys, on_cpu):
    variables, command, _ = printed(capsys, "smollm2-135m")
    assert command[command.index("--served-model-name") + 1] == "smollm2-135m"
    assert variables["HF_HUB_OFFLINE"] == "1"
    _, command, _ = printed(capsys, "smollm2-135m", "--served-model-name", "mine")
    assert command.count("--served-model-name") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--policy", "epick"], ["epick", "epic"]),
        (["--codec", "cachegem"], ["cachegem", "cachegen"]),
        (["--recompute-ratio", "1.5"], ["recompute_ratio", "1.5"]),
        (["--cpu-gib", "0"], ["cpu_gib"]),
        (["--preset", "offload", "--match", "content"], ["--match", "--preset blend"]),
        (["--kv-transfer-config", "{}"], ["--kv-transfer-config", "vllm serve"]),
        (["--kv_transfer_config={}"], ["--kv-transfer-config"]),
        (["--remote", "redis://h/0", "--remote", "redis://i/0"], ["redis", "name"]),
    ],
)
def test_bad_input_is_one_line(capsys, on_gpu, arguments, words):
    assert main(["serve", "org/model", *arguments, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in words:
        assert word in error


def test_other_commands_still_refuse_unknown_flags(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["ls", "tasks", "--max-model-len", "4096"])
    assert stop.value.code == 2
    assert "unrecognized arguments: --max-model-len 4096" in capsys.readouterr().err


def test_without_vllm_there_is_one_error_with_the_remedy(capsys, monkeypatch):
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    assert main(["serve", "org/model"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install 'lmcache-blend[vllm]'" in error
    assert "cpu_setup" in error


def test_the_package_imports_without_vllm():
    code = (
        "import sys; sys.modules['vllm'] = None; import lmcache_blend.serving.launch, lmcache_blend.serving.cpu_setup"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_record_of_the_cpu_build_is_a_distribution_that_pip_can_remove(tmp_path):
    folder = cpu_setup.write_record(tmp_path, "0.32.0")
    assert cpu_setup.write_record(tmp_path, "0.32.0") == folder
    (found,) = metadata.distributions(name="vllm", path=[str(tmp_path)])
    assert found.version == "0.32.0+cpu"
    assert {str(file) for file in found.files or ()} == {f"{folder.name}/{f.name}" for f in folder.iterdir()}
