"""Blending: segments, policies, the Blender, and the seam to a model (ModelRunner)."""

from lmcache_blend.blend.blender import Blender
from lmcache_blend.blend.policies import RowPolicy, Signals, get_policy, policies, register_policy
from lmcache_blend.blend.prefill import Prefill, generate_batch
from lmcache_blend.blend.runner import Computed, CostModel, ModelRunner, Plan
from lmcache_blend.blend.segments import by_passages, by_separator

__all__ = [
    "Blender", "Computed", "CostModel", "ModelRunner", "Plan", "Prefill", "RowPolicy", "Signals", "by_passages",
    "by_separator", "generate_batch", "get_policy", "policies", "register_policy",
]  # fmt: skip
