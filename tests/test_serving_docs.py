"""README's Serve section and docs/serving.md, followed to the letter: a blended answer, and metrics that prove it."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from servers import free_port

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: make test says why", allow_module_level=True)

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text().partition("\n## Serve\n")[2].partition("\n## ")[0]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A function that gives the docs' commands this test's port; its server is started as the README says."""
    folder, port = tmp_path_factory.mktemp("serve"), str(free_port())

    def here(text: str) -> str:
        return text.replace("8000", port).replace("/tmp/kv", str(folder / "kv"))

    (command,) = re.findall(r"^ {4}(lmcache-blend serve .*)$", README, re.MULTILINE)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with open(folder / "log", "wb") as log:
        server = subprocess.Popen(
            here(command), shell=True, stdout=log, stderr=log, start_new_session=True, env={**os.environ, "PATH": path}
        )
    try:
        end = time.monotonic() + 240
        while True:
            assert server.poll() is None, (folder / "log").read_text()[-3000:]
            assert time.monotonic() < end, (folder / "log").read_text()[-3000:]
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.5)
        yield here
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def shell(commands: str) -> list[str]:
    done = subprocess.run(["bash", "-euc", commands], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.strip()]


def check(answers: list[dict], metrics: list[str]) -> None:
    first, second = answers
    assert "clocks" in first["choices"][0]["text"]
    assert "market" in second["choices"][0]["text"]
    report = second["kv_transfer_params"]["lmcache_blend"]
    assert report["segment"] > 40
    assert 0 < report["recomputed"] < report["segment"]
    (line,) = [m for m in metrics if 'kind="segment"' in m]
    assert float(line.rpartition(" ")[2]) >= report["segment"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl to run the README's commands")
def test_readme(served):
    block = "\n".join(re.findall(r"^ {4}((?:P1|P2|ask|curl|  ).*)$", README, re.MULTILINE))
    lines = shell(served(block))
    check([json.loads(line) for line in lines if line.startswith("{")], [x for x in lines if not x.startswith("{")])


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl to run the commands of the docs")
def test_docs(served):
    blocks = re.findall(r"<!-- run -->\n```sh\n(.*?)```", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL)
    first, second, metrics = (shell(served(block)) for block in blocks)
    check([json.loads(first[0]), json.loads(second[0])], metrics)
