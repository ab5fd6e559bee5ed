"""KIVI (arXiv 2402.02750): keys per channel, values per token, asymmetric in small groups, packed integers."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import pydantic

from lmcache_blend.codecs.base import codecs
from lmcache_blend.codecs.grouped import Grouped
from lmcache_blend.codecs.pipeline import PipelineCodec
from lmcache_blend.codecs.recent import Recent
from lmcache_blend.codecs.stages import Plane, Stage
from lmcache_blend.codecs.transforms import Sinks

Bits = Literal[2, 3, 4, 8]


@codecs.register("kivi")
class Kivi(PipelineCodec):
    """Groups of `group` tokens of a key channel, and of `group` channels of a value token, between their extremes.

    Costs bits + 32 / group bits per element: a float16 zero and step per group (section 3 of the paper). The paper
    takes 2 bits, groups of 32 and a residual of 128. Value channels are grouped head after head.
    """

    keys: ClassVar[Literal["pre_rope", "post_rope"]] = "post_rope"
    bits_k: Bits = 4
    bits_v: Bits = 4
    group: int = pydantic.Field(default=64, ge=1)
    sinks: int = pydantic.Field(default=0, ge=0)
    """First tokens kept in float16; the paper keeps none."""
    residual: int = pydantic.Field(default=0, ge=0)
    """Most recent tokens kept in float16. The paper needs them because keys fill a group only as tokens come; in a
    chunk that does not end the prompt they buy nothing, so none by default."""

    def stages(self, plane: Plane) -> Sequence[Stage]:
        bits, axis = (self.bits_k, "channel") if plane.slot == "k" else (self.bits_v, "token")
        grouped = Grouped(bits=bits, axis=axis, group=self.group)
        return (Sinks(tokens=self.sinks), Recent(tokens=self.residual), grouped)
