"""A logits processor for vLLM that decodes given tokens: the likelihood of an answer behind a blended prompt.

vLLM's prompt_logprobs would compute the whole prompt anew, and so tell nothing about blended KV. Logprobs of decoded
tokens are taken from the raw logits, before this processor changes them. Add it to a server with
`--logits-processors lmcache_blend.serving.forced:ForcedTokens`.
"""

from collections.abc import Callable

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from lmcache_blend.serving.requests import FORCED

Force = Callable[[list[int], torch.Tensor], torch.Tensor]
"""(ids decoded so far, logits [V]) -> logits."""


class ForcedTokens(AdapterLogitsProcessor):
    """Decodes the token ids in a request's extra argument `lmcache_blend_forced`, then stops forcing."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raises ValueError where the argument is no list of token ids."""
        ids = (sampling_params.extra_args or {}).get(FORCED)
        if ids is not None and not (isinstance(ids, list) and all(isinstance(i, int) and i >= 0 for i in ids)):
            raise ValueError(f"{FORCED} = {ids!r}: a list of token ids is needed")

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Force | None:
        forced: list[int] = (params.extra_args or {}).get(FORCED) or []
        if not forced:
            return None

        def force(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            if len(output_ids) < len(forced):
                wanted = forced[len(output_ids)]
                if wanted < len(logits):
                    logits.fill_(float("-inf"))
                    logits[wanted] = 0.0
            return logits

        return force
