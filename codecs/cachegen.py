"""CacheGen (Liu et al., arXiv 2310.07240): mode "lmcache" as LMCache 0.5.6 ships it, mode "paper" as section 5 has it.

`codecs/cachegen_lmcache.py` and `codecs/cachegen_paper.py` hold the stages of the two.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

import pydantic

from lmcache_blend.codecs.base import codecs
from lmcache_blend.codecs.cachegen_lmcache import TokenAbsmax
from lmcache_blend.codecs.cachegen_paper import GROUP, LARGEST_GROUP, AnchorDelta, Level, fit
from lmcache_blend.codecs.container import MAX_LAYERS, Shape
from lmcache_blend.codecs.pipeline import PipelineCodec
from lmcache_blend.codecs.profile import Profile
from lmcache_blend.codecs.smallest import RansSmallest
from lmcache_blend.codecs.stages import Plane, Stage
from lmcache_blend.codecs.transforms import Sinks
from lmcache_blend.errors import ConfigError

__all__ = ["CacheGen", "fit"]

Bins = Annotated[int, pydantic.Field(ge=4, le=256)]
Run = tuple[Annotated[int, pydantic.Field(ge=1, le=MAX_LAYERS)], Bins]
K_STARTS, V_STARTS = (0, 10, 20), (0, 2)
K_BINS: dict[Level, tuple[int, ...]] = {1: (16, 16, 12), 2: (32, 16, 16), 3: (32, 32, 32)}
V_BINS: dict[Level, tuple[int, ...]] = {1: (16, 12), 2: (32, 16), 3: (32, 32)}
FEW_LAYERS = 10
ONLY = {"k_bins": "lmcache", "v_bins": "lmcache", "group": "paper", "step": "paper", "profile": "paper"}


@codecs.register("cachegen")
class CacheGen(PipelineCodec):
    """CacheGen, with attention sinks in float16 and finer bins where asked for.

    Example:
        >>> CacheGen(level=1).bins("k", 21), CacheGen(k_bins=64).bins("k", 2)
        ((16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 16, 12), (64, 64))
    """

    keys: ClassVar[Literal["pre_rope", "post_rope"]] = "post_rope"

    mode: Literal["lmcache", "paper"] = "lmcache"
    level: Level = 2
    """3 is best and largest. lmcache: 2 is LMCache's own, 1 and 3 are those of the paper's artifact. paper: the paper's
    steps times 2, 1 and 0.5."""
    sinks: int = pydantic.Field(default=0, ge=0)
    """First tokens of a chunk that are kept in float16; neither LMCache nor the paper has them."""
    k_bins: Bins | tuple[Bins, ...] | tuple[Run, ...] | None = None
    """lmcache: bins of the keys instead of the level's: one number, one per layer, or (layers, bins) runs."""
    v_bins: Bins | tuple[Bins, ...] | tuple[Run, ...] | None = None
    """lmcache: the same of the values."""
    group: int = pydantic.Field(default=GROUP, ge=2, le=LARGEST_GROUP)
    """paper: tokens of a group, its anchor included."""
    step: float = pydantic.Field(default=1.0, ge=1e-3, le=1e3)
    """paper: multiplies every step."""
    profile: str | None = None
    """paper: path of a profile that `fit` made, at this group and step. Keys after RoPE need a fit on such keys."""

    def __init__(self, /, **data: Any) -> None:
        super().__init__(**data)
        for name, mode in ONLY.items():
            if mode != self.mode and getattr(self, name) != type(self).model_fields[name].default:
                raise ConfigError(f"{name} = {getattr(self, name)!r} is a setting of mode {mode!r}, not {self.mode!r}")

    def stages(self, plane: Plane) -> Sequence[Stage]:
        first = (Sinks(tokens=self.sinks),) if self.sinks else ()
        if self.mode == "paper":
            return (*first, AnchorDelta(level=self.level, group=self.group, step=self.step))
        return (*first, TokenAbsmax(bins=self.bins(plane.slot, plane.num_layers)[plane.first]), RansSmallest())

    def bins(self, slot: str, num_layers: int) -> tuple[int, ...]:
        """Bins per layer of "k" or "v" in mode lmcache. Raises ConfigError where the settings have other layers."""
        name, given = ("k_bins", self.k_bins) if slot == "k" else ("v_bins", self.v_bins)
        if given is None:
            starts, bins = (K_STARTS, K_BINS[self.level]) if slot == "k" else (V_STARTS, V_BINS[self.level])
            if num_layers < FEW_LAYERS:  # LMCache codes all layers of a small model as the first
                starts = starts[:1]
            return tuple(bins[bisect_right(starts, i) - 1] for i in range(num_layers))
        if isinstance(given, int):
            return (given,) * num_layers
        out: list[int] = []
        for item in given:
            out += [item] if isinstance(item, int) else [item[1]] * item[0]
        if len(out) != num_layers:
            raise ConfigError(f"{name} is for {len(out)} layers, the chunk has {num_layers}; one number serves any")
        return tuple(out)

    def profile_for(self, shapes: tuple[Shape, ...]) -> Profile | None:
        if self.profile is None:
            return None
        profile = Profile.load(self.profile)
        if profile.codec != "cachegen":
            raise ConfigError(f"profile {self.profile!r} is of codec {profile.codec!r}; fit one for cachegen")
        for name in ("group", "step"):
            if profile.settings.get(name) != getattr(self, name):
                raise ConfigError(
                    f"profile {self.profile!r} was fitted at {name} = {profile.settings.get(name)}, "
                    f"not {getattr(self, name)}; fit it again or change the setting"
                )
        profile.check_shapes(shapes)
        return profile
