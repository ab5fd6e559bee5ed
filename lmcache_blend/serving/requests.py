"""What a measurement sends to vLLM and what comes back, whether offline or over HTTP. Needs no vLLM."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

FORCED = "lmcache_blend_forced"
"""Name of the extra argument that holds the tokens to be forced (serving.forced)."""


@dataclass(frozen=True)
class Request:
    """A greedy completion of a prompt of token ids.

    salt: separates vLLM's own prefix cache; requests of one salt share it. forced: token ids that are decoded whatever
    the model says, so that their likelihood can be read; they replace max_tokens. kv_transfer: kv_transfer_params.
    stream: over HTTP, whether the first token's time counts; what the connector reports comes with whole answers only.
    """

    tokens: Sequence[int]
    max_tokens: int = 1
    salt: str = ""
    forced: Sequence[int] = ()
    stop_ids: Sequence[int] = ()
    kv_transfer: dict[str, Any] = field(default_factory=dict)
    stream: bool = False


@dataclass
class Answer:
    """The completion. Times count from the moment at which the request was handed over.

    tokens: what was decoded (over HTTP None, where the text stands in its place). For forced tokens: logprobs [n, V]
    float32 of the model where the engine gives whole distributions, token_logprobs [n] of the forced tokens, and
    top1 [n]: the likeliest token of each place. kv_transfer: what the connector reports. cached_tokens: of the prompt,
    what was not computed, where the engine tells it.
    """

    text: str = ""
    tokens: list[int] | None = None
    ttft_ms: float = 0.0
    latency_ms: float = 0.0
    logprobs: Tensor | None = None
    top1: list[Any] | None = None
    token_logprobs: list[float] | None = None
    kv_transfer: dict[str, Any] = field(default_factory=dict)
    cached_tokens: int = 0


class Client(Protocol):
    """Something that answers requests. `versions` goes into the results."""

    versions: dict[str, str | int]
    max_tokens: int

    def run(self, requests: Sequence[Request]) -> list[Answer]:
        """All of them at once; returns when the last is done. Raises ServingError."""
        ...

    def close(self) -> None: ...
