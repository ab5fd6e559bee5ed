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
from lmcache_blend.triton_kernels.paged import scatter
from lmcache_blend.triton_kernels.paged.reference import scatter_reference
from lmcache_blend.triton_kernels.place import Pages, place
from lmcache_blend.triton_kernels.rotation import rotate_reference
from lmcache_blend.triton_kernels.targets import TARGETS
from lmcache_blend.types import RotarySlice, Turn

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


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("first", "half"), [(0, 32), (8, 16), (0, 0)])
@pytest.mark.parametrize("paged", [False, True])
def test_scatter_on_cpu_takes_any_layout(transposed, interleaved, first, half, paged):
    """Runs of more and of fewer tokens than a tile, single ones, and tokens that have no place."""
    g = torch.Generator().manual_seed(half + paged)
    heads, dim, size, blocks, n = 3, 64, 48, 9, 300
    shape = (blocks, heads, dim, size) if transposed else (blocks, heads, size, dim)
    memory = torch.randn(shape, generator=g)
    found = memory.transpose(2, 3) if transposed else memory
    wanted = found.clone()
    x = torch.randn(n, heads, dim, generator=g).transpose(0, 1)
    table = torch.randperm(blocks, generator=g)[:8].int() if paged else None
    places = torch.randperm(200, generator=g)[:120] + 180
    positions = torch.cat((torch.arange(3, 160), places, torch.full((n - 277,), -1)))
    positions[[5, 40, 41]] = -1
    cos, sin = (torch.randn(n, half, generator=g) if half else None for _ in range(2))
    scatter_reference(wanted.transpose(1, 2), x, positions, table, 0, cos, sin, first, interleaved)
    piece = RotarySlice(0, first, first + 2 * half, "interleaved" if interleaved else "half", "half", 0)
    turn = None if cos is None or sin is None else Turn(cos, sin)
    scatter(found, x, positions, table, turn=turn, piece=piece, layout="HND")
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    before = memory.clone()
    for wrong in (positions.clone().index_fill_(0, torch.tensor([299]), 8 * size + 50), torch.full((n,), 10**9)):
        with pytest.raises(IndexError, match=f"position {int(wrong.max())} lies outside"):
            scatter(found, x, wrong, table, layout="HND")
    assert torch.equal(memory, before), "nothing is written where a position is wrong"


def test_placing_in_pages_is_placing_in_a_row():
    g = torch.Generator().manual_seed(0)
    piece, angle = RotarySlice(0, 0, 64, "half", "half", 0), torch.rand(100, 32, generator=g)
    turn, x = Turn(angle.cos(), angle.sin()), torch.randn(2, 100, 64, generator=g)
    for dtype in (torch.float32, torch.bfloat16):
        dense, cache, table = (
            torch.zeros(2, 160, 64, dtype=dtype),
            torch.zeros(6, 2, 32, 64),
            torch.tensor([4, 1, 0, 5, 2]),
        )
        cache = cache.to(dtype)
        place(dense, x.to(dtype), 37, turn, piece)
        place(Pages(cache, table), x.to(dtype), 37, turn, piece)
        assert torch.equal(cache[table].transpose(0, 1).flatten(1, 2), dense)
    with pytest.raises(IndexError, match="position 160"):
        place(Pages(torch.zeros(6, 2, 32, 64), table), x, 61, turn, piece)
    for heads, dim in ((3, 64), (2, 32)):
        with pytest.raises(ValueError, match="does not hold"):
            place(Pages(torch.zeros(6, 2, 32, 64), table), torch.zeros(heads, 5, dim), 0, None, None)
    with pytest.raises(ValueError, match="angles of shape"):
        place(Pages(torch.zeros(6, 2, 32, 64), table), x[:, :50], 0, turn, piece)
    wide = Turn(turn.cos.double(), turn.sin.double())
    for target in (torch.zeros(2, 64, 160).transpose(1, 2), Pages(torch.zeros(6, 2, 32, 64), table)):
        place(target, x, 37, wide, piece)
        found = target.cache[table].transpose(0, 1).flatten(1, 2) if isinstance(target, Pages) else target
        torch.testing.assert_close(found[:, 37:137], rotate_reference(x, *turn, 0, False))
