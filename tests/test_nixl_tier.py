"""The NIXL tier with its POSIX backend, in a network namespace of its own (NIXL brings UCX along)."""

import importlib.util

import pytest
from isolated import is_inside, run_isolated

from lmcache_blend.engine.tiers import make_tier
from lmcache_blend.errors import ConfigError
from lmcache_blend.testing import TierConformance
from lmcache_blend.tier_conformance import key, keys, pattern, read

why_not = None if importlib.util.find_spec("nixl") else "NIXL is not installed: pip install --no-deps nixl nixl-cu12"


if not is_inside():

    @pytest.mark.skipif(why_not is not None, reason=str(why_not))
    def test_nixl_in_a_network_of_its_own():
        run_isolated(__file__)

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
