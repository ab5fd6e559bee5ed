"""The Redis tier on a real server: the promises of every tier, parts, TLS, clusters, pins."""

import contextlib
import socket
import ssl
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import Proxy, free_port, redis_server

from lmcache_blend.engine.tiers import make_tier
from lmcache_blend.engine.tiers.resp import RespError, ServerError, Wire, packets
from lmcache_blend.errors import ConfigError
from lmcache_blend.testing import TierConformance
from lmcache_blend.tier_conformance import cause, key, keys, pattern, read


@pytest.fixture(scope="module")
def server():
    server = redis_server()
    yield server
    server.close()


class TestRedis(TierConformance):
    """Values from 1 MiB on are split here, so that both layouts are met."""

    part_bytes = 100_000

    @pytest.fixture(autouse=True)
    def _server(self, server):
        self.url = f"redis://127.0.0.1:{server.port}/0"
        import redis

        redis.Redis(port=server.port).flushall()

    def tier(self, **options):
        return make_tier(self.url, part_bytes=self.part_bytes, **options)

    def reopen(self, tier):
        return make_tier(self.url, part_bytes=self.part_bytes)


class TestRedisWithoutParts(TestRedis):
    part_bytes = 64 << 20


def test_tls_with_a_certificate_authority_of_ones_own(server, tmp_path):
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    issued.configure_cert(context)
    with Proxy(server.port, context) as proxy:
        url = f"rediss://localhost:{proxy.port}/0"
        tier = make_tier(f"{url}?ssl_ca_certs={tmp_path / 'ca.pem'}", part_bytes=100_000)
        values = [pattern(n, n) for n in (10, 99_999, 3_000_000)]
        assert tier.put(keys(3), [[v] for v in values]) == [10, 99_999, 3_000_000]
        assert read(tier, keys(3), [10, 99_999, 3_000_000]) == values
        with pytest.raises(ConnectionError):  # a server that nobody vouches for is not talked to
            make_tier(url).lookup([key(0)])


class TestRedisCluster(TierConformance):
    """Three nodes, without replicas."""

    @pytest.fixture(autouse=True, scope="class")
    def _cluster(self, request):
        import redis

        buses = [free_port() for _ in range(3)]
        options = ("--cluster-enabled", "yes", "--cluster-node-timeout", "2000", "--cluster-port")
        servers = [redis_server(*options, str(bus)) for bus in buses]
        for server in servers:
            request.addfinalizer(server.close)  # noqa: PT021  # one per server
        clients = [redis.Redis(port=s.port) for s in servers]
        for i, client in enumerate(clients):
            client.execute_command("CLUSTER ADDSLOTSRANGE", 5462 * i, min(5462 * (i + 1), 16384) - 1)
            if i:
                client.execute_command("CLUSTER MEET", "127.0.0.1", servers[0].port, buses[0])
        wanted = {"cluster_state": "ok", "cluster_known_nodes": "3", "cluster_slots_ok": "16384"}
        _wait(lambda: all(wanted.items() <= c.execute_command("CLUSTER INFO").items() for c in clients))
        request.cls.clients, request.cls.servers = clients, servers

    def tier(self, **options):
        for client in self.clients:
            client.flushall()
        return self._connect(**options)

    def reopen(self, tier):
        return self._connect()

    def _connect(self, **options):
        return make_tier(f"redis://127.0.0.1:{self.servers[0].port}", part_bytes=100_000, **options)

    def test_a_slot_that_moves_is_followed(self):
        tier = self.tier()
        tier.put(keys(60), [[pattern(1000 + i, i)] for i in range(60)])
        ids = [c.execute_command("CLUSTER MYID").decode() for c in self.clients]
        # Keys of a slot go to another node, as `redis-cli --cluster reshard` moves them.
        name = f"lmcache-blend:{{{key(7).hex()}}}"
        slot = self.clients[0].execute_command("CLUSTER KEYSLOT", name)
        old = min(slot // 5462, 2)
        new = (old + 1) % 3
        self.clients[new].execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[old])
        self.clients[old].execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[new])
        for moved in self.clients[old].execute_command("CLUSTER GETKEYSINSLOT", slot, 100):
            self.clients[old].execute_command("MIGRATE", "127.0.0.1", self.servers[new].port, moved, 0, 1000)
        for client in (self.clients[new], self.clients[old], self.clients[3 - old - new]):
            client.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[new])
        assert tier.lookup(keys(60)) == [1000 + i for i in range(60)]
        assert read(tier, keys(60), [1000 + i for i in range(60)]) == [pattern(1000 + i, i) for i in range(60)]


# What no server of ours would do


def test_a_server_that_evicts_by_itself_takes_no_pins(server):
    import redis

    client, tier = redis.Redis(port=server.port), make_tier(f"redis://127.0.0.1:{server.port}/0")
    client.flushall()
    tier.put([key(0)], [[b"abc"]])
    client.config_set("maxmemory", "1gb")
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        assert cause(tier.pin([key(0)], 1e10)[0]) == "error"
    finally:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "0")


