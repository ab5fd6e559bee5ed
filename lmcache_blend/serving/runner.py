"""VLLMRunner: the ModelRunner of a vLLM worker. It calls the model's own whole forward under a nested forward context.

The chosen rows are split into runs of consecutive positions, and each run is submitted as one pseudo-request whose
sequence ends with the run, over the same block table: stock attention kernels then apply the exact causal mask (and the
sliding window). Where this package's own operators fit (`attend`), they take the backend's place for these rows.
Rows beyond the batch budget go in slices; as they ascend, a later slice finds the keys of an earlier one in the cache,
layer by layer. The forward runs without CUDA graphs.

A forward is stopped (deviation checks, end of a probe, the last layer's KV) by an exception from within an attention
implementation; both eager and compiled models call these from Python.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from lmcache_blend.blend.runner import Computed, Plan
from lmcache_blend.errors import ConfigError, ContextLengthError, UnsupportedModelError
from lmcache_blend.serving.attend import PagedAttention, Rows
from lmcache_blend.serving.kv import PagedKV
from lmcache_blend.serving.learn import learn_rotary, paged_layers, row_cost


class Stop(Exception):
    """Ends a forward early; never leaves VLLMRunner."""


class VLLMRunner:
    """Runs a vLLM model's own forward on chosen rows of one request.

    runner: the worker's model runner, its KV caches registered. fingerprint: identity of model and rank. reduce: sums a
    tensor over the ranks that share the heads (None: this rank has them all), ranks: how many.
    """

    tokenizer = None
    bos_id = None
    stop_ids = ()

    def __init__(
        self,
        runner: Any,
        vllm_config: Any,
        caches: dict[str, Tensor],
        fingerprint: str,
        reduce: Callable[[Tensor], Tensor] | None = None,
        ranks: int = 1,
    ):
        self.runner, self.vllm_config, self.fingerprint = runner, vllm_config, fingerprint
        self.reduce, self.ranks = reduce, ranks
        self.model, self.device = runner.model, runner.device
        self.max_tokens = vllm_config.model_config.max_model_len
        self.budget = vllm_config.scheduler_config.max_num_batched_tokens
        self.groups = self._builders()
        self.layers = paged_layers(vllm_config, caches, self.groups)
        self.num_layers = len(self.layers)
        self.impls = [layer.attention.impl for layer in self.layers]
        self.attention = [PagedAttention(layer) for layer in self.layers]
        for layer in self.layers:
            if getattr(layer.attention.impl, "kv_sharing_target_layer_name", None):
                raise UnsupportedModelError(f"{layer.name} shares the KV of another layer; such models are not blended")
        self.rotary = learn_rotary(self.model, self.layers)
        self.cost = row_cost(self.model, self.layers)

    @property
    def kv_shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        return tuple((x.heads, x.dim, x.heads, x.dim) for x in self.layers)

    def new_kv(self, tokens: int, capacity: int = 0) -> Any:
        raise ConfigError("vLLM allocates the blocks of a request; there is no KV outside of one")

    def _builders(self) -> list[tuple[Any, list[str], Any, int]]:
        """(KV cache group, layers, an own metadata builder, block size): the runner's keep state of its batch."""
        out = []
        # vLLM's two model runners name it differently.
        sizes = getattr(self.runner, "_kernel_block_sizes", None) or getattr(self.runner, "kernel_block_sizes", None)
        with set_current_vllm_config(self.vllm_config):
            for gid, groups in enumerate(self.runner.attn_groups):
                for group in groups:
                    spec, names = group.kv_cache_spec, list(group.layer_names)
                    if sizes and gid < len(sizes) and sizes[gid] != spec.block_size:
                        raise UnsupportedModelError(
                            f"the attention kernel's blocks of {sizes[gid]} tokens differ from the cache's of "
                            f"{spec.block_size}; start with --block-size {sizes[gid]}"
                        )
                    builder = group.backend.get_builder_cls()(spec, names, self.vllm_config, self.device)
                    out.append((gid, names, builder, spec.block_size))
        return out

    # ------------------------------------------------------------------ one nested forward
    def run(self, ids: Tensor, kv: PagedKV, rows: Tensor) -> Tensor:
        """Hidden states [N, hidden] of ascending rows [N] of the prompt ids [T], N within the budget."""
        breaks = (rows.diff() != 1).nonzero().flatten() + 1
        starts = torch.cat((breaks.new_zeros(1), breaks))
        ends = torch.cat((breaks, breaks.new_tensor([len(rows)])))
        bounds = torch.cat((starts, ends[-1:])).int()
        lengths = (rows[ends - 1] + 1).int()
        positions = rows.to(self.device)
        metadata, mapping = {}, {}
        for _, names, builder, size in self.groups:
            slots = kv.blocks[positions // size] * size + positions % size
            table = kv.blocks[: -(-kv.length // size)].int().expand(len(starts), -1).contiguous()
            built = builder.build(
                0,
                CommonAttentionMetadata(
                    query_start_loc=bounds.to(self.device),
                    query_start_loc_cpu=bounds,
                    seq_lens=lengths.to(self.device),
                    num_reqs=len(starts),
                    num_actual_tokens=len(rows),
                    max_query_len=int((ends - starts).max()),
                    max_seq_len=int(lengths.max()),
                    block_table_tensor=table,
                    slot_mapping=slots,
                    causal=True,
                    positions=positions,
                ),
            )
            metadata.update(dict.fromkeys(names, built))
            mapping.update(dict.fromkeys(names, slots))
        with set_forward_context(metadata, self.vllm_config, num_tokens=len(rows), slot_mapping=mapping):
            # The compiled model reads ids as int32 and positions as int64, whatever they are.
            return self.model(
                input_ids=ids[rows].to(self.device, torch.int32),
                positions=positions.long(),
                intermediate_tensors=None,
                inputs_embeds=None,
            )

    def slices(self, rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split(self.budget) if len(rows) else ()

    # ------------------------------------------------------------------ ModelRunner
    @torch.inference_mode()
    def forward(self, tokens: Sequence[Tensor], kvs: Sequence[PagedKV], plan: Plan, logits: int = 1) -> Computed:
        """See ModelRunner; one prompt. Logits are left to vLLM, and plan.observer is not called."""
        (ids,), (kv,), rows = tokens, kvs, plan.rows[0]
        if len(ids) > self.max_tokens:
            raise ContextLengthError(f"{len(ids)} tokens are more than the {self.max_tokens} of --max-model-len")
        if plan.tap is not None:
            self._probe(ids, kv, plan)
            return Computed(None, [rows[None]] * self.num_layers)
        rows_of = [rows[None]] * self.num_layers
        for layer in sorted(plan.checks):
            k, v = self._until(layer, ids, kv, rows)
            keep = plan.checks[layer](layer, rows[None], k, v)[0].cpu()
            rows = rows[keep]
            rows_of[layer:] = [rows[None]] * (self.num_layers - layer)
        for part in self.slices(rows):
            self._write(ids, kv, part)
        return Computed(None, rows_of)

    def _write(self, ids: Tensor, kv: PagedKV, rows: Tensor) -> None:
        """Compute the rows' KV in all layers; what the last one does after its KV update is nobody's input."""

        def stop(*_: Any, **named: Any) -> None:
            raise Stop

        with self._by_operators(kv, rows), _replaced(self.impls[-1:], "forward", lambda i, own: stop), suppress(Stop):
            self.run(ids, kv, rows)

    @contextmanager
    def _by_operators(self, kv: PagedKV, rows: Tensor) -> Iterator[None]:
        """Attention of the rows through this package's operators, in the layers where they fit."""
        fits = [a for a in self.attention if a.takes(len(rows), kv.length)]
        chosen = Rows(rows.to(self.device))

        def attend(i: int, own: Any) -> Callable[..., Any]:
            def forward(
                layer: Any, q: Tensor, k: Tensor, v: Tensor, cache: Any, metadata: Any, output: Tensor, *rest, **kw
            ):
                if any(x is not None for x in (*rest, *kw.values())):  # scales of a quantised output
                    return own(layer, q, k, v, cache, metadata, output, *rest, **kw)
                n, dim = len(rows), fits[i].layer.dim
                out = fits[i].rows(q[:n].view(n, -1, dim), kv, chosen)
                output[:n].view(n, -1, dim).copy_(out)
                return output

            return forward

        with _replaced([a.layer.attention.impl for a in fits], "forward", attend):
            yield

    def _until(self, layer: int, ids: Tensor, kv: PagedKV, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Run rows up to a layer's fresh K, V [1, H, N, D], which are not written; layers below are."""
        fresh: list[tuple[Tensor, Tensor]] = []

        def stop(_: Any, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> None:
            fresh.append((k.clone(), v.clone()))
            raise Stop

        with _replaced([self.impls[layer]], "do_kv_cache_update", lambda i, own: stop):
            for part in self.slices(rows):
                try:
                    with self._by_operators(kv, part):
                        self.run(ids, kv, part)
                except Stop:
                    continue
                raise UnsupportedModelError(f"the forward did not pass layer {layer}'s KV update in Python")
        heads, dim = self.layers[layer].heads, self.layers[layer].dim
        k, v = (torch.cat([pair[slot].view(-1, heads, dim) for pair in fresh]) for slot in (0, 1))
        return k.transpose(0, 1)[None], v.transpose(0, 1)[None]

    def _probe(self, ids: Tensor, kv: PagedKV, plan: Plan) -> None:
        """Run plan.rows with attention that leaves out hidden positions, and hand its weights to plan.tap."""
        tap, rows = plan.tap, plan.rows[0].to(self.device)
        assert tap is not None
        probed = Rows(rows, None if plan.hidden is None else plan.hidden.to(self.device))
        for attention in self.attention:
            if attention.extra:
                raise UnsupportedModelError(
                    f"query probes do not know {attention.extra}; choose the policy epic or cacheblend"
                )

        def attend(layer: int, own: Any) -> Callable[..., Tensor]:
            def forward(
                _: Any, q: Tensor, k: Tensor, v: Tensor, cache: Any, metadata: Any, output: Tensor, *rest, **kw
            ):
                n, dim = len(rows), self.layers[layer].dim
                out, mass, values = self.attention[layer].probe(q[:n].view(n, -1, dim), kv, probed)
                tap(layer, mass[None], values[None])
                if plan.stop_at == layer:
                    raise Stop
                output[:n].view(n, -1, dim).copy_(out)
                return output

            return forward

        with _replaced(self.impls, "forward", attend), suppress(Stop):
            self.run(ids, kv, plan.rows[0])


@contextmanager
def _replaced(owners: Sequence[Any], name: str, make: Callable[[int, Any], Any]) -> Iterator[None]:
    """Give each owner an attribute `name` of its own, make(number, the present one), for a while."""
    before = [vars(owner).get(name) for owner in owners]
    try:
        for i, owner in enumerate(owners):
            setattr(owner, name, make(i, getattr(owner, name)))
        yield
    finally:
        for owner, old in zip(owners, before, strict=True):
            vars(owner).pop(name, None)
            if old is not None:
                setattr(owner, name, old)
