"""Torch operators of this package: one schema, one implementation a device, one fake.

CUDA and ROCm tensors run the Triton kernel, CPU tensors the numba or torch path; with TRITON_INTERPRET=1 CPU tensors run
the Triton source in its interpreter. An operator costs 2 microseconds a call here, a torch.library.custom_op 20, and the
blender calls several in every layer.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.library import Library, infer_schema, register_fake

NAMESPACE = "lmcache_blend"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_library = Library(NAMESPACE, "FRAGMENT")


def operator(name: str, cpu: Callable, gpu: Callable, fake: Callable, mutates: Sequence[str] = ()) -> Any:
    """Register lmcache_blend::name with the signature of `cpu` and return it.

    gpu: launches the kernel; it imports Triton when it is first called, so that CPU paths do without it. fake: shapes
    and dtypes of the result. mutates: arguments that are written to.
    """
    _library.define(name + infer_schema(cpu, mutates_args=mutates))
    _library.impl(name, gpu if INTERPRETED else cpu, "CPU")
    _library.impl(name, gpu, "CUDA")
    register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default
