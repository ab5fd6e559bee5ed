"""Reads a RotaryTable, the KV shapes and the cost of a forward off a model, from a dozen random tokens.

The rotary modules' calls are recorded once; which call feeds which layer is told by object identity; slot, slice,
pairing and angle layout of every layer are those for which keys computed at one offset, turned back and turned again,
equal the keys computed at another.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmcache_blend.blend.runner import CostModel, Plan
from lmcache_blend.errors import UnsupportedModelError
from lmcache_blend.hf.intercept import Forward
from lmcache_blend.rotary import Angles, RotarySlice, RotaryTable

PROBE_TOKENS, SHIFT = 12, 37


@dataclass
class Capture:
    """KV of one forward: per layer (k, v) [H, T, D] as cached; embeddings: the other arguments of the layer."""

    kv: list[tuple[Tensor, Tensor]]
    embeddings: list[Any]
    forward: Forward


class _Recorder(Forward):
    """A forward over all rows that keeps the fresh KV, for there is no buffer before the shapes are known."""

    class _Length:
        def __init__(self, length: int):
            self.length = length

    def __init__(self, tokens: int, layers: int, device: torch.device):
        super().__init__([self._Length(tokens)], torch.arange(tokens, device=device)[None], layers)  # type: ignore[list-item]
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}
        self.embeddings = []

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.kv[layer] = (k[0], v[0])
        return k, v


@torch.inference_mode()
def capture(runner: Any, ids: Tensor, positions: Tensor | None = None) -> Capture:
    """Run all of ids [T] (at positions, if given) and keep each layer's KV."""
    recorder = _Recorder(len(ids), runner.num_layers, runner.device)
    runner.run_rows(recorder, ids[None], recorder.rows if positions is None else positions[None], 1)
    missing = [i for i in range(runner.num_layers) if i not in recorder.kv or i not in recorder.attended]
    if missing:
        raise UnsupportedModelError(
            f"{runner.model_id}: layer {missing[0]} keeps no K and V in the cache or does not attend through "
            "transformers' AttentionInterface (recurrent, convolution or custom code), so its rows cannot be chosen"
        )
    return Capture([recorder.kv[i] for i in range(runner.num_layers)], recorder.embeddings or [], recorder)


