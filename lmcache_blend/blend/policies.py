"""Policies: which reused tokens are computed anew. Each is one small class with one scoring function.

A policy sees `Signals` and gives every token a score; the highest-scoring reused tokens are recomputed, as many as the
recompute ratio says. It never touches a model. Register your own with @policies.register("name").
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lmcache_blend.errors import ConfigError, nearest
from lmcache_blend.registry import Registry


@dataclass
class Signals:
    """What a policy may look at; fields that it does not need (`RowPolicy.needs`) are None.

    tokens: [T] token ids. candidate: [T] bool, the reused tokens. chunk_offset, chunk_length: [T] place of a token in
    its chunk and the chunk's length, in tokens.
    With "query_probe": attention [L, Hq, T], how much the question's rows attend to each token over the reused KV, mean
    over the rows; value_norm [L, Hq, T], L2 norm of each token's V.
    With "deviation" (at a check layer): key_deviation, value_deviation [T], squared L2 distance of fresh and reused
    K, V;
    key_energy, value_energy: mean squared norm of the fresh ones.
    With "oracle": true_deviation [L, T], relative error of the reused KV; attention as above, but of a full prefill.
    """

    tokens: Tensor
    candidate: Tensor
    chunk_offset: Tensor
    chunk_length: Tensor
    attention: Tensor | None = None
    value_norm: Tensor | None = None
    key_deviation: Tensor | None = None
    value_deviation: Tensor | None = None
    key_energy: float = 1.0
    value_energy: float = 1.0
    true_deviation: Tensor | None = None


class RowPolicy:
    """Base of policies. needs: subset of {"query_probe", "deviation", "oracle"}. reuse: which chunks are taken from the
    store: "all", "prefix" (exact ones at the front) or "none". fixed_ratio: for methods that have no ratio."""

    needs: ClassVar[frozenset[str]] = frozenset()
    reuse: ClassVar[Literal["all", "prefix", "none"]] = "all"
    fixed_ratio: ClassVar[float | None] = None

    def score(self, signals: Any) -> Tensor:
        """[T] float: the higher, the sooner a token is recomputed."""
        raise ConfigError(f"policy {type(self).__name__} has no score function; define score(self, signals) -> [T]")

    def schedule(self, layers: int, ratio: float) -> dict[int, float]:
        """Layer -> share of the reused tokens that is computed from there on; layer 0: before the forward."""
        return {0: ratio}


policies: Registry[type[RowPolicy]] = Registry("policy", "lmcache_blend.policies")
register_policy = policies.register


def get_policy(name: str, options: Mapping[str, Any] | None = None) -> RowPolicy:
    """The policy of that name with `options` as its fields; raises UnknownNameError, ConfigError."""
    cls, options = policies.get(name), dict(options or {})
    fields = getattr(cls, "__dataclass_fields__", {})
    for key in options:
        if key not in fields:
            known = nearest(key, fields) if fields else "it has none"
            raise ConfigError(f"policy {name!r} has no option {key!r}: {known}")
    return cls(**options)


@policies.register("full_recompute")
@dataclass(frozen=True)
class FullRecompute(RowPolicy):
    """Full prefill: nothing is reused."""

    reuse = "none"
    fixed_ratio = 1.0


@policies.register("prefix_cache")
@dataclass(frozen=True)
class PrefixCache(RowPolicy):
    """Prefix caching: exact chunks at the front are taken, everything behind them is computed."""

    reuse = "prefix"
    fixed_ratio = 0.0


@policies.register("full_reuse")
@dataclass(frozen=True)
class FullReuse(RowPolicy):
    """Full reuse (PromptCache, arXiv 2311.04934): every chunk is taken as it is, nothing is recomputed."""

    fixed_ratio = 0.0


@policies.register("random")
@dataclass(frozen=True)
class Random(RowPolicy):
    """Random tokens, the floor that a policy must beat."""

    seed: int = 0

    def score(self, signals: Signals) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand(len(signals.tokens), generator=generator).to(signals.tokens.device)


@policies.register("epic")
@dataclass(frozen=True)
class Epic(RowPolicy):
    """EPIC / LegoLink (arXiv 2410.15332): the first k tokens of every chunk."""

    def score(self, signals: Signals) -> Tensor:
        return -signals.chunk_offset.float()


@policies.register("cacheblend")
@dataclass(frozen=True)
class CacheBlend(RowPolicy):
    """CacheBlend (arXiv 2405.16444): the tokens whose K and V deviate most from the reused ones (HKVD).

    signal: compare "k", "v" or "kv". check: at "single" the tokens are chosen at layer 1; "gradual" is the paper's
    schedule, chosen anew at four depths, from 1.5 times the ratio down to half of it, the ratio on average.
    """

    signal: Literal["k", "v", "kv"] = "kv"
    check: Literal["single", "gradual"] = "single"
    needs = frozenset({"deviation"})

    def __post_init__(self) -> None:
        if self.signal not in ("k", "v", "kv"):
            raise ConfigError(f"signal = {self.signal!r}: choose k, v or kv")
        if self.check not in ("single", "gradual"):
            raise ConfigError(f"check = {self.check!r}: choose single or gradual")

    def score(self, signals: Signals) -> Tensor:
        assert signals.key_deviation is not None
        assert signals.value_deviation is not None
        k, v = signals.key_deviation / signals.key_energy, signals.value_deviation / signals.value_energy
        return {"k": k, "v": v, "kv": k + v}[self.signal]

    def schedule(self, layers: int, ratio: float) -> dict[int, float]:
        if self.check == "single" or layers < 8:
            return {1: ratio}
        factors = (1.5, 7 / 6, 5 / 6, 0.5)
        return {max(1, i * layers // 4): min(1.0, factor * ratio) for i, factor in enumerate(factors)}


@policies.register("query_attention")
@dataclass(frozen=True)
class QueryAttention(RowPolicy):
    """ProphetKV (arXiv 2602.02579): the tokens that the question attends to over the reused KV, all layers fused.

    max_queries: rows of the question that are probed, the last ones.
    """

    max_queries: int = 64
    needs = frozenset({"query_probe"})

    def score(self, signals: Signals) -> Tensor:
        assert signals.attention is not None
        return signals.attention.mean((0, 1))


@policies.register("attention_value_norm")
@dataclass(frozen=True)
class AttentionValueNorm(RowPolicy):
    """InfoFlow (arXiv 2603.05353): attention of the question times the norm of V, what a token adds to the answer."""

    max_queries: int = 64
    needs = frozenset({"query_probe"})

    def score(self, signals: Signals) -> Tensor:
        assert signals.attention is not None
        assert signals.value_norm is not None
        return (signals.attention * signals.value_norm).mean((0, 1))


@policies.register("oracle")
@dataclass(frozen=True)
class Oracle(RowPolicy):
    """Analysis only: true deviation times true attention, both of a full prefill that it runs (and counts) first."""

    max_queries: int = 64
    needs = frozenset({"oracle"})

    def score(self, signals: Signals) -> Tensor:
        assert signals.attention is not None
        assert signals.true_deviation is not None
        return (signals.attention.mean(1) * signals.true_deviation.nan_to_num(0.0)).mean(0)
