"""Every tier of ours, and one of a third party by dotted path, keeps the promises of `TierConformance`."""

import pytest

from lmcache_blend.engine.tiers import make_tier
from lmcache_blend.testing import TierConformance


class TestCpu(TierConformance):
    def tier(self, **options):
        return make_tier("cpu", **{"capacity_bytes": 64 << 20, **options})


class TestCpuWithoutPool(TierConformance):
    def tier(self, **options):
        return make_tier("cpu", pool=False, **options)


class TestDisk(TierConformance):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path):
        self.path = tmp_path / "kv"

    def tier(self, **options):
        return make_tier("disk", path=self.path, **options)

    def reopen(self, tier):
        return make_tier("disk", path=self.path)


class TestDiskWithFsync(TestDisk):
    def tier(self, **options):
        return make_tier("disk", path=self.path, fsync="full", **options)


class TestThirdParty(TierConformance):
    limited = False

    def tier(self, **options):
        return make_tier("third_party_tier.DictTier", **options)
