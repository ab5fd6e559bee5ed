"""Kernels without a GPU: interpreted in a process of its own, compiled for four GPUs, as torch operators on CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lmcache_blend.triton_kernels.example import Example, examples
from lmcache_blend.triton_kernels.launch import recording
from lmcache_blend.triton_kernels.measure import validate_example
from lmcache_blend.triton_kernels.targets import TARGETS

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
needs_triton = pytest.mark.skipif(sys.platform != "linux", reason="triton has wheels for Linux only")
each_example = pytest.mark.parametrize("example", examples() if sys.platform == "linux" else (), ids=lambda e: e.name)


@needs_triton
def test_kernels_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreted"],
        cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2_000:]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    """What `kernels check --json` writes, and that it ends well."""
    file = tmp_path_factory.mktemp("check") / "check.json"
    code = "import sys; from lmcache_blend.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "kernels", "check", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


@needs_triton
def test_every_kernel_compiles_for_every_target(compiled):
    """0 spills, shared memory within the target's limit, 128-bit traffic and tensor cores where they belong."""
    assert all(row["ok"] for row in compiled), [r for r in compiled if not r["ok"]]
    kernels = {row["kernel"] for row in compiled}
    assert {(r["kernel"], r["target"]) for r in compiled} == {(k, t) for k in kernels for t in TARGETS}
    for row in compiled:
        assert row["spills"] == 0
        assert row["shared_bytes"] <= TARGETS[row["target"]].shared_bytes
        assert row["registers"] > 0
        assert row["floor_us"] > 0


@needs_triton
def test_every_example_has_a_kernel(compiled):
    assert {row["kernel"].split("/")[0] for row in compiled} == {e.name for e in examples()}


@needs_triton
@each_example
def test_the_cpu_path_equals_its_reference(example: Example):
    row = validate_example(example, CPU, small=True)
    assert row["ok"], row


@needs_triton
@each_example
def test_operators_are_sound(example: Example):
    """torch.library.opcheck: schema, fake implementation, compilation, for each operator that the example calls."""
    seen = []

    class Note(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "lmcache_blend":
                seen.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Note():
        example.run(*example.make(CPU, True))
    if not seen:  # on CPU plain torch operators serve it; its launches are those of an operator
        with Note(), recording():
            example.run(*example.make(CPU, True))
    assert seen, "no operator of lmcache_blend was called"
    # Memory that an operator leaves unwritten, such as gaps between rows, is then the same in all runs.
    torch.use_deterministic_algorithms(True)
    try:
        for func, args, kwargs in seen:
            torch.library.opcheck(func, args, kwargs)
    finally:
        torch.use_deterministic_algorithms(False)
