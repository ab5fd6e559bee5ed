"""The compile gate: every kernel of every example, compiled offline for GPUs that need not be present.

No driver is needed: Triton's wheel brings ptxas, cuobjdump, nvdisasm and an AMD backend. What is reported is counted
in the machine code. It must run in a process without TRITON_INTERPRET.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from lmcache_blend.errors import ConfigError, UnknownNameError
from lmcache_blend.triton_kernels.example import Example, chosen, examples, moved_bytes
from lmcache_blend.triton_kernels.launch import Launch, interpreted, recording
from lmcache_blend.triton_kernels.targets import TARGETS, Target

Row = dict[str, Any]


def check(targets: Sequence[str] = tuple(TARGETS), match: str = "", workers: int | None = None) -> list[Row]:
    """A row per kernel and target. match: regular expression on the example's name.

    Raises UnknownNameError for a target and ConfigError where kernels were loaded for the interpreter.
    """
    for name in targets:
        if name not in TARGETS:
            raise UnknownNameError("target", name, TARGETS)
    if interpreted():
        raise ConfigError("TRITON_INTERPRET is set, so that nothing can be compiled; unset it")
    jobs = [(example.name, target) for example in chosen(match) for target in targets]
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers == 1:
        made = [check_example(*job) for job in jobs]
    else:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            made = list(pool.map(check_example, *zip(*jobs, strict=True)))
    # The targets of one kernel one below the other.
    rows = [row for rows in made for row in rows]
    kernels = list(dict.fromkeys(row["kernel"] for row in rows))
    return sorted(rows, key=lambda row: kernels.index(row["kernel"]))


def check_example(name: str, target_name: str) -> list[Row]:
    """The rows of one example on one target; a kernel with several specialisations has a row for each."""
    example, target = next(e for e in examples() if e.name == name), TARGETS[target_name]
    args = example.make(torch.device("cpu"), False)
    with recording() as launches:
        result = example.run(*args)
    moved = moved_bytes(example, args, result)
    flops = example.flops(args) if example.flops is not None else 0
    floor = {"board": target.board, "bytes": moved, "flops": flops, "floor_us": target.floor_us(moved, flops)}
    return [check_launch(example, launch, target) | floor for launch in _distinct(launches)]


def _distinct(launches: Iterable[Launch]) -> list[Launch]:
    return list({str((x.name, x.signature, x.constants, x.aligned, x.options)): x for x in launches}.values())


def check_launch(example: Example, launch: Launch, target: Target) -> Row:
    """What the machine code of one launch says, and what of it breaks the rules."""
    row: Row = {"kernel": f"{example.name}/{launch.name}", "target": target.name, "ok": False}
    try:
        code = compile_launch(launch, target)
    except Exception as error:  # the compiler raises whatever its passes raise
        return row | {"problems": [f"{type(error).__name__}: {str(error).strip().splitlines()[-1][:200]}"]}
    row |= nvidia_numbers(code, target) if target.backend == "cuda" else amd_numbers(code, target)
    loops = row.pop("loops")
    symbols = example.coder.get(launch.name)
    # Of several innermost loops the longest is the main one: others do what is left of a row.
    row["instructions_per_symbol"] = round(max(loops) / symbols, 3) if symbols and loops else None
    problems = []
    if row["spills"]:
        problems.append(f"{row['spills']} spills")
    if row["shared_bytes"] > target.shared_bytes:
        problems.append(f"{row['shared_bytes']} bytes of shared memory, {target.shared_bytes} at most")
    if launch.name in example.streaming and not (row["loads_128"] and row["stores_128"]):
        problems.append("no 128-bit loads or no 128-bit stores")
    if (row["instructions_per_symbol"] or 0) > 1:
        problems.append(f"{row['instructions_per_symbol']} instructions per symbol")
    if launch.name in example.matmul and not row["tensor_core"]:
        problems.append("no tensor cores")
    return row | {"ok": not problems, "problems": problems}


def compile_launch(launch: Launch, target: Target) -> Any:
    """Triton's compiled kernel."""
    import triton
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    source = ASTSource(launch.kernel, launch.signature, launch.constants, attributes)
    return triton.compile(source, target=target.gpu(), options=dict(launch.options))


def nvidia_numbers(code: Any, target: Target) -> Row:
    """From ptxas's cubin: registers, spills (local memory instructions and stack), widths, innermost loops."""
    usage, text = _disassemble(code.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    ops, labels, jumps = [], {}, []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(ops)
        elif op := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", line):
            if to := re.search(r"`\((\.L_\w+)\)", op[2]) if op[1].startswith("BRA") else None:
                jumps.append((to[1], len(ops)))
            ops.append(op[1])
    # ptxas ends a kernel with a jump to itself, which is no loop.
    loops = [(labels[to], at) for to, at in jumps if to in labels and labels[to] < at]

    def count(pattern: str) -> int:
        return sum(bool(re.match(pattern, op)) for op in ops)

    return {
        "registers": int(found[1]),
        "spills": count(r"LDL|STL") + int(found[2]),
        "shared_bytes": code.metadata.shared,
        "loads_128": count(r"LDG.*\.128|LDGSTS.*\.128|UTMALDG|UBLKCP"),
        "stores_128": count(r"STG.*\.128|UTMASTG"),
        "loads": count(r"LDG"),
        "stores": count(r"STG"),
        "tensor_core": count(target.tensor_core),
        "instructions": len(ops),
        "loops": _innermost(loops),
    }


def amd_numbers(code: Any, target: Target) -> Row:
    """From the assembly. Loops are not read: a sum over lanes is a loop of its own there, within the others."""
    text = code.asm["amdgcn"]
    ops = re.findall(r"^\s+([vsdgb][a-z0-9]*_[a-z0-9_]+)", text, re.MULTILINE)

    def meta(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", text)
        return int(found[1]) if found else 0

    def count(pattern: str) -> int:
        return sum(bool(re.match(pattern, op)) for op in ops)

    return {
        "registers": meta("vgpr_count"),
        "spills": meta("vgpr_spill_count") + meta("sgpr_spill_count") + meta("private_segment_fixed_size"),
        "shared_bytes": code.metadata.shared,
        "loads_128": count(r"(global|buffer)_load_dwordx4"),
        "stores_128": count(r"(global|buffer)_store_dwordx4"),
        "loads": count(r"(global|buffer)_load"),
        "stores": count(r"(global|buffer)_store"),
        "tensor_core": count(target.tensor_core),
        "instructions": len(ops),
        "loops": [],
    }


def _innermost(loops: list[tuple[int, int]]) -> list[int]:
    """Instructions of the loops that hold no other loop."""
    return [b - a + 1 for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """(resource usage, assembly) by the tools in Triton's wheel."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        commands = [[tools / "cuobjdump", "-res-usage", file], [tools / "nvdisasm", "-c", file]]
        usage, text = (subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands)
    return usage, text
