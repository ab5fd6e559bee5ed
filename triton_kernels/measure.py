"""Every operation on the device that is present: against its reference, against its rivals, against the memory's limit.

Times are medians. On a GPU they come from `triton.testing.do_bench` (events, L2 cleared before each run); on CPU from
a wall clock.
"""

import math
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lmcache_blend.triton_kernels.example import Example, chosen, moved_bytes, tensors

Row = dict[str, Any]
BUDGET_S = 0.5
"""Of repeats of one call on CPU."""


def present_device() -> torch.device:
    """The GPU that torch sees (CUDA or ROCm), else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def environment(device: torch.device) -> Row:
    """What a result depends on: device, bandwidth of a plain copy, versions."""
    cuda = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if cuda else None
    return {
        "device": properties.name if properties else platform.processor() or platform.machine(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if cuda else None,
        "architecture": getattr(properties, "gcnArchName", None),
        "threads": torch.get_num_threads(),
        "copy_bytes_per_s": copy_bandwidth(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": _version("triton"),
    }


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by torch's copy of 256 MiB: the limit that rows are compared with."""
    source = torch.empty(256 << 20, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * source.numel() / (time_ms(lambda: target.copy_(source), device) / 1e3)


def validate(device: torch.device, small: bool = False, match: str = "") -> list[Row]:
    """A row per example: whether the result is right, how far off, how long it takes."""
    return [validate_example(e, device, small) for e in chosen(match)]


def validate_example(example: Example, device: torch.device, small: bool) -> Row:
    """One row; a crash is a row with its error, so that one broken kernel does not hide the others."""
    row: Row = {"example": example.name, "ok": False, "error_ratio": None, "ms": None}
    try:
        want = example.reference(*example.make(device, small))
        args = example.make(device, small)
        got = example.run(*args)
        errors = [error_ratio(g, w) for g, w in zip(tensors(got), tensors(want), strict=True)]
        worst, row["tolerance"] = max(errors, default=0.0), example.tolerance
        row["ok"] = worst <= example.tolerance
        if math.isfinite(worst):
            row["error_ratio"] = worst
        else:
            row["problem"] = "another shape, other integers, or NaN where a number belongs"
        args = example.make(device, small)
        row["ms"] = time_ms(lambda: example.run(*args), device)
        row["bytes"] = moved_bytes(example, args, got)
        row["bytes_per_s"] = row["bytes"] / row["ms"] * 1e3
        if example.flops is not None:
            row["flops_per_s"] = example.flops(args) / row["ms"] * 1e3
    except Exception as error:
        row["problem"] = f"{type(error).__name__}: {error}"
    return row


def bench(device: torch.device, match: str = "", small: bool = False) -> list[Row]:
    """A row per example and provider (ours, then the rivals): milliseconds, bytes per second, times of ours."""
    rows = []
    for example in chosen(match):
        ours = None
        for provider, run in {"lmcache_blend": example.run, **example.rivals}.items():
            args = example.make(device, small)
            row: Row = {"example": example.name, "provider": provider, "ms": None, "bytes_per_s": None, "ratio": None}
            try:
                result = run(*args)
                row["ms"] = time_ms(lambda run=run, args=args: run(*args), device)
            except Exception as error:
                if provider == "lmcache_blend":
                    raise
                rows.append(row | {"note": f"not here: {type(error).__name__}: {error}"})
                continue
            ours = ours or row["ms"]
            moved = moved_bytes(example, args, result)
            rows.append(row | {"bytes_per_s": moved / row["ms"] * 1e3, "ratio": row["ms"] / ours})
    return rows


def error_ratio(got: Tensor, want: Tensor) -> float:
    """RMS of the error over RMS of the reference; for integers 0 or infinite. NaN or another shape is infinite."""
    if got.shape != want.shape:
        return float("inf")
    if not want.is_floating_point():
        # Unsigned integers compare on few devices.
        return 0.0 if torch.equal(got.to(torch.int64), want.to(torch.int64)) else float("inf")
    a, b = got.double(), want.double()
    same = (a == b) | (a.isnan() & b.isnan())  # equal infinities and wanted NaNs
    if bool(same.all()):
        return 0.0
    error = torch.where(same, 0.0, a - b).square().mean().sqrt()
    size = torch.where(b.isfinite(), b, 0.0).square().mean().sqrt()
    ratio = float(error / size.clamp_min(1e-30))
    return ratio if ratio == ratio else float("inf")


def time_ms(call: Callable[[], Any], device: torch.device) -> float:
    """Median milliseconds of a call, after a first one."""
    call()
    if device.type == "cuda":
        from triton.testing import do_bench

        median: Any = do_bench(call, warmup=25, rep=100, return_mode="median")
        return float(median)
    times: list[float] = []
    while len(times) < 3 or sum(times) < BUDGET_S:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
