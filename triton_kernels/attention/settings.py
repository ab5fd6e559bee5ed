"""Launch settings of attention, a pure function of shapes: what fits into registers and fills the device."""

from dataclasses import dataclass

from lmcache_blend.triton_kernels.rotation.ops import power_of_2

PROGRAMS = 264  # two for each multiprocessor of an H100; other GPUs differ by less than two times
SPLIT_KEYS = 256  # fewer keys are not worth a program of their own
MAX_SPLITS = 32


@dataclass(frozen=True)
class Settings:
    """Rows and keys of a tile, programs that share the keys of a row, and how Triton compiles it."""

    rows: int
    keys: int
    splits: int
    warps: int
    stages: int


def attention_settings(batch: int, heads: int, group: int, count: int, keys: int, dim: int, bits: int) -> Settings:
    """For `count` rows of `group` query heads to each of `heads` KV heads; dim: the larger of K's and V's.

    Larger tiles spill registers on one target or another (the compile gate holds all of these).
    """
    total = count * group
    if bits == 32:  # no tensor cores: tl.dot multiplies in float32
        rows, columns, warps, stages = 16, 16, 4, 1
    elif total <= 16:
        rows, columns, warps, stages = 16, 64 if dim <= 128 else 32, 4, 2
    else:
        rows, columns, warps, stages = (64, 32, 4, 3 if dim <= 64 else 2) if dim <= 128 else (64, 16, 8, 2)
    programs = batch * heads * -(-total // rows)
    splits = max(1, min(MAX_SPLITS, PROGRAMS // programs, keys // SPLIT_KEYS))
    return Settings(rows, columns, power_of_2(splits + 1) // 2, warps, stages)


def mass_settings(count: int, dim: int, bits: int) -> Settings:
    """For the attention that keys get from `count` rows."""
    if bits == 32:
        return Settings(16, 32, 1, 4, 1)
    return Settings(min(64 if dim <= 128 else 32, max(16, power_of_2(count))), 64, 1, 4, 1)
