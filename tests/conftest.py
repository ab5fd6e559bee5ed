"""Shared by all tests: one thread (two cores that share a machine spin against each other), a cache folder of our
own.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from architectures import build

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _gate_cache(tmp_path_factory: pytest.TempPathFactory):
    """Gate outcomes of the tests stay out of the user's cache; converted models stay in it, they take a minute to
    make.
    """
    from lmcache_blend.hf import gates

    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gates, "cache_dir", lambda: folder)
        yield


@pytest.fixture(scope="session")
def tiny():
    """A runner over a tiny random Llama."""
    from lmcache_blend.hf import HFRunner

    return HFRunner.checked(build("llama-default"))


@pytest.fixture(scope="session")
def smollm2():
    """The real model: from the hub where one answers, else from PyPI; cached by the user's cache folder."""
    from lmcache_blend.hf import load_runner

    return load_runner("smollm2-135m", dtype="float32")
