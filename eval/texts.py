"""Text for fitting and measuring codecs: windows of token ids from a file, or from what every machine has."""

import json
import os
import random
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmcache_blend.errors import DataError

BUILT_IN = "default"


def documents(source: str | Path) -> list[str]:
    """Documents of a source: a .jsonl file (fields contexts, question, answers, or text), a text file, or a folder of
    text files; "default" is a mixture of code, prose and chat that needs no file. Raises DataError.
    """
    if str(source) == BUILT_IN:
        return _built_in()
    path = Path(source)
    if path.is_dir():
        return [_read(p) for p in sorted(path.rglob("*")) if p.is_file() and p.suffix in (".txt", ".md", ".py", ".rst")]
    if not path.is_file():
        raise DataError(
            f"text {str(source)!r} does not exist; give a .jsonl file, a text file, a folder or {BUILT_IN!r}"
        )
    if path.suffix != ".jsonl":
        return [_read(path)]
    out, groups = [], set()
    for number, line in enumerate(_read(path).splitlines(), 1):
        try:
            row = json.loads(line)
            group = row.get("group")
            # Samples of one group share their passages: the first one stands for all.
            if line.strip() and (group is None or group not in groups):
                groups.add(group)
                out.append(_document(row))
        except (json.JSONDecodeError, TypeError, AttributeError, KeyError) as error:
            raise DataError(f"{path}:{number}: no sample with contexts or text ({error})") from None
    return out


def windows(texts: Sequence[str], tokenizer: Any, size: int, limit: int) -> list[Tensor]:
    """At most `limit` windows [size] int64, no token twice: first the start of every document, then their later parts.

    Documents shorter than a window are joined with the next ones. Raises DataError where there is not one window.
    """
    rows: list[list[Tensor]] = []
    for ids in _joined(texts, tokenizer, size):
        rows.append([torch.tensor(ids[i : i + size]) for i in range(0, len(ids) - size + 1, size)])
        if len(rows) >= limit:
            break
    depth = max((len(r) for r in rows), default=0)
    out = [r[i] for i in range(depth) for r in rows if i < len(r)][:limit]
    if not out:
        raise DataError(f"the text is shorter than one window of {size} tokens; give more text or fewer tokens")
    return out


def _joined(texts: Sequence[str], tokenizer: Any, size: int) -> Iterator[list[int]]:
    held: list[int] = []
    for text in texts:
        # Text far beyond the windows that anyone asks for is not worth its tokenising.
        held += tokenizer(text[: 40 * size], add_special_tokens=False)["input_ids"]
        if len(held) >= size:
            yield held
            held = []


def _document(row: dict[str, Any]) -> str:
    if "text" in row:
        return str(row["text"])
    titles = row.get("titles") or [""] * len(row["contexts"])
    parts = ["\n".join(p for p in pair if p) for pair in zip(titles, row["contexts"], strict=False)]
    answer = (row.get("answers") or [""])[0]
    if row.get("question"):
        parts.append(f"Question: {row['question']}\nAnswer: {answer}")
    return "\n\n".join(parts)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _built_in() -> list[str]:
    """Source code and reference manual of Python, descriptions and docstrings of installed packages, generated
    passages."""
    from pydoc_data.topics import topics

    from lmcache_blend.eval.tasks import load_task

    code = sorted(Path(os.__file__).parent.glob("*.py"), key=lambda p: p.name)
    kinds = [[t for t in (_read(p) for p in code) if len(t) > 14_000]]
    described = sorted({d.metadata["Name"].lower(): d for d in metadata.distributions()}.items())
    prose = [str(d.metadata.json.get("description", "")) for _, d in described]
    kinds.append([t for t in prose if len(t) > 3_000])
    kinds.append([topics[name] for name in sorted(topics) if len(topics[name]) > 6_000])
    kinds.append([_docstrings(name) for name in ("torch", "numpy", "random", "argparse", "logging", "unittest")])
    people = load_task("people_qa", None, limit=24, seed=7).samples
    kinds.append([_document({"contexts": s.contexts, "question": s.question, "answers": s.answers}) for s in people])
    for texts in kinds:
        random.Random(1).shuffle(texts)
    longest = max(len(texts) for texts in kinds)
    return [texts[i] for i in range(longest) for texts in kinds if i < len(texts)]


def _docstrings(name: str) -> str:
    import importlib
    import inspect

    module = importlib.import_module(name)
    found = (inspect.getdoc(getattr(module, item, None)) or "" for item in sorted(dir(module)))
    return "\n\n".join(text for text in found if len(text) > 400)
