"""The NIXL tier with its POSIX backend, in a network namespace of its own (NIXL brings UCX along)."""

import ctypes
import importlib.util
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from isolated import is_inside, run_isolated

from lmcache_blend.engine import Keyer, KVEngine
from lmcache_blend.engine.tiers import make_tier
from lmcache_blend.errors import ConfigError
from lmcache_blend.testing import TierConformance
from lmcache_blend.tier_conformance import key, keys, pattern, read
from lmcache_blend.types import KVChunk

why_not = None if importlib.util.find_spec("nixl") else "NIXL is not installed: pip install --no-deps nixl nixl-cu12"


if not is_inside():

    @pytest.mark.skipif(why_not is not None, reason=str(why_not))
    def test_nixl_in_a_network_of_its_own():
        run_isolated(__file__)

    class Agent:
        """As much of NIXL's agent as the tier uses, with plain reads and writes."""

        name = "stand-in"

        def __init__(self, name, config):
            pass

        def create_backend(self, backend):
            assert backend == "POSIX"

        def register_memory(self, rows, kind, backends):
            return SimpleNamespace(trim=lambda: rows)

        def initialize_xfer(self, way, memory, file, name, backends):
            return way, list(zip(memory, file, strict=True))

        def transfer(self, handle):
            way, rows = handle
            for (address, nbytes, *_), (start, size, fd, _) in rows:
                assert nbytes == size
                if way == "READ":
                    ctypes.memmove(address, os.pread(fd, size, start), size)
                else:
                    os.pwrite(fd, ctypes.string_at(address, size), start)
            return "DONE"

        def release_xfer_handle(self, handle):
            pass

        deregister_memory = release_xfer_handle

    def test_an_engine_serves_whole_chunks_and_refuses_damaged_ones(tmp_path, monkeypatch):
        api = SimpleNamespace(nixl_agent=Agent, nixl_agent_config=lambda backends: None)
        monkeypatch.setitem(sys.modules, "nixl", SimpleNamespace(_api=api))
        monkeypatch.setitem(sys.modules, "nixl._api", api)
        chunk = KVChunk(torch.arange(9), tuple((torch.randn(2, 9, 64), torch.randn(2, 9, 64)) for _ in range(8)))
        keys = Keyer("m", chunk_tokens=9).prefix_keys(torch.arange(18))
        with KVEngine(tiers=[{"tier": tmp_path.as_uri().replace("file:", "nixl:")}]) as engine:
            assert engine.store(keys, [chunk, chunk], wait=True) == [True, True]
            (path,) = tmp_path.glob(f"chunks/*/{keys[1].hex()}")
            with open(path, "r+b") as file:
                file.seek(-1, os.SEEK_END)
                last = file.read(1)
                file.seek(-1, os.SEEK_END)
                file.write(bytes([last[0] ^ 1]))
            found, damaged = engine.retrieve(keys)
            assert damaged is None
            assert engine.lookup(keys).prefix == 1
            assert found is not None
        for (k, v), (k2, v2) in zip(found.layers, chunk.layers, strict=True):
            assert torch.equal(k, k2)
            assert torch.equal(v, v2)

    @pytest.mark.parametrize("url", ["nixl://host/kv", "nixl:///kv?backend=UCX"])
    def test_a_bad_url_is_one_clear_error(url):
        with pytest.raises(ConfigError, match="nixl"):
            make_tier(url)

else:

    class TestNixl(TierConformance):
        @pytest.fixture(autouse=True)
        def _folder(self, tmp_path):
            self.url = tmp_path.as_uri().replace("file:", "nixl:")

        def tier(self, **options):
            return make_tier(self.url, **options)

        def reopen(self, tier):
            return make_tier(self.url)

    def test_one_directory_serves_both_kinds_of_tier(tmp_path):
        theirs, plain = make_tier(tmp_path.as_uri().replace("file:", "nixl:")), make_tier("disk", path=tmp_path)
        theirs.put([key(0)], [[pattern(100_000, 0)]])
        plain.put([key(1)], [[pattern(5_000, 1)]])
        for tier in (theirs, plain):
            assert read(tier, keys(2), [100_000, 5_000]) == [pattern(100_000, 0), pattern(5_000, 1)]
