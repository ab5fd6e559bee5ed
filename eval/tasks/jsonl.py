"""Local data files: one JSON object a line.

Fields: id (unique), task (the kind, the same on every line), question, contexts [passages], answers [texts].
Others are ignored.
"""

import json
import random
import re
from pathlib import Path

from lmcache_blend.errors import DataError, nearest
from lmcache_blend.eval.tasks.sample import KINDS, Sample, Task, max_new_tokens

LM_ANSWER_WORDS = 48
"""Words at the end of an article that a language-modelling sample predicts: about 64 tokens."""

_ABSENT = object()


def load_jsonl(path: Path, limit: int, seed: int, name: str | None = None) -> Task:
    """The first `limit` samples of a file: in its own order for seed 0, else shuffled by the seed.

    Every line is checked, not only those taken. Raises DataError, which names the file and the line.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"cannot read data file {path}: {error.strerror or error}") from None
    samples: list[Sample] = []
    kinds: dict[str, int] = {}
    ids: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        kind, sample = _parse(line, f"{path}, line {number}")
        first = ids.setdefault(sample.id, number)
        if first != number:
            raise DataError(f"{path}, line {number}: id {sample.id!r} is also that of line {first}; ids must differ")
        kinds.setdefault(kind, number)
        if len(kinds) > 1:
            raise DataError(
                f"{path}, line {number}: task {kind!r} differs from {next(iter(kinds))!r} before it; "
                "split the file by task"
            )
        samples.append(sample)
    if not samples:
        raise DataError(f"{path} holds no samples; expected one JSON object a line")
    if seed:
        random.Random(seed).shuffle(samples)
    kind = next(iter(kinds))
    return Task(name or path.stem, kind, tuple(samples[:limit]), max_new_tokens(kind))


def _parse(line: bytes, where: str) -> tuple[str, Sample]:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON object was expected, not {_kind_of(row)}")
    kind = _text(row, "task", where)
    if kind not in KINDS:
        raise DataError(f"{where}: task = {kind!r}: {nearest(kind, KINDS)}")
    sample = Sample(
        id=_text(row, "id", where),
        question=_text(row, "question", where),
        contexts=tuple(t for t in _texts(row, "contexts", where) if t.strip()),
        answers=tuple(t for t in _texts(row, "answers", where) if t.strip()),
    )
    if not sample.id:
        raise DataError(f"{where}: field 'id' is empty")
    if kind == "lm" and not sample.answers:
        sample = hold_back_end(sample)
    if not sample.question.strip() and not sample.contexts:
        raise DataError(f"{where}: both 'question' and 'contexts' are empty, so there is nothing to ask")
    return kind, sample


def hold_back_end(sample: Sample, words: int = LM_ANSWER_WORDS) -> Sample:
    """A language-modelling sample: the last words of its text (half of them at most) become the answer."""
    if not sample.contexts:
        return sample
    *before, last = sample.contexts
    starts = [word.start() for word in re.finditer(r"\S+", last)]
    held = min(words, len(starts) // 2)
    if not held:
        return sample
    at = starts[-held]
    return Sample(sample.id, sample.question, (*before, last[:at].rstrip()), (last[at:].rstrip(),))


def _text(row: dict, field: str, where: str) -> str:
    value = row.get(field, _ABSENT)
    if value is _ABSENT:
        raise DataError(f"{where}: field {field!r} is missing")
    return _checked(value, f"{where}: field {field!r}")


def _texts(row: dict, field: str, where: str) -> list[str]:
    value = row.get(field, _ABSENT)
    if value is _ABSENT:
        raise DataError(f"{where}: field {field!r} is missing")
    if not isinstance(value, list):
        raise DataError(f"{where}: field {field!r} must be a list of texts, not {_kind_of(value)}")
    for at, item in enumerate(value):
        _checked(item, f"{where}: field {field!r}[{at}]")
    return value


def _checked(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what} must be a text, not {_kind_of(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        # JSON may spell half of a surrogate pair, which no tokenizer takes.
        raise DataError(f"{what} is no valid Unicode text (character {error.start})") from None
    return value


def _kind_of(value: object) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else names[type(value)]
