"""What a task is made of: samples, each a question, passages and reference answers."""

from dataclasses import dataclass

KINDS = ("qa", "kv", "needle", "summ", "math", "topic", "fewshot", "lm", "fidelity")
"""Kinds of task; the kind chooses the prompt's template (prompts.py)."""

MAX_NEW_TOKENS = {"qa": 24, "kv": 48, "needle": 16, "summ": 128, "math": 192, "topic": 24}
"""Tokens to generate per kind, where a task does not say otherwise."""
DEFAULT_NEW_TOKENS = 32


@dataclass(frozen=True)
class Sample:
    """One prompt's worth: contexts are the passages in order; answers may be empty (fidelity: KL only)."""

    id: str
    question: str
    contexts: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """Samples of one kind. Asking for more samples of a task keeps the ones before: they are a prefix."""

    name: str
    kind: str
    samples: tuple[Sample, ...]
    max_new_tokens: int


def max_new_tokens(kind: str) -> int:
    """Tokens that an answer of this kind may take."""
    return MAX_NEW_TOKENS.get(kind, DEFAULT_NEW_TOKENS)