def learn_rotary(runner: Any, tolerance: float) -> tuple[RotaryTable, float, Capture]:
    """The model's RotaryTable, the largest relative error of the fit, and the capture. Raises UnsupportedModelError."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, runner.config.vocab_size, (PROBE_TOKENS,), generator=generator).to(runner.device)
    calls: list[tuple[nn.Module, tuple, dict, Any]] = []
    hooks = [
        module.register_forward_hook(lambda *call: calls.append(call), with_kwargs=True)
        for module in runner.model.modules()
        if "rotary" in type(module).__name__.lower() and "vision" not in type(module).__name__.lower()
    ]
    try:
        here = capture(runner, ids)
    finally:
        for hook in hooks:
            hook.remove()
    sources = [_source(given, calls) for given in here.embeddings]
    there = capture(runner, ids, torch.arange(PROBE_TOKENS, device=runner.device) + SHIFT)

    def replay(positions: Tensor) -> list[Any]:
        outputs = []
        with torch.inference_mode():
            for module, args, kwargs, _ in calls:
                at = positions.to(runner.device)[None]
                if "position_ids" in kwargs:
                    outputs.append(module(*args, **{**kwargs, "position_ids": at}))
                else:
                    outputs.append(module(args[0], at, *args[2:], **kwargs))
        return outputs

    pieces, worst = [], 0.0
    first = torch.arange(PROBE_TOKENS, device=runner.device)
    angles: dict[RotarySlice | None, tuple[Angles, Angles]] = {}
    for i in range(runner.num_layers):
        best: tuple[float, RotarySlice | None] = (float("inf"), None)
        for piece in _candidates(here.kv[i], sources[i], calls):
            if piece not in angles:
                table = RotaryTable((piece,), replay)
                angles[piece] = (table.at(first), table.at(first + SHIFT))
            a, b = angles[piece]
            moved = b.rotate(0, *a.unrotate(0, *here.kv[i]))
            error = max(relative_error(x, y) for x, y in zip(moved, there.kv[i], strict=True))
            if error < best[0]:
                best = (error, piece)
        if best[0] > tolerance:
            raise UnsupportedModelError(
                f"{runner.model_id}: keys of layer {i} are not a pure rotation by position that its rotary modules "
                f"explain (error {best[0]:.1e}, limit {tolerance:.0e}), so cached chunks cannot be moved"
            )
        worst = max(worst, best[0])
        pieces.append(best[1])
    return RotaryTable(tuple(pieces), replay), worst, here


def relative_error(x: Tensor, y: Tensor) -> float:
    """Largest absolute difference over the largest absolute value of y."""
    return float((x.float() - y.float()).abs().max() / y.float().abs().max().clamp_min(1e-9))


def _first(x: Any) -> Tensor | None:
    x = x[0] if isinstance(x, (tuple, list)) and x else x
    return x if isinstance(x, Tensor) else None


def _source(given: tuple[tuple, dict], calls: list) -> int | None:
    args, kwargs = given
    for x in (*args, *kwargs.values()):
        tensor = _first(x)
        for j, call in enumerate(calls):
            if tensor is not None and tensor is _first(call[3]):
                return j
    return None


def _candidates(kv: tuple[Tensor, Tensor], source: int | None, calls: list) -> Iterator[RotarySlice | None]:
    yield None  # a layer without RoPE
    if source is None:
        return
    output = calls[source][3]
    if isinstance(output, Tensor):
        layouts = [("all", output.shape[-1] * 2)]
    else:
        dim = output[0].shape[-1]
        layouts = [("half", dim), ("stride", dim), ("all", 2 * dim)]
    for layout, dim in layouts:
        for slot in (0, 1):
            width = kv[slot].shape[-1]
            if dim > width:
                continue
            for start in dict.fromkeys((0, width - dim)):
                for pairing in ("half", "interleaved"):
                    yield RotarySlice(slot, start, start + dim, pairing, layout, source)  # type: ignore[arg-type]


def learn_cost(runner: Any, ids: Tensor, kv: Any, rows: Tensor) -> tuple[CostModel, Tensor]:
    """Count the multiplications of one forward over rows [N] of ids [T], module by module; also gives its logits.

    A linear layer that sees all T tokens instead of the N rows (MLA's expansion of the latents) is a cost per key.
    Fused experts count by the share that is active.
    """
    layers, n, tokens = runner.num_layers, len(rows), len(ids)
    row, check, key = ([0.0] * layers for _ in range(3))
    active = _active_share(runner.config)
    updated: set[int] = set()
    hooks = []

    def count_linear(i: int, module: nn.Linear) -> Any:
        def count(_: nn.Module, args: tuple, output: Tensor) -> None:
            seen = args[0].numel() // module.in_features
            flops = 2.0 * module.in_features * module.out_features * seen
            if seen == tokens:
                key[i] += flops / tokens
            else:
                row[i] += flops / n
                check[i] += 0.0 if i in updated else flops / n

        return module.register_forward_hook(count)

    for i, layer in enumerate(runner.layers):
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                hooks.append(count_linear(i, module))
            else:
                fused = sum(p.numel() for p in module.parameters(recurse=False) if p.dim() == 3)
                row[i] += 2.0 * fused * active
    try:
        computed, forward = runner.run_plan([ids], [kv], Plan([rows], observer=lambda i, *_: updated.add(i)), 0)
    finally:
        for hook in hooks:
            hook.remove()
    attended = [forward.attended[i] for i in range(layers)]
    head = runner.model.get_output_embeddings().weight.numel()
    cost = CostModel(
        row=tuple(row),
        check=tuple(check),
        key=tuple(key),
        attend=tuple(2.0 * heads * (dk + dv) for heads, dk, dv, _ in attended),
        window=tuple(window for *_, window in attended),
        head=2.0 * head,
    )
    return cost, computed.logits[0]


def _active_share(config: Any) -> float:
    total = next(
        (n for a in ("num_local_experts", "num_experts", "n_routed_experts") if (n := getattr(config, a, None))), 0
    )
    return config.num_experts_per_tok / total if total else 1.0
