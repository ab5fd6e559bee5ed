"""Public sets from the Hugging Face hub, through the `datasets` package.

Multi-hop QA and news come from LongBench (arXiv:2308.14508), whose contexts are cut at their "Passage N:"
marks; SAMSum (arXiv:1911.12237) is read as it is, one dialogue a prompt, and as `longbench/samsum` behind
worked examples.
Rows become samples in functions that know nothing of the download.
"""

import logging
import random
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lmcache_blend.config import Config
from lmcache_blend.errors import DataError
from lmcache_blend.eval.tasks.base import register_task
from lmcache_blend.eval.tasks.sample import Sample, Task

Row = Mapping[str, Any]

LONGBENCH = "Xnhyacinth/LongBench"
"""LongBench as Parquet: the original repository is a loading script, which `datasets` no longer runs."""
SAMSUM = "knkarthick/samsum"

PASSAGES = r"Passage \d+:\n"
MAX_NEW_TOKENS_SAMSUM = 64


@dataclass(frozen=True)
class Subset:
    """One LongBench subset. split: between passages. ask: the question of rows that have none."""

    kind: str
    max_new_tokens: int
    split: str | None = None
    ask: str = ""


SUBSETS = {
    "2wikimqa": Subset("qa", 32, PASSAGES),
    "hotpotqa": Subset("qa", 32, PASSAGES),
    "musique": Subset("qa", 32, PASSAGES),
    "multifieldqa_en": Subset("qa", 64),
    "narrativeqa": Subset("qa", 128),
    "qasper": Subset("qa", 128),
    "gov_report": Subset("summ", 512, ask="Write a one-page summary of the report."),
    "multi_news": Subset("summ", 512, PASSAGES, ask="Write a one-page summary of all news."),
    "qmsum": Subset("summ", 512),
    "samsum": Subset("fewshot", 128, r"(?m)^(?=Dialogue:)"),
    "trec": Subset("fewshot", 64),
    "triviaqa": Subset("fewshot", 32, r"(?m)^(?=Passage:)"),
}
"""English QA, summarisation and few-shot subsets; answer lengths are LongBench's own."""


def longbench_sample(row: Row, subset: str) -> Sample:
    """A LongBench row {input, context, answers, _id, ...} as a sample; its passages become contexts."""
    spec = SUBSETS[subset]
    parts = re.split(spec.split, row["context"]) if spec.split else [row["context"]]
    return Sample(
        id=f"longbench/{subset}/{row['_id']}",
        question=row["input"].strip() or spec.ask,
        contexts=tuple(part.strip() for part in parts if part.strip()),
        answers=tuple(answer for answer in row["answers"] if answer.strip()),
    )


def samsum_sample(row: Row) -> Sample:
    """A SAMSum row {id, dialogue, summary} as a sample with the dialogue as its one context."""
    return Sample(
        id=f"samsum/{row['id']}",
        question="Summarize the dialogue.",
        contexts=(row["dialogue"].strip(),),
        answers=(row["summary"].strip(),),
    )


def load_rows(repo: str, config: str | None, split: str) -> Any:
    """Rows of one split, from the hub or its local cache; raises DataError in one line, with a way round."""
    named = f"{repo} ({config}, {split})" if config else f"{repo} ({split})"
    way = "--data FILE.jsonl reads local samples instead"
    try:
        import datasets
    except ImportError:
        raise DataError(f"set {named} needs the datasets package: pip install 'lmcache-blend[eval]'; {way}") from None
    try:
        with _quiet("huggingface_hub", "datasets"):
            return datasets.load_dataset(repo, config, split=split)
    except Exception as error:
        # HTTP, cache, format and authentication all raise their own types; to the user they are one thing.
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"cannot load set {named} from the hub: {reason}; {way}") from None


def samples_of(rows: Any, to_sample: Callable[[Row], Sample], limit: int, seed: int, name: str) -> tuple[Sample, ...]:
    """The first `limit` usable rows, in their own order for seed 0, else shuffled by the seed.

    Rows without any text are left out. Raises DataError where a row lacks a field or no row is usable.
    """
    order = list(range(len(rows)))
    if seed:
        random.Random(seed).shuffle(order)
    samples: dict[str, Sample] = {}
    for at in order:
        if len(samples) == limit:
            break
        try:
            sample = to_sample(rows[at])
        except (KeyError, AttributeError, TypeError) as error:
            raise DataError(f"set {name}, row {at}: not in the expected layout ({error!r})") from None
        if any(sample.contexts):
            samples.setdefault(sample.id, sample)
    if not samples:
        raise DataError(f"set {name} holds no usable rows")
    return tuple(samples.values())


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Retries are not worth a warning each: what comes of them is said once, in the error."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _register_longbench(name: str, subset: str) -> None:
    spec = SUBSETS[subset]

    def load(limit: int, seed: int, options: Config) -> Task:
        rows = load_rows(LONGBENCH, subset, "test")
        samples = samples_of(rows, lambda row: longbench_sample(row, subset), limit, seed, name)
        return Task(name, spec.kind, samples, spec.max_new_tokens)

    # Each has a name of its own, so that the registry can tell a second registration from a clash.
    load.__qualname__ = f"load[{name}]"
    load.__doc__ = f"LongBench's {subset}."
    register_task(name)(load)


for _subset in SUBSETS:
    _register_longbench(f"longbench/{_subset}", _subset)
for _subset in ("2wikimqa", "hotpotqa", "musique", "multi_news"):
    _register_longbench(_subset, _subset)


@register_task("samsum")
def samsum(limit: int, seed: int, options: Config) -> Task:
    """SAMSum's test split."""
    rows = load_rows(SAMSUM, None, "test")
    samples = samples_of(rows, samsum_sample, limit, seed, "samsum")
    return Task("samsum", "summ", samples, MAX_NEW_TOKENS_SAMSUM)
