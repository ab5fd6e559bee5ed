"""Real English prose without a download: the language reference that CPython ships as `pydoc_data.topics`.

The text differs a little between Python versions, so generated samples are the same for one seed and one
Python version.
"""

import random
import re
from functools import lru_cache
from pydoc_data import topics

MIN_WORDS = 15
_MARKUP = str.maketrans({"“": '"', "”": '"', "’": "'", "‘": "'", "…": "...", "*": "", '"': "", "`": "", "—": " - "})
_NOTES = ("Changed in version", "New in version", "Added in version", "Deprecated")
_CODE = re.compile(r"::|->|>>>|==|\[\]|[{}<>|\\=]|_\w*_")


@lru_cache(maxsize=1)
def sentences() -> tuple[tuple[str, ...], ...]:
    """Paragraphs of plain prose, each as its sentences; grammar, code, lists and tables are left out."""
    found = {}
    for topic in sorted(topics.topics):
        for block in re.split(r"\n\s*\n", topics.topics[topic]):
            if not block[:1].isupper() or block.startswith(_NOTES) or _CODE.search(block):
                continue
            text = " ".join(block.translate(_MARKUP).split())
            letters = sum(c.isalpha() or c.isspace() for c in text)
            if len(text.split()) >= MIN_WORDS and text[-1] in ".!?" and letters > 0.93 * len(text):
                found[text] = tuple(re.split(r"(?<=[.!?])\s+(?=[A-Z])", text))
    return tuple(found.values())


def haystack(rng: random.Random, passages: int, words: int) -> list[list[str]]:
    """`passages` lists of sentences of about `words` words; no paragraph twice before all were used."""
    pool = list(sentences())
    at = rng.randrange(len(pool))
    out = []
    for _ in range(passages):
        passage: list[str] = []
        size = 0
        while size < words:
            for sentence in pool[at % len(pool)]:
                if size < words:
                    passage.append(sentence)
                    size += len(sentence.split())
            at += 1
        out.append(passage)
    rng.shuffle(out)
    return out
