"""file:// on a mount that several machines share: the disk tier by URL."""

import pytest

from lmcache_blend.engine.tiers import make_tier
from lmcache_blend.errors import ConfigError
from lmcache_blend.testing import TierConformance


class TestSharedFiles(TierConformance):
    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path):
        self.url = f"{tmp_path.as_uri()}/a%20mount"

    def tier(self, **options):
        return make_tier(self.url, **options)

    def reopen(self, tier):
        return make_tier(self.url)


@pytest.mark.parametrize("url", ["file://host/mnt", "file:mnt", "file:///mnt?fsync=none", "file://"])
def test_what_is_no_directory_of_this_machine_is_refused(url):
    with pytest.raises((ConfigError, KeyError)):
        make_tier(url)
