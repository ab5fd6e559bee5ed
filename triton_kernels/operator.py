"""Torch operators of this package: one schema, one function for every device, one fake.

The function asks `launch.on_triton` where it runs. An operator costs 2 microseconds a call here, a
torch.library.custom_op 20, and the blender calls several in every layer.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.library import Library, infer_schema, register_fake

NAMESPACE = "lmcache_blend"
LIBRARY = Library(NAMESPACE, "FRAGMENT")


def operator(name: str, run: Callable, fake: Callable, mutates: Sequence[str] = ()) -> Any:
    """Register lmcache_blend::name with the signature of `run`, for CPU, CUDA and ROCm tensors, and return it.

    fake: shapes and dtypes of the result. mutates: arguments that are written to.
    """
    LIBRARY.define(name + infer_schema(run, mutates_args=mutates))
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, device)
    register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
