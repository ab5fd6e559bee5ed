"""`lmcache-blend kernels check | validate | bench`."""

import argparse
from collections.abc import Sequence
from typing import Any

from lmcache_blend import errors


def add_commands(commands: Any, write_json: Any) -> None:
    """Add `kernels` to the subparsers of the command line."""
    kernels = commands.add_parser(
        "kernels", help="check, validate and time kernels", description="The GPU kernels of codecs and blending."
    )
    kinds = kernels.add_subparsers(metavar="COMMAND", required=True)

    check = kinds.add_parser(
        "check",
        help="compile for GPUs, without one",
        description="Compile every kernel offline and read its machine code; status 1 where one breaks a rule.",
    )
    check.set_defaults(command=lambda arguments: _check(arguments, write_json))
    check.add_argument("--targets", metavar="A[,B...]", help="sm80, sm90, sm100, gfx942 (default all)")

    validate = kinds.add_parser(
        "validate",
        help="run and time every kernel here",
        description="Run every operation on the device that is present against its reference, and time it.",
    )
    validate.set_defaults(command=lambda arguments: _validate(arguments, write_json))

    bench = kinds.add_parser(
        "bench", help="time against rivals here", description="Time every operation and its rivals on this device."
    )
    bench.set_defaults(command=lambda arguments: _bench(arguments, write_json))

    for command in (validate, bench):
        command.add_argument("--small", action="store_true", help="sizes of tests; validate on CPU has no others")
    for command in (check, validate, bench):
        command.add_argument("--match", default="", metavar="REGEX", help="examples with a match in their name only")
        command.add_argument("--json", metavar="OUT", help="write one JSON value, - for stdout (instead of the table)")


def _check(arguments: argparse.Namespace, write_json: Any) -> None:
    from lmcache_blend.triton_kernels.check import check
    from lmcache_blend.triton_kernels.targets import TARGETS

    _need_triton()
    rows = check((arguments.targets or ",".join(TARGETS)).split(","), arguments.match)
    columns = {"target": "", "registers": "regs", "spills": "spills", "shared_bytes": "shared", "loads_128": "ld128",
               "stores_128": "st128", "tensor_core": "tensor", "instructions_per_symbol": "instr/sym",
               "floor_us": "floor us"}  # fmt: skip
    _show(rows, columns, arguments.json, write_json, rows, group="kernel")
    bad = [f"{r['kernel']} on {r['target']}: {', '.join(r['problems'])}" for r in rows if not r["ok"]]
    if bad:
        raise errors.KernelError(f"{len(bad)} of {len(rows)} break a rule: {'; '.join(bad)}")


def _validate(arguments: argparse.Namespace, write_json: Any) -> None:
    from lmcache_blend.triton_kernels.measure import environment, present_device, validate

    device = present_device()
    # The references of real sizes take minutes on a CPU.
    small = arguments.small or device.type == "cpu"
    result = {"environment": environment(device), "small": small, "rows": validate(device, small, arguments.match)}
    columns = {"example": "example", "ok": "ok", "error_ratio": "error", "tolerance": "at most", "ms": "ms",
               "bytes_per_s": "bytes/s"}  # fmt: skip
    _show(result["rows"], columns, arguments.json, write_json, result)
    bad = [f"{r['example']}: {r.get('problem') or r['error_ratio']}" for r in result["rows"] if not r["ok"]]
    if bad:
        raise errors.KernelError(f"{len(bad)} of {len(result['rows'])} differ from their reference: {'; '.join(bad)}")


def _bench(arguments: argparse.Namespace, write_json: Any) -> None:
    from lmcache_blend.triton_kernels.measure import bench, environment, present_device

    device = present_device()
    rows = bench(device, arguments.match, arguments.small)
    result = {"environment": environment(device), "small": arguments.small, "rows": rows}
    columns = {"provider": "", "ms": "ms", "bytes_per_s": "bytes/s", "ratio": "ratio", "note": ""}
    _show(rows, columns, arguments.json, write_json, result, group="example")


def _need_triton() -> None:
    from importlib.util import find_spec

    if find_spec("triton") is None:
        raise errors.ConfigError("triton is not installed, so that nothing can be compiled; pip install triton==3.7.1")


def _show(
    rows: Sequence[dict], columns: dict[str, str], target: str | None, write_json: Any, value: Any, group: str = ""
) -> None:
    if target:
        write_json(value, target)
    if target != "-":
        print_table(rows, columns, group)


def print_table(rows: Sequence[dict], columns: dict[str, str], group: str = "") -> None:
    """A line a row, for terminals of 80 columns. columns: field -> its head. group: a field that heads its rows."""
    lines = [list(columns.values()), *([_cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for i, line in enumerate(lines):
        if group and i and (i == 1 or rows[i - 2][group] != rows[i - 1][group]):
            print(rows[i - 1][group])
        cells = zip(columns, line, widths, strict=True)
        text = "  ".join(x.ljust(w) if name in TEXT else x.rjust(w) for name, x, w in cells)
        print(f"{'  ' if group else ''}{text}".rstrip())


TEXT = {"target", "example", "provider", "note"}


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.3g}"
    return "" if value is None else str(value)
