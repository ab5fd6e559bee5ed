"""The way to tasks: a registry of factories, and load_task, which also reads local JSONL files.

A third party adds a task with `@tasks.register("mine")` on a function (limit, seed, **options) -> Task, or by
an entry point in the group lmcache_blend.tasks.
"""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lmcache_blend.config import Config
from lmcache_blend.errors import ConfigError
from lmcache_blend.eval.tasks.jsonl import load_jsonl
from lmcache_blend.eval.tasks.prompts import answer_tokens, build_prompt, nearest_prompts, post_process
from lmcache_blend.eval.tasks.sample import KINDS, Sample, Task, max_new_tokens
from lmcache_blend.registry import Registry

__all__ = [
    "KINDS",
    "Sample",
    "Task",
    "answer_tokens",
    "build_prompt",
    "load_task",
    "max_new_tokens",
    "nearest_prompts",
    "post_process",
    "register_task",
    "task_options",
    "tasks",
]

TaskFactory = Callable[..., Task]
"""(limit: int, seed: int, **options) -> Task"""

tasks: Registry[TaskFactory] = Registry("task", "lmcache_blend.tasks")


def register_task(name: str, options: type[Config] = Config) -> Callable[[Callable[..., Task]], Callable[..., Task]]:
    """Register build(limit, seed, options) as a task; options are fields of a Config, checked before it runs.

    Example:
        >>> class Size(Config):
        ...     words: int = 100
        >>> @register_task("empty-example", Size)
        ... def empty(limit, seed, options):
        ...     return Task("empty-example", "qa", (), options.words)
        >>> task_options("empty-example")
        ('words',)
        >>> tasks.get("empty-example")(1, 0, words=7).max_new_tokens
        7
    """

    def decorate(build: Callable[..., Task]) -> Callable[..., Task]:
        @functools.wraps(build)
        def factory(limit: int, seed: int, **given: Any) -> Task:
            return build(limit, seed, options(**given))

        own = [inspect.Parameter(p, inspect.Parameter.KEYWORD_ONLY, default=None) for p in options.model_fields]
        sized = list(inspect.signature(build).parameters.values())[:2]
        factory.__signature__ = inspect.Signature([*sized, *own])  # pyright: ignore[reportAttributeAccessIssue]
        tasks.register(name)(factory)
        return build

    return decorate


def task_options(name: str) -> tuple[str, ...]:
    """Names of the options that a registered task takes: its factory's parameters but limit and seed."""
    named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = [p.name for p in inspect.signature(tasks.get(name)).parameters.values() if p.kind in named]
    return tuple(p for p in found if p not in ("limit", "seed"))


def load_task(name: str, data: Path | None, limit: int, seed: int, **options: Any) -> Task:
    """A registered task, or with `data` that JSONL file under the name given (its stem where that is empty).

    The same seed gives the same samples, and a larger limit only adds to them. Raises UnknownNameError,
    ConfigError (limit, options) and DataError (a file or hub set that is missing or broken).
    """
    if limit < 1:
        raise ConfigError(f"limit = {limit}: a task needs at least 1 sample")
    if data is not None:
        if options:
            known = ", ".join(sorted(options))
            raise ConfigError(f"a JSONL file takes no task options, got: {known}; leave them out or leave out --data")
        return load_jsonl(Path(data), limit, seed, name=name or None)
    return tasks.get(name)(limit, seed, **options)
