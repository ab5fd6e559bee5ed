"""What is read off a loaded vLLM model: its paged layers, how it turns keys, what a row costs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from lmcache_blend.blend.runner import CostModel
from lmcache_blend.errors import UnsupportedModelError
from lmcache_blend.rotary import RotaryTable
from lmcache_blend.serving.attend import window_of
from lmcache_blend.serving.kv import PagedLayer
from lmcache_blend.types import RotarySlice


def paged_layers(vllm_config: Any, caches: dict[str, Tensor], groups: Sequence[tuple]) -> list[PagedLayer]:
    """The attention layers in the model's order. Raises UnsupportedModelError for other kinds of state."""
    context = vllm_config.compilation_config.static_forward_context
    size = {name: block for _, names, _, block in groups for name in names}
    other = sorted(set(caches) - set(size))
    if other or len({gid for gid, *_ in groups}) > 1:
        raise UnsupportedModelError(
            f"KV in several cache groups ({', '.join(other) or 'hybrid'}): use --disable-hybrid-kv-cache-manager; "
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


def row_cost(model: Any, layers: Sequence[PagedLayer]) -> CostModel:
    """From the sizes of each decoder layer's matrices."""
    path = {id(module): name for name, module in model.named_modules()}
    row, check, attend, window = [], [], [], []
    for layer in layers:
        own = path[id(layer.attention)].split(".")
        cut = max(i for i, part in enumerate(own) if part.isdigit()) + 1
        block = model.get_submodule(".".join(own[:cut]))
        weights = {name: 2.0 * size for name, size in _sizes(block).items()}
        row.append(sum(weights.values()))
        check.append(sum(x for n, x in weights.items() if any(p in n for p in ("qkv", "q_proj", "k_proj", "v_proj"))))
        attend.append(4.0 * layer.attention.num_heads * layer.dim)
        window.append(window_of(layer.attention.impl))
    head = getattr(model, "lm_head", None)
    size = 0 if head is None else head.num_embeddings_per_partition * head.embedding_dim
    return CostModel(tuple(row), tuple(check), (0.0,) * len(row), tuple(attend), tuple(window), 2.0 * size)


def _sizes(block: Module) -> dict[str, float]:
    """Numbers of each matrix that a row is multiplied with. A linear layer's come from its sizes: on CPU its weight is
    packed for the processor, and nothing stays in its place. Of experts only the active ones count."""
    out = {}
    for name, module in block.named_modules():
        sizes = [
            getattr(module, f"{end}_size_per_partition", getattr(module, f"{end}_size", 0))
            for end in ("input", "output")
        ]
        if all(isinstance(size, int) and size for size in sizes):
            out[name] = float(sizes[0] * sizes[1])
            continue
        share = getattr(module, "top_k", 1) / getattr(module, "local_num_experts", 1)
        for own, p in module.named_parameters(recurse=False):
            if p.dim() > 1:
                out[f"{name}.{own}"] = p.numel() * (share if p.dim() > 2 else 1.0)
    return out
