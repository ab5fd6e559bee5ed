"""Where an operation runs, and how its Triton kernels start: on the device, in the interpreter, or only on record.

A recorded launch is what the offline compiler gets (`check.py`), so that what is compiled there is what an operation
starts, with the same types, constants and alignments.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.bool: "i1",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.uint16: "u16",
    torch.uint32: "u32",
    torch.uint64: "u64",
}


@dataclass(frozen=True)
class Launch:
    """One start of a kernel as Triton would specialise it.

    signature: argument -> type, "constexpr" for a constant. aligned: arguments that are multiples of 16 (bytes of a
    pointer, values of an integer). grid: programs.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, int]
    grid: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.kernel.__name__


# As Triton does, which loads kernels for its interpreter or not.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_record: ContextVar[list[Launch] | None] = ContextVar("lmcache_blend_launches", default=None)


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return _INTERPRETED


def on_triton(*tensors: Tensor | None) -> bool:
    """Whether an operation on these tensors runs its Triton kernels; raises ValueError where devices are mixed."""
    if all(t is None or t.is_cpu for t in tensors):
        return _INTERPRETED or _record.get() is not None
    devices = {t.device for t in tensors if t is not None}
    if len(devices) != 1:
        raise ValueError(f"tensors on {' and '.join(sorted(map(str, devices)))}: move them to one device")
    return devices.pop().type == "cuda"


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within it, operations on CPU tensors note their launches in the list and leave their outputs unwritten."""
    launches: list[Launch] = []
    token = _record.set(launches)
    try:
        yield launches
    finally:
        _record.reset(token)


def launch(kernel: Any, grid: Sequence[int], *args: Any, num_warps: int = 4, num_stages: int = 2, **constants: Any):
    """Start a kernel: arguments in the kernel's order, constants (tl.constexpr) by name. No programs, no start."""
    if 0 in grid:
        return
    seen = _record.get()
    options = {"num_warps": num_warps, "num_stages": num_stages}
    if seen is not None:
        seen.append(_specialise(kernel, tuple(grid), args, constants, options))
        return
    device = next(a.device for a in args if isinstance(a, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[tuple(grid)](*args, **constants, **options)


def _specialise(kernel: Any, grid: tuple[int, ...], args: Sequence[Any], constants: dict, options: dict) -> Launch:
    """As Triton's own launcher: 1 and None are constants, multiples of 16 are marked, integers take 32 bits if they
    fit."""
    signature, fixed, aligned = {}, dict(constants), []
    names = [name for name in kernel.arg_names if name not in constants]
    if len(names) != len(args):
        raise TypeError(f"{kernel.__name__} takes {names} beside its constants, not {len(args)} arguments")
    for name, value in zip(names, args, strict=True):
        if isinstance(value, Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            if value.data_ptr() % 16 == 0:
                aligned.append(name)
        elif value is None or (isinstance(value, int) and value == 1):
            fixed[name] = value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                aligned.append(name)
    full = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    return Launch(kernel, full, fixed, tuple(aligned), options, grid)
