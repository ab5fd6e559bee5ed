"""Scores of one sample: text against reference answers, logits against full prefill's.

F1 and exact match follow SQuAD (arXiv:1606.05250: lower case, no punctuation, no articles), Rouge-L is that
of the rouge-score package with stemming. Distributions are compared in float64.
"""

import re
import string
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lmcache_blend.errors import ConfigError

ROWS_AT_ONCE = 16
"""Rows of logits taken to float64 together; bounds memory at large vocabularies."""

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces.

    >>> normalise("  The  Eiffel Tower!")
    'eiffel tower'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def text_scores(prediction: str, answers: Sequence[str]) -> dict[str, float]:
    """f1, em, rouge_l and contains (an answer stands in the prediction), each the best over answers, 0 to 1.

    Raises ConfigError where there are no answers or rouge-score is not installed.

    >>> text_scores("The tower in Paris.", ["Paris", "in Lyon"])["contains"]
    1.0
    """
    if not answers:
        raise ConfigError("text scores need at least one answer; fidelity sets are measured by KL")
    guess = normalise(prediction)
    wanted = [normalise(answer) for answer in answers]
    rouge = _rouge()
    return {
        "f1": max(token_f1(guess, answer) for answer in wanted),
        "em": float(guess in wanted),
        "rouge_l": max(rouge.score(answer, prediction)["rougeL"].fmeasure for answer in answers),
        "contains": float(any(f" {answer} " in f" {guess} " for answer in wanted if answer)),
    }


def token_f1(prediction: str, answer: str) -> float:
    """F1 of the words that two normalised texts share; two empty ones agree.

    >>> token_f1("red old boat", "old red ship")
    0.6666666666666666
    """
    guessed, wanted = prediction.split(), answer.split()
    if not guessed or not wanted:
        return float(guessed == wanted)
    shared = sum((Counter(guessed) & Counter(wanted)).values())
    return 2 * shared / (len(guessed) + len(wanted))


def nll(logits: Tensor, tokens: Tensor) -> float:
    """Mean negative log likelihood of tokens [n] int64 under logits [n, V], nats per token."""
    _check(logits, tokens)
    total = sum(_nll_sum(rows, wanted) for rows, wanted in _blocks(logits, tokens))
    return total / len(tokens)


def logit_scores(logits: Tensor, reference: Tensor, tokens: Tensor) -> dict[str, float]:
    """A method's logits [n, V] against full prefill's [n, V], over the answer's tokens [n] int64.

    nll: of the tokens under the method, mean, nats. kl: mean KL(reference || method), nats, at least 0.
    top1_agreement: fraction of rows where both name the same most likely token. Raises ConfigError on shapes
    that do not fit.
    """
    _check(logits, tokens)
    if reference.shape != logits.shape:
        raise ConfigError(f"logits {tuple(logits.shape)} and reference {tuple(reference.shape)} differ in shape")
    nll_sum = kl_sum = 0.0
    for rows, wanted, full in _blocks(logits, tokens, reference):
        nll_sum += _nll_sum(rows, wanted)
        log_q, log_p = (x.double().log_softmax(-1) for x in (rows, full))
        # A token that full prefill rules out (logit -inf) adds nothing, where 0 * inf would be NaN.
        terms = torch.where(log_p.isneginf(), 0.0, log_p.exp() * (log_p - log_q))
        kl_sum += float(terms.sum())
    agree = (logits.argmax(-1) == reference.argmax(-1)).double().mean()
    kl = kl_sum / len(tokens)
    # Rounding alone can bring the divergence of equal distributions just below 0; max() would hide a NaN.
    return {"nll": nll_sum / len(tokens), "kl": 0.0 if -1e-9 < kl < 0 else kl, "top1_agreement": float(agree)}


def _nll_sum(logits: Tensor, tokens: Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits.double(), tokens, reduction="sum"))


def _blocks(logits: Tensor, tokens: Tensor, *more: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(x.split(ROWS_AT_ONCE) for x in (logits, tokens.to(logits.device), *more)), strict=True)


def _check(logits: Tensor, tokens: Tensor) -> None:
    if logits.dim() != 2 or tokens.shape != logits.shape[:1] or len(tokens) == 0:
        raise ConfigError(
            f"logits [n, V] and tokens [n], n at least 1, are needed; "
            f"got {tuple(logits.shape)} and {tuple(tokens.shape)}"
        )


@lru_cache(maxsize=1)
def _rouge() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        raise ConfigError("Rouge-L needs the rouge-score package: pip install 'lmcache-blend[eval]'") from None
    return RougeScorer(["rougeL"], use_stemmer=True)