def test_out_of_memory_is_full_and_leaves_nothing_behind(server):
    import redis

    client = redis.Redis(port=server.port)
    client.flushall()
    tier = make_tier(f"redis://127.0.0.1:{server.port}/0", part_bytes=1 << 20)
    client.config_set("maxmemory", client.info("memory")["used_memory"] + (6 << 20))
    try:
        out = tier.put(keys(4), [[bytes(3 << 20)] for _ in range(4)])
        assert {cause(o) for o in out} == {None, "full"}
        stored = [i for i, o in enumerate(out) if o == 3 << 20]
        assert read(tier, [key(i) for i in stored], [3 << 20] * len(stored)) == [bytes(3 << 20)] * len(stored)
        assert client.dbsize() == len(stored)
    finally:
        client.config_set("maxmemory", "0")
    assert tier.put(keys(4), [[bytes(3 << 20)] for _ in range(4)]) == [3 << 20] * 4


def test_what_others_keep_on_the_server_is_left_alone(server):
    import redis

    client, tier = redis.Redis(port=server.port), make_tier(f"redis://127.0.0.1:{server.port}/0")
    client.flushall()
    name = f"lmcache-blend:{{{key(1).hex()}}}"
    client.set("lmcache-blend:{not hex}", "x")
    client.set("other", "x")
    client.rpush(name, "a list")
    client.hset(f"lmcache-blend:{{{key(2).hex()}}}", mapping={"size": "-5", "part": "no", "mark": "m"})
    assert list(tier.entries()) == []
    assert [cause(o) for o in tier.get(keys(3), [memoryview(bytearray(3))] * 3)] == ["absent"] * 3
    assert tier.put([key(1)], [[b"abc"]]) == [3]
    assert read(tier, [key(1)], [3]) == [b"abc"]


@pytest.mark.parametrize(
    "url",
    [
        "redis://h:port",
        "redis://h:99999999/0",
        "redis://user:secret@h/0?no_such_option=1",
        "rediss://h/?ssl_cert_reqs=x",
    ],
)
def test_a_url_that_cannot_work_is_refused_without_telling_its_password(url):
    with pytest.raises(ConfigError) as error:
        make_tier(url)
    assert "secret" not in str(error.value)


def wire(answer: bytes) -> Wire:
    """Reads what a server said before it hung up."""
    ours, theirs = socket.socketpair()
    theirs.sendall(answer)
    theirs.close()
    return Wire(ours, time.monotonic() + 5)


@given(
    st.lists(
        st.one_of(
            st.binary(max_size=40), st.sampled_from([b"$", b"*", b"+", b":", b"-", b"\r\n", b"-1", b"0", b"9" * 30])
        ),
        max_size=30,
    )
)
@settings(max_examples=1500, deadline=None)
def test_no_answer_ends_in_anything_but_an_os_error(pieces):
    answer = b"".join(pieces)
    for read_one in (lambda w: w.reply(), lambda w: w.value_into(memoryview(bytearray(10)))):
        got = wire(answer)
        with contextlib.suppress(OSError):
            for _ in range(40):
                read_one(got)
            raise AssertionError("forty answers out of thirty pieces")


REPLIES = st.recursive(
    st.one_of(
        st.none(), st.integers(-(2**62), 2**62), st.binary(max_size=50),
        st.text("abcDEF 123", max_size=20).map(ServerError)
    ),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@given(st.lists(REPLIES, min_size=1, max_size=5))
@settings(max_examples=300, deadline=None)
def test_every_reply_is_read_as_it_was_written(replies):
    def write(reply) -> bytes:
        if reply is None:
            return b"$-1\r\n"
        if isinstance(reply, int):
            return b":%d\r\n" % reply
        if isinstance(reply, ServerError):
            return b"-%b\r\n" % reply.encode()
        if isinstance(reply, bytes):
            return b"$%d\r\n%b\r\n" % (len(reply), reply)
        return b"*%d\r\n" % len(reply) + b"".join(map(write, reply))

    def depth(reply) -> int:
        return 1 + max(map(depth, reply), default=0) if isinstance(reply, list) else 0

    got = wire(b"".join(map(write, replies)))
    for reply in replies:
        if depth(reply) > 4:
            with pytest.raises(RespError):
                got.reply()
            return
        assert got.reply() == reply


@given(st.lists(st.binary(max_size=40_000), max_size=12))
@settings(max_examples=60, deadline=None)
def test_packets_are_the_same_bytes(parts):
    assert b"".join(map(bytes, packets(parts))) == b"".join(parts)


def test_a_server_that_trickles_cannot_outlast_the_deadline():
    ours, theirs = socket.socketpair()
    stop = threading.Event()

    def trickle() -> None:
        theirs.sendall(b"$1000000\r\n")
        while not stop.wait(0.02):
            theirs.sendall(b"x")

    thread = threading.Thread(target=trickle)
    thread.start()
    start = time.monotonic()
    with pytest.raises(TimeoutError):
        Wire(ours, start + 0.3).value_into(memoryview(bytearray(1_000_000)))
    assert time.monotonic() - start < 0.6
    stop.set()
    thread.join()


def _wait(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.05)
