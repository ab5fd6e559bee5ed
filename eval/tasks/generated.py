"""Retrieval tasks made by code: nothing to download, any size, the same samples for the same seed.

needle and multi_key follow RULER's niah_single and niah_multikey (arXiv:2404.06654), variable_tracing its
variable tracking asked as one value, key_value the retrieval of Lost in the Middle (arXiv:2307.03172).
"""

import json
import random
from collections.abc import Callable
from itertools import pairwise

import pydantic

from lmcache_blend.config import Config
from lmcache_blend.errors import ConfigError
from lmcache_blend.eval.tasks.base import register_task
from lmcache_blend.eval.tasks.haystack import haystack
from lmcache_blend.eval.tasks.sample import Sample, Task, max_new_tokens
from lmcache_blend.eval.tasks.words import ADJECTIVES, NOUNS

MAX_KEYS = len(ADJECTIVES) * len(NOUNS) // 4
"""Keys that one prompt may hold, so that drawing different ones stays quick."""


class HaystackOptions(Config):
    """Size of the text around the facts."""

    passages: int = pydantic.Field(default=10, ge=1, le=10_000)
    """Number of passages."""
    words: int = pydantic.Field(default=110, ge=10, le=100_000)
    """Words in each passage."""


class MultiKeyOptions(HaystackOptions):
    """Several facts, one of them asked for."""

    needles: int = pydantic.Field(default=8, ge=2, le=MAX_KEYS)
    """Number of keys with a value."""


class KeyValueOptions(Config):
    """JSON objects, one a passage."""

    passages: int = pydantic.Field(default=10, ge=1, le=10_000)
    """Number of JSON objects."""
    pairs: int = pydantic.Field(default=8, ge=1, le=10_000)
    """Pairs of key and value in each object."""


class TracingOptions(HaystackOptions):
    """Chains of assignments, one of them asked for."""

    chains: int = pydantic.Field(default=4, ge=1, le=100)
    """Number of chains that start with values of their own."""
    hops: int = pydantic.Field(default=2, ge=1, le=50)
    """Steps from the variable that is asked for back to the one that holds the number."""


def generate(name: str, kind: str, limit: int, seed: int, draw: Callable[[random.Random], tuple]) -> Task:
    """`limit` samples of draw(rng) -> (question, contexts, answers), each with a generator of its own."""
    samples = []
    for index in range(limit):
        sample_id = f"{name}/{seed}/{index}"
        question, contexts, answers = draw(random.Random(sample_id))
        samples.append(Sample(sample_id, question, tuple(contexts), tuple(answers)))
    return Task(name, kind, tuple(samples), max_new_tokens(kind))


@register_task("needle", HaystackOptions)
def needle(limit: int, seed: int, options: HaystackOptions) -> Task:
    """One magic number in English prose."""
    return generate("needle", "needle", limit, seed, lambda rng: _needles(rng, options, 1))


@register_task("multi_key", MultiKeyOptions)
def multi_key(limit: int, seed: int, options: MultiKeyOptions) -> Task:
    """Several magic numbers in English prose, one asked for."""
    return generate("multi_key", "needle", limit, seed, lambda rng: _needles(rng, options, options.needles))


@register_task("key_value", KeyValueOptions)
def key_value(limit: int, seed: int, options: KeyValueOptions) -> Task:
    """Look one key up in JSON objects.

    Raises ConfigError where there are more pairs than different keys.
    """
    total = options.passages * options.pairs
    if total > MAX_KEYS:
        raise ConfigError(f"passages * pairs = {total} is more than {MAX_KEYS} different keys; lower one of them")

    def draw(rng: random.Random) -> tuple:
        keys, values = _keys(rng, total), _numbers(rng, total, digits=7)
        rows = list(zip(keys, values, strict=True))
        size = options.pairs
        contexts = [json.dumps(dict(rows[at : at + size]), indent=0) for at in range(0, total, size)]
        key, value = rng.choice(rows)
        return key, contexts, (value,)

    return generate("key_value", "kv", limit, seed, draw)


@register_task("variable_tracing", TracingOptions)
def variable_tracing(limit: int, seed: int, options: TracingOptions) -> Task:
    """Follow VAR B = VAR A back to VAR A = 12345.

    Raises ConfigError where there are more variables than names.
    """
    size = options.hops + 1
    if options.chains * size > len(NOUNS):
        raise ConfigError(
            f"chains * (hops + 1) = {options.chains * size} is more than {len(NOUNS)} variable names; lower one of them"
        )

    def draw(rng: random.Random) -> tuple:
        names = [name.upper() for name in rng.sample(NOUNS, options.chains * size)]
        values = _numbers(rng, options.chains, digits=5)
        passages = haystack(rng, options.passages, options.words)
        for chain, value in enumerate(values):
            links = names[chain * size : (chain + 1) * size]
            texts = [f"VAR {links[0]} = {value}."]
            texts += [f"VAR {link} = VAR {before}." for before, link in pairwise(links)]
            _insert_in_order(rng, passages, texts)
        asked = rng.randrange(options.chains)
        last = names[(asked + 1) * size - 1]
        question = f"Variables are set as in VAR A = VAR B. What number does VAR {last} hold?"
        return question, map(" ".join, passages), (values[asked],)

    return generate("variable_tracing", "needle", limit, seed, draw)


def _needles(rng: random.Random, options: HaystackOptions, count: int) -> tuple:
    passages = haystack(rng, options.passages, options.words)
    keys, numbers = _keys(rng, count), _numbers(rng, count, digits=7)
    for key, number in zip(keys, numbers, strict=True):
        place = rng.randrange(len(passages))
        at = rng.randint(0, len(passages[place]))
        passages[place].insert(at, f"The special magic number for {key} is: {number}.")
    question = f"What is the special magic number for {keys[0]} mentioned in the provided text?"
    return question, map(" ".join, passages), (numbers[0],)


def _insert_in_order(rng: random.Random, passages: list[list[str]], texts: list[str]) -> None:
    """Put texts between sentences at random, each before the next: a variable is set before it is read."""
    slots = [(place, at) for place, passage in enumerate(passages) for at in range(len(passage) + 1)]
    chosen = sorted(rng.choices(slots, k=len(texts)))
    # From the back, so that one insertion does not move the slots of the others.
    for (place, at), text in zip(reversed(chosen), reversed(texts), strict=True):
        passages[place].insert(at, text)


def _keys(rng: random.Random, count: int) -> list[str]:
    """Different keys of two words."""
    keys: dict[str, None] = {}
    while len(keys) < count:
        keys[f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"] = None
    return list(keys)


def _numbers(rng: random.Random, count: int, digits: int) -> list[str]:
    """Different numbers of that many digits."""
    return [str(number) for number in rng.sample(range(10 ** (digits - 1), 10**digits), count)]
