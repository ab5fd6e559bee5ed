"""Example calls of every operation: what is compiled, validated and timed.

Each operation's folder has an examples.py with a list EXAMPLES; `examples()` collects them.
"""

import importlib.util
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lmcache_blend.errors import ConfigError


@dataclass(frozen=True)
class Example:
    """A call of an operation.

    make: (device, small) -> arguments, the same at every call; small for tests on CPU, else of the size of real work.
    run: the operation. reference: the same in plain torch, in float64 where it has floats. tolerance: largest allowed
    RMS(result - reference) / RMS(reference) of each float tensor; integers and booleans must be equal.
    moved: (arguments, result) -> bytes that have to be read and written once; None counts every tensor once.
    flops: of the arguments. rivals: name -> call with the same arguments, timed beside it; one that needs what is not
    installed or not on this device raises, and is noted.

    For the compiler, by kernel name: streaming ones must load and store 128 bits at a time, matmul ones must use tensor
    cores; coder ones name the symbols that an iteration of the innermost loop decodes.
    """

    name: str
    make: Callable[[torch.device, bool], tuple]
    run: Callable[..., Any]
    reference: Callable[..., Any]
    tolerance: float = 0.0
    moved: Callable[[tuple, Any], int] | None = None
    flops: Callable[[tuple], int] | None = None
    rivals: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    streaming: tuple[str, ...] = ()
    matmul: tuple[str, ...] = ()
    coder: Mapping[str, int] = field(default_factory=dict)


@cache
def examples() -> tuple[Example, ...]:
    """Those of all operations, in the order of their folders' names."""
    found: list[Example] = []
    for module in sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if m.ispkg):
        name = f"{__package__}.{module}.examples"
        if importlib.util.find_spec(name):
            found += importlib.import_module(name).EXAMPLES
    return tuple(found)


def chosen(match: str) -> list[Example]:
    """Examples whose name has a match of the regular expression; raises ConfigError where there is none."""
    found = [e for e in examples() if re.search(match, e.name)]
    if not found:
        raise ConfigError(f"no example matches {match!r}; there are {', '.join(e.name for e in examples())}")
    return found


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in nested tuples, lists and mappings."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [t for v in value for t in tensors(v)] if isinstance(value, (tuple, list)) else []


def moved_bytes(example: Example, args: tuple, result: Any) -> int:
    """Bytes that the operation has to read and write once."""
    if example.moved is not None:
        return example.moved(args, result)
    unique = {t.data_ptr(): t.numel() * t.element_size() for t in (*tensors(args), *tensors(result))}
    return sum(unique.values())
