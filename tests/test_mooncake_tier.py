"""The Mooncake tier on a real master, in a network namespace of its own."""

import shutil
import subprocess
import sysconfig
import time

import pytest
from isolated import is_inside, loopback_up, run_isolated

from lmcache_blend.engine.tiers import make_tier
from lmcache_blend.errors import ConfigError
from lmcache_blend.testing import TierConformance
from lmcache_blend.tier_conformance import cause, key, keys, pattern, read

try:
    from mooncake.store import MooncakeDistributedStore

    why_not = None if MooncakeDistributedStore else ""
except ImportError as error:
    why_not = f"Mooncake cannot be loaded: {error}"


if not is_inside():

    @pytest.mark.skipif(why_not is not None, reason=str(why_not))
    def test_mooncake_in_a_network_of_its_own():
        run_isolated(__file__)

    def test_a_bad_address_or_a_missing_package_is_one_clear_error():
        with pytest.raises(ConfigError, match="mooncake"):
            make_tier("mooncake://host")

else:

    @pytest.fixture(scope="module")
    def pool(tmp_path_factory):
        """A master, and a tier that gives 256 MiB to the pool."""
        loopback_up()
        program = shutil.which("mooncake_master", path=sysconfig.get_path("scripts"))
        ports = ["-rpc_address=127.0.0.1", "-rpc_port=50051", "-metrics_host=127.0.0.1", "-metrics_port=9003"]
        with open(tmp_path_factory.mktemp("mooncake") / "log", "wb") as log:
            master = subprocess.Popen([program, *ports], stdout=log, stderr=log)
        end = time.monotonic() + 20
        while True:
            try:
                tier = make_tier("mooncake://127.0.0.1:50051", segment_bytes=256 << 20, buffer_bytes=64 << 20)
                break
            except ConnectionError:
                assert time.monotonic() < end
                time.sleep(0.2)
        yield tier
        tier.close()
        master.kill()
        master.wait()

    class TestMooncake(TierConformance):
        limited = False
        sizes = (1, 100, 4096, 4097, 1 << 20, (5 << 20) + 3)

        @pytest.fixture(autouse=True)
        def _pool(self, pool):
            self.pool = pool

        def tier(self, **options):
            self.pool.delete([entry.key for entry in self.pool.entries()])
            return Shared(self.pool)

    class Shared:
        """The pool's only client: closing it would take the memory away that the values lie in."""

        def __init__(self, tier):
            self._tier = tier

        def __getattr__(self, name):
            return getattr(self._tier, name)

        def close(self):
            pass

    def test_a_full_pool_evicts_silently_and_lies_never(pool):
        values = [pattern(8 << 20, i) for i in range(60)]
        for i, value in enumerate(values):
            (out,) = pool.put([key(i)], [[value]])
            assert out == 8 << 20 or cause(out) in ("full", "error")
        found = read(pool, keys(60), [8 << 20] * 60)
        assert all(got is None or got == value for got, value in zip(found, values, strict=True))
        assert 0 < sum(got is not None for got in found) < 60
