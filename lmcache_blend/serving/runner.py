"""VLLMRunner: the ModelRunner of a vLLM worker. It calls the model's own whole forward under a nested forward context.

The chosen rows are split into runs of consecutive positions, and each run is submitted as one pseudo-request whose
sequence ends with the run, over the same block table: stock attention kernels then apply the exact causal mask (and the
sliding window), and 300 rows in 1 or 288 runs cost the same. Rows beyond the batch budget go in slices; as they ascend,
a later slice finds the keys of an earlier one in the cache, layer by layer. On CUDA the same holds for the stock
backends, and the forward runs without CUDA graphs: the triton operators of this package work on dense
buffers or one block layout, while here the backend's own kernel knows its cache.

A forward is stopped (deviation checks, end of a probe) by an exception from within an attention implementation; both
eager and compiled models call these from Python.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from vllm.config import set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from lmcache_blend.blend.runner import Computed, CostModel, Plan
from lmcache_blend.errors import ConfigError, ContextLengthError, UnsupportedModelError
from lmcache_blend.rotary import RotaryTable
from lmcache_blend.serving.kv import PagedKV, PagedLayer
from lmcache_blend.triton_kernels.attention import row_attention_mass
from lmcache_blend.types import RotarySlice


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
        self.attention = [layer.attention for layer in self.layers]
        for layer in self.layers:
            if getattr(layer.attention.impl, "kv_sharing_target_layer_name", None):
                raise UnsupportedModelError(f"{layer.name} shares the KV of another layer; such models are not blended")
        self.rotary = learn_rotary(self.model, self.layers)
        self.cost = _cost(self.model, self.layers)

    @property
    def kv_shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        return tuple((x.heads, x.dim, x.heads, x.dim) for x in self.layers)

    def new_kv(self, tokens: int, capacity: int = 0) -> Any:
        raise ConfigError("vLLM allocates the blocks of a request; there is no KV outside of one")

    def _builders(self) -> list[tuple[Any, list[str], Any, int]]:
        """(KV cache group, layers, an own metadata builder, block size): the runner's keep state of its batch."""
        out = []
        sizes = getattr(self.runner, "_kernel_block_sizes", None)
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
            self.run(ids, kv, part)
        return Computed(None, rows_of)

    def _until(self, layer: int, ids: Tensor, kv: PagedKV, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Run rows up to a layer's fresh K, V [1, H, N, D], which are not written; layers below are."""
        fresh: list[tuple[Tensor, Tensor]] = []

        def stop(_: Any, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> None:
            fresh.append((k.clone(), v.clone()))
            raise Stop

        with _replaced([self.attention[layer].impl], "do_kv_cache_update", lambda i, own: stop):
            for part in self.slices(rows):
                try:
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
        columns = torch.arange(kv.length, device=self.device)
        seen = columns[None] <= rows[:, None]
        if plan.hidden is not None:
            seen = seen & ~plan.hidden.to(self.device)

        def attend(layer: int, own: Any) -> Callable[..., Tensor]:
            impl = self.attention[layer].impl
            window, cap = getattr(impl, "sliding_window", None), getattr(impl, "logits_soft_cap", None)
            for name in ("alibi_slopes", "sinks"):
                if getattr(impl, name, None) is not None:
                    raise UnsupportedModelError(
                        f"query probes do not know {name}; choose the policy epic or cacheblend"
                    )
            if cap:
                raise UnsupportedModelError("query probes do not know soft caps; choose the policy epic or cacheblend")
            # (left, right) of FlashAttention counts the keys before a row, CPU attention the row as well.
            reach = window[0] + 1 if isinstance(window, tuple) else window
            visible = seen if not reach or reach <= 0 else seen & (columns[None] > rows[:, None] - reach)

            def forward(
                _: Any, q: Tensor, k: Tensor, v: Tensor, cache: Any, metadata: Any, output: Tensor, *rest, **kw
            ):
                keys, values = kv.layer(layer)
                query = q[: len(rows)].view(len(rows), -1, q.shape[-1] if q.dim() == 3 else keys.shape[-1])
                mask = torch.zeros(visible.shape, dtype=query.dtype, device=self.device)
                mask.masked_fill_(~visible, torch.finfo(query.dtype).min)
                out, mass = row_attention_mass(
                    query.transpose(0, 1)[None].contiguous(), keys[None].contiguous(), values[None].contiguous(),
                    mask[None, None], [int(rows[-1])], impl.scale,
                )  # fmt: skip
                tap(layer, mass, values[None])
                if plan.stop_at == layer:
                    raise Stop
                output[: len(rows)].view(len(rows), -1, keys.shape[-1]).copy_(out[0].transpose(0, 1))
                return output

            return forward

        with _replaced([a.impl for a in self.attention], "forward", attend):
            try:
                self.run(ids, kv, plan.rows[0])
            except Stop:
                return


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


def paged_layers(vllm_config: Any, caches: dict[str, Tensor], groups: Sequence[tuple]) -> list[PagedLayer]:
    """The attention layers in the model's order. Raises UnsupportedModelError for other kinds of state."""
    context = vllm_config.compilation_config.static_forward_context
    size = {name: block for _, names, _, block in groups for name in names}
    other = sorted(set(caches) - set(size))
    if other or len({gid for gid, *_ in groups}) > 1:
        raise UnsupportedModelError(
            f"KV in several cache groups ({', '.join(other) or 'hybrid'}): start with "
            "--disable-hybrid-kv-cache-manager; "
            "state that is not attention's (Mamba) is not stored"
        )
    names = sorted(caches, key=lambda n: [int(part) for part in n.split(".") if part.isdigit()])
    out = []
    for name in names:
        attention, cache = context[name], caches[name]
        if not isinstance(cache, Tensor) or not hasattr(attention, "num_kv_heads"):
            raise UnsupportedModelError(
                f"{name} is {type(attention).__name__}, whose state is no pair of K and V (MLA)"
            )
        if cache.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise UnsupportedModelError(f"a KV cache of {cache.dtype} is not stored; start with --kv-cache-dtype auto")
        out.append(PagedLayer(name, attention, cache, size[name], scratch=1))
    return out


def learn_rotary(model: Any, layers: Sequence[PagedLayer]) -> RotaryTable:
    """Rotation of each layer from the rotary module beside its Attention, checked against that module.

    Raises UnsupportedModelError.
    """
    path = {id(module): name for name, module in model.named_modules()}
    sources: list[Any] = []
    pieces: list[RotarySlice | None] = []
    for layer in layers:
        parent = model.get_submodule(path[id(layer.attention)].rpartition(".")[0])
        module = getattr(parent, "rotary_emb", None)
        if module is None:
            pieces.append(None)
            continue
        if not isinstance(getattr(module, "cos_sin_cache", None), Tensor) or hasattr(module, "mrope_section"):
            raise UnsupportedModelError(f"{layer.name}: keys turned by {type(module).__name__} cannot be moved")
        if all(module is not s for s in sources):
            sources.append(module)
        pairing = "half" if module.is_neox_style else "interleaved"
        source = next(i for i, s in enumerate(sources) if s is module)
        pieces.append(RotarySlice(0, 0, module.rotary_dim, pairing, "all", source))

    def replay(positions: Tensor) -> list[tuple[Tensor, Tensor]]:
        out = []
        for module in sources:
            cos, sin = module.cos_sin_cache[positions.to(module.cos_sin_cache.device)].float().cpu().chunk(2, dim=-1)
            out.append((cos[None], sin[None]))
        return out

    table = RotaryTable(tuple(pieces), replay)
    for i, piece in enumerate(pieces):
        if piece is not None:
            _check_rotation(i, layers[i], table, sources[piece.source])
    return table


def _check_rotation(index: int, layer: PagedLayer, table: RotaryTable, module: Any) -> None:
    """The table must turn keys as the module does, at small and at large positions."""
    last = len(module.cos_sin_cache) - 1
    positions = torch.tensor(sorted({0, 1, 7, min(500, last), last}))
    generator = torch.Generator().manual_seed(2)
    k = torch.randn(len(positions), layer.heads * layer.dim, generator=generator)
    wanted = module.forward_native(
        positions.to(module.cos_sin_cache.device),
        k.to(module.cos_sin_cache).clone(),
        k.to(module.cos_sin_cache).clone(),
    )[1]
    pair = k.view(len(positions), layer.heads, layer.dim).transpose(0, 1)
    got = table.at(positions).rotate(index, pair, pair)[0].transpose(0, 1).flatten(1)
    error = float((got - wanted.float().cpu()).norm() / got.norm())
    if not error <= (1e-4 if module.cos_sin_cache.dtype == torch.float32 else 0.02):
        raise UnsupportedModelError(
            f"{layer.name}: {type(module).__name__} is no rotation that is known here ({error:.1e})"
        )


def _cost(model: Any, layers: Sequence[PagedLayer]) -> CostModel:
    """From the sizes of each decoder layer's matrices."""
    path = {id(module): name for name, module in model.named_modules()}
    row, check, attend, window = [], [], [], []
    for layer in layers:
        own = path[id(layer.attention)].split(".")
        cut = max(i for i, part in enumerate(own) if part.isdigit()) + 1
        block = model.get_submodule(".".join(own[:cut]))
        weights = {n: 2.0 * p.numel() for n, p in block.named_parameters() if p.dim() > 1}
        row.append(sum(weights.values()))
        check.append(sum(x for n, x in weights.items() if any(p in n for p in ("qkv", "q_proj", "k_proj", "v_proj"))))
        attend.append(4.0 * layer.attention.num_heads * layer.dim)
        reach = getattr(layer.attention.impl, "sliding_window", None)
        reach = reach[0] + 1 if isinstance(reach, tuple) else reach
        window.append(reach if reach and reach > 0 else None)
    head = model.get_submodule("lm_head") if hasattr(model, "lm_head") else None
    head_cost = 2.0 * sum(p.numel() for p in head.parameters()) if head is not None else 0.0
    zeros = (0.0,) * len(row)
    return CostModel(tuple(row), tuple(check), zeros, tuple(attend), tuple(window), head_cost)
