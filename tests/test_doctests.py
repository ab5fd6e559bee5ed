"""Examples in docstrings run and print what they say."""

import doctest
import importlib.util
import pkgutil

import lmcache_blend


def test_examples():
    found = [m.name for m in pkgutil.walk_packages(lmcache_blend.__path__, "lmcache_blend.")]
    names = [name for name in found if not name.endswith("_peer")]  # scripts for an environment of another engine
    if importlib.util.find_spec("vllm") is None:  # which some modules of serving are made of
        names = [name for name in names if not name.startswith("lmcache_blend.serving.")]
    results = [doctest.testmod(importlib.import_module(name)) for name in names]
    assert sum(r.failed for r in results) == 0
    assert sum(r.attempted for r in results) > 10
