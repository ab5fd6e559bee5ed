"""HFRunner: the ModelRunner of transformers models. It owns no layer code; see intercept.py for how it gets in."""

import hashlib
import json
import threading
from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcache_blend.blend.runner import Computed, CostModel, Plan
from lmcache_blend.errors import ContextLengthError, UnsupportedModelError
from lmcache_blend.hf.dense import DenseKV, KVPool, Shapes
from lmcache_blend.hf.intercept import CURRENT, NAME, Forward, RowCache, Stop
from lmcache_blend.rotary import RotaryTable


class HFRunner:
    """Runs a transformers decoder's own forward on chosen rows.

    model: any causal LM that passes the gates (hf/gates.py), in eval mode, float32, bfloat16 or float16. Outside
    `forward` the model is as it was, but that one whose attention logits are capped (Gemma 2) leaves SDPA, which drops
    the cap. One forward at a time: calls from several threads wait for each other.

    Use `load_runner` or `HFRunner.checked`, which run the gates; the bare constructor does not.
    """

    rotary: RotaryTable
    cost: CostModel

    def __init__(self, model: PreTrainedModel, tokenizer: Any = None, model_id: str = ""):
        self.model, self.tokenizer = model.eval(), tokenizer
        self.config = model.config.get_text_config(decoder=True)
        self.model_id = model_id or self.config.model_type
        if getattr(self.config, "attn_logit_softcapping", None) and model.config._attn_implementation == "sdpa":
            # Older releases of transformers choose SDPA all the same; the weights were trained with eager's formula.
            model.set_attn_implementation("eager")
        self.layers = _decoder_layers(model, self.config.num_hidden_layers)
        self.num_layers = len(self.layers)
        self.max_tokens = _max_tokens(self.config)
        self.device, self.dtype = model.device, model.dtype
        self.bos_id: int | None = self.config.bos_token_id
        self.stop_ids = _stop_ids(model, tokenizer)
        self.fingerprint = _fingerprint(model)
        self.pool: KVPool | None = None
        self._lock = threading.Lock()
        # Its name since transformers 5.24.
        self._cache_argument = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
        for i, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(self._hook(i), with_kwargs=True)

    @classmethod
    def checked(cls, model: PreTrainedModel, tokenizer: Any = None, model_id: str = "") -> "HFRunner":
        """A runner whose model passed the three gates; raises UnsupportedModelError with the reason otherwise."""
        from lmcache_blend.hf.gates import admit

        return admit(cls(model, tokenizer, model_id))

    def _hook(self, i: int):
        def before(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            forward = CURRENT.get()
            return None if forward is None else forward.before_layer(i, module, args, kwargs)

        return before

    def new_kv(self, tokens: int, capacity: int = 0) -> DenseKV:
        """Buffers for a prompt of T tokens with room for max(T, capacity); raises ContextLengthError."""
        if max(tokens, capacity) > self.max_tokens:
            raise ContextLengthError(
                f"{max(tokens, capacity)} tokens are more than the {self.max_tokens} positions of {self.model_id}; "
                "shorten the context or use a model with more positions"
            )
        assert self.pool is not None, "the gates have not run"
        return DenseKV(self.pool, tokens, capacity)

    @property
    def kv_shapes(self) -> Shapes:
        assert self.pool is not None, "the gates have not run"
        return self.pool.shapes

    def kv_bytes_per_token(self, bits: int = 16) -> float:
        """Bytes of K and V of one token over all layers, at `bits` per element."""
        return sum(h * d + h2 * d2 for h, d, h2, d2 in self.kv_shapes) * bits / 8

    def forward(self, tokens: Sequence[Tensor], kvs: Sequence[DenseKV], plan: Plan, logits: int = 1) -> Computed:
        """See ModelRunner. logits: how many of the last rows to give logits for, 0 for all."""
        return self.run_plan(tokens, kvs, plan, logits)[0]

    @torch.inference_mode()
    def run_plan(
        self, tokens: Sequence[Tensor], kvs: Sequence[DenseKV], plan: Plan, logits: int = 1
    ) -> tuple[Computed, Forward]:
        """`forward`, with the state of the forward beside it."""
        n = max(len(r) for r in plan.rows)
        rows = torch.stack([torch.cat((r, r[-1:].expand(n - len(r)))) for r in plan.rows]).to(self.device)
        forward = Forward(kvs, rows, self.num_layers)
        forward.checks, forward.tap, forward.observer = plan.checks, plan.tap, plan.observer
        forward.stop_at = plan.stop_at
        forward.hidden = None if plan.hidden is None else plan.hidden.to(self.device)
        ids = torch.stack([t.to(self.device)[r] for t, r in zip(tokens, rows, strict=True)])
        return Computed(self.run_rows(forward, ids, rows, logits), forward.rows_of), forward

    def run_rows(self, forward: Forward, ids: Tensor, positions: Tensor, logits: int) -> Tensor | None:
        """The model's forward under `forward`: ids, positions [B, N] -> [B, logits, V] float32, None where stopped."""
        with self._lock:
            token, config = CURRENT.set(forward), self.model.config
            was = config._attn_implementation
            config._attn_implementation = NAME
            try:
                out = self.model(
                    input_ids=ids,
                    position_ids=positions,
                    use_cache=True,
                    logits_to_keep=logits,
                    **{self._cache_argument: RowCache(forward, self.num_layers)},
                )
                return out.logits.float()
            except Stop:
                return None
            finally:
                config._attn_implementation = was
                CURRENT.reset(token)


def _decoder_layers(model: PreTrainedModel, count: int) -> list[nn.Module]:
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return list(module)
    raise UnsupportedModelError(f"{type(model).__name__} has no list of {count} decoder layers to hook")


def _max_tokens(config: Any) -> int:
    """Positions of the model; dynamic NTK scaling goes on beyond max_position_embeddings, by its factor."""
    positions = int(getattr(config, "max_position_embeddings", 0) or 1 << 30)
    rope = getattr(config, "rope_parameters", None) or {}
    return int(positions * rope["factor"]) if rope.get("rope_type") == "dynamic" else positions


def _stop_ids(model: PreTrainedModel, tokenizer: Any) -> tuple[int, ...]:
    generation = getattr(model, "generation_config", None)
    ids = [getattr(owner, "eos_token_id", None) for owner in (generation, model.config, tokenizer)]
    flat = [x for item in ids for x in (item if isinstance(item, list) else [item]) if x is not None]
    return tuple(dict.fromkeys(flat))


def _fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over the configuration and a sample of every weight: other weights, another fingerprint.

    Where the model lies and which release wrote its configuration do not count: stored KV outlives both.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in model.named_parameters():
        flat = weight.detach().view(-1)
        sample = flat[:: max(1, len(flat) // 64)][:64].float().cpu()
        digest.update(f"{name}{tuple(weight.shape)}{weight.dtype}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()
