"""Measure blending: tasks, metrics, paired statistics, the run loop, reports and plots."""

# A folder of this name at the root of a checkout must never be taken for a top-level package `eval`.
if __name__ == "eval":
    raise ImportError("import lmcache_blend.eval, not eval")
