"""The S3 tier on a real server (SeaweedFS): the promises of every tier, and a service that fails."""

import itertools
import time

import pytest
from servers import S3_KEYS, Proxy, free_port, s3_server

from lmcache_blend.engine.tiers import make_tier
from lmcache_blend.errors import ConfigError
from lmcache_blend.testing import TierConformance
from lmcache_blend.tier_conformance import cause, key, keys, pattern, read


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in S3_KEYS.items():
            patch.setenv(name, value)
        server = s3_server()
        yield server
        server.close()


def url(port: int, path: str = "kv-cache") -> str:
    return f"s3://{path}?endpoint=http://127.0.0.1:{port}&region=us-east-1"


class TestS3(TierConformance):
    number = itertools.count()

    @pytest.fixture(autouse=True)
    def _server(self, server):
        self.port = server.port

    def tier(self, **options):
        self.folder = f"kv-cache/{next(self.number)}"
        return make_tier(url(self.port, self.folder), **options)

    def reopen(self, tier):
        return make_tier(url(self.port, self.folder))


def test_a_folder_of_a_bucket_is_a_store_of_its_own(server):
    one, other = make_tier(url(server.port, "kv-cache/one")), make_tier(url(server.port, "kv-cache/other"))
    one.put([key(0)], [[b"abc"]])
    assert cause(other.lookup([key(0)])[0]) == "absent"
    assert list(other.entries()) == []


def test_wrong_credentials_are_a_miss(server, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    tier = make_tier(url(server.port, "kv-cache/denied"))
    assert cause(tier.put([key(0)], [[b"abc"]])[0]) in ("read_only", "error")
    assert cause(tier.get([key(0)], [memoryview(bytearray(3))])[0]) in ("read_only", "error")


def test_a_service_that_is_not_there_or_slow_is_a_miss_in_time(server):
    gone = make_tier(url(free_port()), timeout_s=1.0)
    assert cause(gone.lookup([key(0)])[0]) == "error"
    with Proxy(server.port) as proxy:
        slow = make_tier(url(proxy.port, "kv-cache/slow"), timeout_s=1.0)
        assert slow.put([key(0)], [[pattern(300_000, 0)]]) == [300_000]
        proxy.delay_s = 3.0
        start = time.monotonic()
        assert cause(slow.get([key(0)], [memoryview(bytearray(300_000))])[0]) == "timeout"
        assert time.monotonic() - start < 2.0
        proxy.delay_s = 0.0
        assert read(slow, [key(0)], [300_000]) == [pattern(300_000, 0)]


def test_a_hanging_service_is_a_miss_in_time_and_comes_back(server):
    tier = make_tier(url(server.port, "kv-cache/hang"), timeout_s=1.0)
    tier.put(keys(2), [[pattern(1000, i)] for i in range(2)])
    server.hang()
    try:
        start = time.monotonic()
        assert cause(tier.get([key(0)], [memoryview(bytearray(1000))])[0]) == "timeout"
        assert time.monotonic() - start < 2.0
    finally:
        server.go_on()
    wanted, end = [pattern(1000, 0), pattern(1000, 1)], time.monotonic() + 20
    # The service's own parts have to find each other again; until then there is a miss, never another byte.
    while (found := read(tier, keys(2), [1000, 1000])) != wanted:
        assert all(value in (None, right) for value, right in zip(found, wanted, strict=True))
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize(
    "bad",
    [
        "s3://",
        "s3:///prefix",
        "s3://b?endpont=http://h",
        "s3://key:secret@bucket/",
        "s3://b?aws_secret_access_key=secret",
    ],
)
def test_a_url_that_cannot_work_is_refused_without_telling_secrets(bad):
    with pytest.raises(ConfigError) as error:
        make_tier(bad)
    assert "secret" not in str(error.value).replace("aws_secret_access_key", "")
