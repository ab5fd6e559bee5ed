"""Tasks: generated ones that need no download, local JSONL files, and sets from the hub."""

from lmcache_blend.eval.tasks import generated, hub, people  # noqa: F401  (each registers its tasks)
from lmcache_blend.eval.tasks.base import (
    KINDS,
    Sample,
    Task,
    answer_tokens,
    build_prompt,
    load_task,
    nearest_prompts,
    post_process,
    register_task,
    task_options,
    tasks,
)

__all__ = [
    "KINDS",
    "Sample",
    "Task",
    "answer_tokens",
    "build_prompt",
    "load_task",
    "nearest_prompts",
    "post_process",
    "register_task",
    "task_options",
    "tasks",
]
