"""RotaryTable: how a model turns its keys with the position, for every layer, for any positions.

Nothing here knows a rope type. A table replays the model's own rotary modules (`replay`), so default, linear, dynamic
NTK, yarn, llama3 and longrope scaling, two thetas (Gemma 3) and layers without RoPE are one case; `RotarySlice` says
which part of a layer's cached pair turns and how its numbers pair up. `lmcache_blend.hf.learn` reads both off a model.

Rotation and its inverse are computed in float32. The inverse divides by cos^2 + sin^2, which is the square of the
attention scaling that yarn and longrope bake into their tables, so pre-RoPE keys are free of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lmcache_blend.triton_kernels.rotation import rotate as rotate_dims
from lmcache_blend.types import RotarySlice, Turn

__all__ = ["Angles", "RotarySlice", "RotaryTable", "Turn", "rotate"]


@dataclass(frozen=True)
class RotaryTable:
    """Rotation of every layer. layers: one RotarySlice a layer, None where keys do not turn.

    replay: positions [T] -> the model's own rotary outputs, (cos, sin) or one complex tensor each. Scaling that depends
    on the prompt's length (dynamic NTK, longrope) follows the largest of the positions, as it does in the model.
    """

    layers: tuple[RotarySlice | None, ...]
    replay: Callable[[Tensor], Sequence[object]]

    def at(self, positions: Tensor) -> "Angles":
        """The tables at positions [T] int64."""
        if all(s is None for s in self.layers):
            return Angles(self.layers, tuple(None for _ in self.layers))
        outputs, made, turns = self.replay(positions), {}, []
        for piece in self.layers:
            key = None if piece is None else (piece.source, piece.angles)
            if piece is not None and key not in made:
                made[key] = Turn(*(_distinct(x, piece.angles) for x in _cos_sin(outputs[piece.source])))
            turns.append(None if piece is None else made[key])
        return Angles(self.layers, tuple(turns))


@dataclass(frozen=True)
class Angles:
    """A RotaryTable evaluated at T positions; slicing gives a part of them."""

    layers: tuple[RotarySlice | None, ...]
    turns: tuple[Turn | None, ...]

    def __getitem__(self, part: slice | Tensor) -> "Angles":
        done: dict[int, Turn] = {}
        turns = tuple(None if t is None else done.setdefault(id(t), Turn(t.cos[part], t.sin[part])) for t in self.turns)
        return Angles(self.layers, turns)

    def regime(self) -> bytes:
        """Tells apart tables of one model whose scaling follows the prompt's length; equal for every fixed scaling."""
        seen = {id(t): t for t in self.turns if t is not None}
        at = [t.cos[min(1, len(t.cos) - 1)] for t in seen.values()]
        return b"".join(x.cpu().numpy().tobytes() for x in at)

    def of(self, layer: int, slot: int) -> tuple[Turn | None, RotarySlice | None]:
        """By what K (slot 0) or V (1) of a layer turns, (None, None) if it does not."""
        piece = self.layers[layer]
        return (self.turns[layer], piece) if piece is not None and piece.slot == slot else (None, None)

    def rotate(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-RoPE pair [..., T, D] -> the pair at these positions."""
        return self._apply(layer, k, v, inverse=False)

    def unrotate(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The pair at these positions [..., T, D] -> pre-RoPE."""
        return self._apply(layer, k, v, inverse=True)

    def _apply(self, layer: int, k: Tensor, v: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        piece, turn = self.layers[layer], self.turns[layer]
        if piece is None or turn is None:
            return k, v
        pair = [k, v]
        pair[piece.slot] = rotate(pair[piece.slot], turn, piece, inverse)
        return pair[0], pair[1]


def rotate(x: Tensor, turn: Turn, piece: RotarySlice, inverse: bool = False) -> Tensor:
    """Turn dims piece.start..piece.stop of x [..., T, D] by (cos, sin) [T, R/2], or back, in float32."""
    return rotate_dims(x, turn.cos, turn.sin, piece.start, piece.pairing == "interleaved", inverse)


def _cos_sin(output: object) -> tuple[Tensor, Tensor]:
    if isinstance(output, Tensor):  # complex e^(i angle), DeepSeek V2
        return output.real[0], output.imag[0]
    cos, sin = output  # type: ignore[misc]
    return cos[0], sin[0]


def _distinct(x: Tensor, angles: str) -> Tensor:
    if angles == "half":
        x = x[..., : x.shape[-1] // 2]
    elif angles == "stride":
        x = x[..., ::2]
    return x.float().contiguous()
