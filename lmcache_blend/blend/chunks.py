"""KV chunks in and out of a runner's KVView, without a store: what codecs are fitted and measured with."""

from typing import Any

import torch
from torch import Tensor

from lmcache_blend.blend.runner import ModelRunner
from lmcache_blend.rotary import Angles
from lmcache_blend.types import KVChunk


def read_layers(
    runner: ModelRunner, kv: Any, start: int, end: int, angles: Angles
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Copies of positions start..end of every layer, (k [H, T, Dk], v [H', T, Dv]) with keys before RoPE, on the CPU.

    angles: of those positions.
    """
    positions, layers = torch.arange(start, end), []
    for i in range(runner.num_layers):
        k, v = angles.unrotate(i, *kv.read(i, positions))
        layers.append((k[0].cpu().contiguous(), v[0].cpu().contiguous()))
    return tuple(layers)


def write_chunk(runner: ModelRunner, chunk: KVChunk, capacity: int = 0) -> Any:
    """A KVView whose first T positions are the chunk; room for `capacity` tokens."""
    kv = runner.new_kv(len(chunk), capacity)
    positions = torch.arange(len(chunk))
    angles = runner.rotary.at(positions)
    for i, (k, v) in enumerate(chunk.layers):
        kv.write(i, positions, *(x[None] for x in angles.rotate(i, k, v)))
    return kv


def rotated(runner: ModelRunner, chunk: KVChunk, inverse: bool = False) -> KVChunk:
    """The chunk with its keys turned to positions 0..T-1, or turned back: codecs that were published for such keys."""
    angles = runner.rotary.at(torch.arange(len(chunk)))
    turn = angles.unrotate if inverse else angles.rotate
    return KVChunk(chunk.tokens, tuple(turn(i, k, v) for i, (k, v) in enumerate(chunk.layers)), chunk.exact_after)
