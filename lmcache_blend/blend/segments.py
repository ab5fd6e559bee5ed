"""Where reusable text begins and ends: explicit spans, a separator, or whole passages of text."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lmcache_blend.errors import ConfigError, SegmentError
from lmcache_blend.types import Prompt


def by_separator(tokens: Sequence[int] | Tensor, separator: Sequence[int], prefix: bool = False) -> Prompt:
    """Spans that end with a separator each; what follows the last one is computed.

    tokens, separator: token ids (the separator as it stands in `tokens`: a tokenizer may give it other ids inside
    text).
    prefix: whether the first span is the shared instruction prefix. No separator found: no span, all is computed.
    Raises SegmentError for an empty separator.
    """
    if not len(separator):
        raise SegmentError("the separator has no tokens; give a text that the tokenizer does not drop")
    ids, mark = torch.as_tensor(tokens, dtype=torch.long), torch.tensor(list(separator))
    spans, start, i = [], 0, 0
    if len(ids) >= len(mark):
        hits = (ids.unfold(0, len(mark), 1) == mark).all(1).nonzero().flatten().tolist()
        for i in hits:
            if i < start:  # overlapping occurrence of the separator itself
                continue
            spans.append((start, i + len(mark)))
            start = i + len(mark)
    return Prompt(ids, tuple(spans), prefix=prefix and bool(spans))


def by_passages(
    tokenizer: Any, passages: Sequence[str], question: str = "", prefix: str = "", separator: str = ""
) -> Prompt:
    """One span a passage, each tokenised on its own together with the separator that follows it, never re-tokenised."""
    if tokenizer is None:
        raise ConfigError("passages of text need a tokenizer: build the runner with one, or pass a Prompt of token ids")

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    return Prompt.join([ids(p) + ids(separator) for p in passages if p], ids(question), ids(prefix))
