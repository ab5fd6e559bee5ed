"""`lmcache-blend store` on directories and URLs, and the same operations over the HTTP API."""

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kv import chunk, equal, key, keys
from servers import free_port, redis_server
from tiny import one_line_error

from lmcache_blend import KVEngine, cli
from lmcache_blend.engine import Keyer
from lmcache_blend.engine.admin import Admin
from lmcache_blend.engine.http import MAX_BODY_BYTES, make_app, serve
from lmcache_blend.errors import ConfigError, UnknownNameError

TOKEN = "0123456789abcdef-token"


@pytest.fixture(scope="module")
def redis():
    server = redis_server()
    yield server
    server.close()


@pytest.fixture(params=["directory", "redis", "file"])
def target(request, tmp_path):
    """A store of five chunks, the last two of another tenant."""
    if request.param == "redis":
        server = request.getfixturevalue("redis")
        import redis as client

        client.Redis(port=server.port).flushall()
        target = f"redis://127.0.0.1:{server.port}"
    else:
        target = str(tmp_path / "kv") if request.param == "directory" else f"file://{tmp_path}/kv"
    fill(target)
    return target


def fill(target: str) -> None:
    tier = {"tier": target} if "://" in target else {"tier": "disk", "path": target}
    with KVEngine(tiers=[tier]) as engine:
        engine.store([*keys(3), *keys(2, "b")], [chunk(i) for i in range(5)], wait=True)


def ask(capsys, *arguments: str):
    assert cli.main(["store", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def verified(checked: int, corrupt: int = 0, kept: int = 0, unread: int = 0):
    return {"store": {"checked": checked, "corrupt": corrupt, "kept": kept, "unread": unread}}


# On a directory or a URL


def test_ls_usage_and_lookup(target, capsys):
    everything = ask(capsys, "ls", target)
    assert everything["complete"]
    assert {row["key"] for row in everything["chunks"]} == {k.hex() for k in [*keys(3), *keys(2, "b")]}
    assert {row["key"] for row in ask(capsys, "ls", target, "--salt", "b")["chunks"]} == {k.hex() for k in keys(2, "b")}
    assert not ask(capsys, "ls", target, "--limit", "2")["complete"]
    usage = ask(capsys, "usage", target)["store"]
    assert usage["chunks"] == 5
    assert usage["nbytes"] == sum(row["nbytes"] for row in everything["chunks"])
    found = ask(capsys, "lookup", target, key(0).hex(), key(9).hex(), key(1).hex())
    assert found["tiers"] == ["store", None, "store"]
    assert found["prefix_chunks"] == 1
    assert cli.main(["store", "ls", target]) == 0
    assert key(0).hex() in capsys.readouterr().out


def test_who_has_these_tokens(target, capsys, tmp_path):
    tokens = list(range(600))
    keyer = Keyer("model-1", salt="b")
    with KVEngine(tiers=[{"tier": target} if "://" in target else {"tier": "disk", "path": target}]) as engine:
        engine.store(keyer.prefix_keys(tokens)[:2], [chunk(0), chunk(1)], wait=True)
    (tmp_path / "tokens.json").write_text(json.dumps(tokens))
    arguments = ("lookup", target, "--tokens", str(tmp_path / "tokens.json"), "--fingerprint", "model-1")
    assert ask(capsys, *arguments, "--salt", "b")["prefix_tokens"] == 512
    assert ask(capsys, *arguments, "--salt", "c")["prefix_tokens"] == 0


def test_pins_hold_for_every_process_until_they_end(target, capsys):
    assert ask(capsys, "pin", target, key(0).hex(), key(9).hex()) == {"pinned": [True, False]}
    assert [row["key"] for row in ask(capsys, "ls", target)["chunks"] if row["pinned"]] == [key(0).hex()]
    ask(capsys, "clear", target)
    assert [row["key"] for row in ask(capsys, "ls", target)["chunks"]] == [key(0).hex()]
    ask(capsys, "unpin", target, key(0).hex())
    assert ask(capsys, "clear", target) == {"deleted": 1}
    fill(target)
    ask(capsys, "pin", target, key(1).hex(), "--seconds", "0.2")
    time.sleep(0.4)
    assert ask(capsys, "clear", target) == {"deleted": 5}


def test_clear_of_one_tenant_and_by_force(target, capsys):
    ask(capsys, "pin", target, key(0, "b").hex())
    assert ask(capsys, "clear", target, "--salt", "b") == {"deleted": 1}
    assert ask(capsys, "clear", target, "--salt", "b", "--force") == {"deleted": 1}
    assert ask(capsys, "usage", target)["store"]["chunks"] == 3


def test_move_compress_and_verify(target, capsys, tmp_path):
    other = str(tmp_path / "other")
    before = ask(capsys, "usage", target)["store"]["nbytes"]
    assert ask(capsys, "compress", target, "--all", "--codec", "int8")["compressed"] == 5
    assert ask(capsys, "usage", target)["store"]["nbytes"] < 0.6 * before
    assert ask(capsys, "compress", target, "--all", "--codec", "none")["decompressed"] == 5
    assert ask(capsys, "usage", target)["store"]["nbytes"] == before
    fill_again = ask(capsys, "clear", target)
    assert fill_again == {"deleted": 5}
    fill(target)
    assert ask(capsys, "move", target, key(0).hex(), key(9).hex(), "--to", other, "--codec", "zstd") == {
        "moved": 1,
        "missed": [key(9).hex()],
    }
    assert ask(capsys, "move", target, "--all", "--to", other, "--keep")["moved"] == 4
    assert ask(capsys, "usage", target)["store"]["chunks"] == 4
    assert ask(capsys, "verify", other) == verified(5)
    with KVEngine(tiers=[{"tier": "disk", "path": other}]) as engine:
        found = engine.retrieve([*keys(3), *keys(2, "b")])
        assert all(equal(x, chunk(i)) for i, x in enumerate(found))


def test_verify_finds_and_deletes_a_damaged_chunk(tmp_path, capsys):
    fill(str(tmp_path))
    path = tmp_path / "chunks" / key(0).hex()[:2] / key(0).hex()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert cli.main(["store", "verify", str(tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == verified(5, 1)
    assert ask(capsys, "verify", str(tmp_path)) == verified(4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ls", "no/such/folder"], "is no directory"),
        (["ls", "file:///no/such/folder"], "is no directory"),
        (["ls", "of_others"], "is no store"),
        (["ls", ".", "--salt", "\udcff"], "no Unicode text"),
        (["lookup", ".", "--tokens", "deep.json"], "no JSON list"),
        (["move", ".", "--all", "--to", "."], "is the store itself"),
        (["move", ".", "--all", "--to", "/proc/nothing"], "no store can be opened"),
        (["move", "http://127.0.0.1:9", "--all", "--tier", "cpu", "--to", "disk", "--codec", "int8"], "own codecs"),
        (["ls", "ftp://host/"], "unknown tier 'ftp'"),
        (["lookup", "."], "0 chunks"),
        (["pin", ".", "abc"], "keys"),
        (["pin", ".", "../" * 21 + "x"], "keys"),
        (["pin", "s3://bucket?endpoint=http://127.0.0.1:9", "0" * 64], "keeps no pins"),
        (["move", ".", "--to", "x"], "needs keys, or --all"),
        (["ls", ".", "--tier", "cpu"], "--tier"),
        (["compress", ".", "0" * 64, "--codec", "int5"], "unknown codec"),
        (["ls", "http://127.0.0.1:9"], "LMCACHE_BLEND_TOKEN"),
        (["serve", "."], "LMCACHE_BLEND_TOKEN"),
        (["lookup", ".", "--tokens", "missing.json"], "missing.json"),
    ],
)
def test_bad_arguments_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LMCACHE_BLEND_TOKEN", raising=False)
    if arguments[0] not in ("lookup", "pin", "unpin") or "deep.json" in arguments:
        fill(str(tmp_path))
        (tmp_path / "of_others").mkdir()
        (tmp_path / "of_others" / "thesis.txt").write_text("x")
        (tmp_path / "deep.json").write_text("[" * 100_000)
    status = cli.main(["store", *arguments])
    if message == "0 chunks":
        assert status == 0
        assert message in capsys.readouterr().out
    else:
        assert status == 2
        assert message in one_line_error(capsys)


def test_a_store_that_does_not_answer_is_not_reported_empty(capsys, tmp_path):
    gone = f"redis://127.0.0.1:{free_port()}"
    fill(str(tmp_path))
    for arguments in (
        *(([command, gone]) for command in ("ls", "usage", "verify", "clear")),
        *([command, gone, key(0).hex()] for command in ("lookup", "pin", "unpin")),
        ["move", str(tmp_path), "--all", "--to", gone],
    ):
        assert cli.main(["store", *arguments]) == 1
        assert "does not answer" in one_line_error(capsys)
    assert ask(capsys, "usage", str(tmp_path))["store"]["chunks"] == 5


def test_unpin_says_whose_pin_it_ended(target, capsys):
    ask(capsys, "pin", target, key(0).hex())
    assert ask(capsys, "unpin", target, key(0).hex(), key(1).hex()) == {"unpinned": [True, False]}


def test_the_list_fits_into_80_columns(target, capsys):
    ask(capsys, "pin", target, key(0).hex())
    assert cli.main(["store", "ls", target]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[-1] == "5 chunks"
    assert max(map(len, lines)) <= 80
    assert [line[:64] for line in lines if line.endswith(" pinned")] == [key(0).hex()]


def test_verify_says_what_it_could_not_delete(tmp_path, capsys):
    fill(str(tmp_path))
    path = tmp_path / "chunks" / key(0).hex()[:2] / key(0).hex()
    path.write_bytes(path.read_bytes()[:-1])
    ask(capsys, "pin", str(tmp_path), key(0).hex())
    assert cli.main(["store", "verify", str(tmp_path)]) == 1
    assert "1 chunk damaged and not deleted: pinned" in capsys.readouterr().err
    ask(capsys, "unpin", str(tmp_path), key(0).hex())
    assert cli.main(["store", "verify", str(tmp_path)]) == 1
    assert "1 chunk damaged and deleted" in capsys.readouterr().err
    assert cli.main(["store", "verify", str(tmp_path)]) == 0


# Over HTTP


class Api:
    """The API of an engine with two tiers, served by uvicorn on the loopback interface."""

    def __init__(self, engine: KVEngine, port: int):
        self.engine, self.port = engine, port

    def call(self, method: str, path: str, body=b"", token: str | None = TOKEN, headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        sent = {**({"Authorization": f"Bearer {token}"} if token else {}), **(headers or {})}
        try:
            connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body).encode(), sent)
            reply = connection.getresponse()
            return reply.status, reply.read()
        finally:
            connection.close()

    def post(self, operation: str, **request):
        status, data = self.call("POST", f"/v1/{operation}", request)
        assert status == 200, data
        return json.loads(data)


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    folder, port = tmp_path_factory.mktemp("kv"), free_port()
    with KVEngine(tiers=[{"tier": "cpu", "capacity_bytes": 1 << 24}, {"tier": "disk", "path": str(folder)}]) as engine:
        thread = threading.Thread(target=serve, args=(engine, TOKEN), kwargs={"port": port}, daemon=True)
        thread.start()
        end = time.monotonic() + 20
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield Api(engine, port)


@pytest.fixture(autouse=True)
def _empty(request):
    if "api" in request.fixturenames:
        request.getfixturevalue("api").engine.clear(force=True)


def test_operations_over_http(api):
    api.engine.store(keys(3), [chunk(i) for i in range(3)], wait=True)
    found = api.post("lookup", keys=[k.hex() for k in keys(4)], segments=[key(2).hex(), key(7).hex()])
    assert (found["prefix_chunks"], found["tiers"], found["segments"]) == (3, ["cpu"] * 3 + [None], ["cpu", None])
    assert api.post("usage")["disk"]["chunks"] == 3
    assert api.post("pin", keys=[key(0).hex()], seconds=60) == {"pinned": [True]}
    assert api.post("compress", tier="disk", codec="int8") == {"compressed": 3, "missed": []}
    assert api.post("move", keys=[key(1).hex()], source="cpu", target="disk") == {"moved": 1, "missed": []}
    assert len(api.post("ls", tier="cpu")["chunks"]) == 2
    assert api.post("verify")["cpu"] == verified(2)["store"]
    api.post("clear")
    assert {row["key"] for row in api.post("ls")["chunks"]} == {key(0).hex()}
    assert api.post("unpin", keys=[key(0).hex()]) == {"unpinned": [True]}
    tokens = list(range(300))
    api.engine.store(Keyer("m").prefix_keys(tokens), [chunk(0), chunk(1)], wait=True)
    assert api.post("lookup", tokens=tokens, fingerprint="m")["prefix_tokens"] == 300


def test_the_command_line_speaks_to_the_api(api, capsys, monkeypatch):
    monkeypatch.setenv("LMCACHE_BLEND_TOKEN", TOKEN)
    api.engine.store(keys(2), [chunk(i) for i in range(2)], wait=True)
    target = f"http://127.0.0.1:{api.port}"
    assert ask(capsys, "usage", target)["cpu"]["chunks"] == 2
    assert len(ask(capsys, "ls", target, "--tier", "disk")["chunks"]) == 2
    assert ask(capsys, "move", target, "--all", "--tier", "cpu", "--to", "disk")["moved"] == 2
    assert cli.main(["store", "ls", target, "--tier", "gpu"]) == 2
    assert "no tier 'gpu'" in one_line_error(capsys)
    monkeypatch.setenv("LMCACHE_BLEND_TOKEN", "another-token-000")
    assert cli.main(["store", "usage", target]) == 2
    assert "token is needed" in one_line_error(capsys)


@pytest.mark.parametrize("path", ["/v1/usage", "/v1/ls", "/v1/clear", "/metrics", "/v1/events", "/v1/nothing"])
@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", TOKEN])
def test_nothing_is_told_or_done_without_the_token(api, path, header):
    api.engine.store(keys(1), [chunk(0)], wait=True)
    method = "GET" if path in ("/metrics", "/v1/events") else "POST"
    headers = {} if header is None else {"Authorization": header}
    status, data = api.call(method, path, b"{}", token=None, headers=headers)
    assert status == 401
    assert set(json.loads(data)) == {"error"}
    assert key(0) in api.engine


@pytest.mark.parametrize(
    "path",
    ["/../../etc/passwd", "/v1/../../etc/passwd", "/v1/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/v1//etc/passwd",
     "/v1/ls/../x", "/static/..%2f..%2fetc/passwd", "/v1/%00", "/v1/run", "/v1/__class__", "/v1/..", "//etc/passwd"],
)  # fmt: skip
def test_paths_lead_nowhere_but_to_the_operations(api, path):
    for method in ("GET", "POST", "PUT", "DELETE"):
        status, data = api.call(method, path, b"{}")
        assert status in (400, 404, 405), (method, path, status)
        assert b"root:" not in data


def test_keys_are_hex_and_nothing_else(api):
    for bad in ("../../../../etc/passwd", "0" * 63, "0" * 65, "G" * 64, "0" * 64 + "\n", "/" + "0" * 63, ""):
        status, _ = api.call("POST", "/v1/lookup", {"keys": [bad]})
        assert status == 400, bad


def test_no_file_of_the_machine_is_opened_for_a_request(api):
    api.engine.store(keys(1), [chunk(0)], wait=True)
    profile = {"id": "fisher_klt", "profile": "/etc/passwd"}
    for codec in (
        profile,
        json.dumps(profile),
        {"id": "pipeline", "k": [profile]},
        '{"id":"kvtc","\\u0070rofile":"/etc/passwd"}',
    ):
        status, data = api.call("POST", "/v1/compress", {"tier": "disk", "codec": codec})
        assert status == 400, (codec, data)
        assert b"/etc/passwd" not in data
    status, _ = api.call("POST", "/v1/move", {"source": "disk", "target": "/tmp/elsewhere"})
    assert status == 400


def test_requests_over_the_limit_are_refused(api):
    status, data = api.call("POST", "/v1/lookup", b" " * (MAX_BODY_BYTES + 1))
    assert status == 413, data
    # Without a length in advance, as a stream that never ends.
    with socket.create_connection(("127.0.0.1", api.port), 10) as s:
        s.sendall(f"POST /v1/lookup HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n".encode())
        s.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(OSError):
            for _ in range(2 * MAX_BODY_BYTES // 65_536):
                s.sendall(b"10000\r\n" + b" " * 65_536 + b"\r\n")
        assert b" 413 " in s.recv(100)
    with socket.create_connection(("127.0.0.1", api.port), 10) as s:
        with contextlib.suppress(OSError):
            s.sendall(b"POST /v1/lookup HTTP/1.1\r\nX: " + b"x" * 200_000 + b"\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            assert b" 400 " in s.recv(100) or b" 431 " in s.recv(100)
    assert api.call("GET", "/healthz")[0] == 200


def test_many_keys_at_once_are_refused(api):
    many = {"tokens": [1] * 100_000, "fingerprint": "m", "chunk_tokens": 1}
    status, data = api.call("POST", "/v1/lookup", many)
    assert status == 400
    assert b"100000 chunks are more than 65536" in data
    status, data = api.call("POST", "/v1/lookup", {"keys": ["x" * 100] * 20_000})
    assert status == 400
    assert len(data) < 1500, "what was sent is not sent back"
    status, _ = api.call("POST", "/v1/lookup", b'{"tokens": [1], "fingerprint": "\\ud800"}')
    assert status == 400
    status, _ = api.call("POST", "/v1/lookup", {"tokens": [1] * (1 << 20), "fingerprint": "m", "chunk_tokens": 0})
    assert status == 400
    status, data = api.call("POST", "/v1/lookup", {"tokens": [1], "fingerprint": "m", "chunk_tokens": 10**3000})
    assert status == 400
    assert b"chunk_tokens = 1000" in data
    assert len(data) < 1500
    status, _ = api.call("POST", "/v1/lookup", {"keys": ["0" * 64] * 60_000})
    assert status == 200


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just(key(0).hex())),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    ["keys", "segments", "tokens", "segment_tokens", "fingerprint", "salt", "layout", "chunk_tokens", "tier", "limit",
     "seconds", "source", "target", "keep", "codec", "force", "x"]
)  # fmt: skip
OPERATIONS = st.sampled_from(["lookup", "ls", "usage", "pin", "unpin", "move", "compress", "verify", "clear"])


@given(OPERATIONS, st.one_of(JSON, st.dictionaries(FIELDS, JSON, max_size=5)))
@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_request_is_answered_or_refused(any_engine, operation, request):
    with contextlib.suppress(ConfigError, UnknownNameError):
        json.dumps(any_engine.run(operation, request), allow_nan=False)


@pytest.fixture(scope="module")
def any_engine():
    with KVEngine(tiers=[{"tier": "cpu", "capacity_bytes": 1 << 22}]) as engine:
        engine.store(keys(2), [chunk(0), chunk(1)], wait=True)
        yield Admin(engine)


@given(st.binary(max_size=300))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bytes_that_are_no_request_are_refused(api, data):
    status, answer = api.call("POST", "/v1/pin", data)
    assert status == 400
    assert "error" in json.loads(answer)


def test_deeply_nested_json_is_refused(api):
    assert api.call("POST", "/v1/ls", b"[" * 100_000)[0] == 400
    assert api.call("POST", "/v1/compress", b'{"tier":"cpu","codec":' + b'{"a":' * 900 + b"1" + b"}" * 901)[0] == 400


# Events and metrics


def test_followers_see_every_event_in_order_and_go_on_where_they_were(api):
    events = follow(
        api, f"?after={api.engine.events.last}", 3, lambda: api.engine.store(keys(3), [chunk(i) for i in range(3)])
    )
    assert all(e["action"] == "stored" for e in events)
    assert [e["number"] for e in events] == list(range(events[0]["number"], events[0]["number"] + 3))
    again = follow(api, f"?after={events[0]['number']}", 2)
    assert again == events[1:]
    reset = follow(api, "?after=999999999", 1)
    assert reset[0]["action"] == "reset"


def test_events_of_eviction_reach_a_follower(api):
    api.engine.store(keys(1), [chunk(0)], wait=True)
    events = follow(api, "", 1, lambda: (time.sleep(0.3), api.engine.clear()))
    assert events[0]["keys"] == [key(0).hex()]
    assert events[0]["action"] == "removed"


def test_a_number_that_is_none_is_refused(api):
    for bad in ("-1", "x", "1e9", "9" * 40, "%D9%A3"):
        assert api.call("GET", f"/v1/events?after={bad}")[0] == 400


def follow(api, query: str, count: int, meanwhile=lambda: None) -> list[dict]:
    connection = http.client.HTTPConnection("127.0.0.1", api.port, timeout=10)
    connection.request("GET", f"/v1/events{query}", headers={"Authorization": f"Bearer {TOKEN}"})
    reply = connection.getresponse()
    assert reply.status == 200
    assert reply.getheader("content-type", "").startswith("text/event-stream")
    thread = threading.Thread(target=meanwhile)
    thread.start()
    out = []
    while len(out) < count:
        line = reply.readline()
        if line.startswith(b"data: "):
            out.append(json.loads(line[6:]))
    thread.join()
    connection.close()
    return out


def test_prometheus_metrics_are_served(api):
    api.engine.store(keys(1), [chunk(0)], wait=True)
    api.engine.retrieve(keys(2))
    status, data = api.call("GET", "/metrics")
    assert status == 200
    for name in (b"hits_total", b"misses_total", b"transfer_bytes_total", b"transfer_seconds_bucket", b"queue_depth"):
        assert b"lmcache_blend_" + name + b"{" in data
    assert b'lmcache_blend_misses_total{cause="absent",tier="cpu"}' in data


def test_what_tiers_hold_is_a_gauge_that_is_renewed_by_asking(tmp_path):
    import asyncio

    from fuzz_parsers import Http

    from lmcache_blend.metrics import value

    with KVEngine(tiers=[{"tier": "disk", "path": str(tmp_path), "name": "gauged"}]) as engine:
        engine.store(keys(2), [chunk(0), chunk(1)], wait=True)
        server = Http()
        server.app = make_app(engine, server.token)
        assert asyncio.run(server.ask("/metrics", server.token, b"", "GET")) == 200
        assert value("lmcache_blend_chunks", tier="gauged") == 2
        assert value("lmcache_blend_used_bytes", tier="gauged") == engine.usage()["gauged"].nbytes


# Starting it


@pytest.mark.parametrize(
    "token", ["", "short", "x" * 15, "sixteen chars or", "tab\tsixteen-chars", "ünïcode-sixteen-chars"]
)
def test_a_token_that_could_be_guessed_or_sent_wrong_is_refused(token):
    with KVEngine() as engine, pytest.raises(ConfigError, match="token"):
        make_app(engine, token)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.1", "example.org", ""])
def test_other_interfaces_need_a_certificate(host):
    with KVEngine() as engine, pytest.raises(ConfigError, match="certificate"):
        serve(engine, TOKEN, host=host)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 99_999}, "cannot listen on 127.0.0.1 port 99999"),
        ({"port": -1}, "cannot listen"),
        ({"port": None}, "in use"),
        ({"certificate": "bad.pem"}, "certificate 'bad.pem' and key cannot be used"),
        ({"certificate": "missing.pem"}, "missing.pem"),
        ({"key": "bad.pem"}, "give both"),
    ],
)
def test_what_cannot_be_served_is_one_clear_error(settings, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pem").write_text("no certificate")
    settings = {k: Path(v) if isinstance(v, str) else v for k, v in settings.items()}
    with KVEngine() as engine, socket.create_server(("127.0.0.1", 0)) as taken:
        if settings.get("port", 0) is None:
            settings["port"] = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=message) as caught:
            serve(engine, TOKEN, **{"port": 0, **settings})
        assert "\n" not in str(caught.value)


def test_serve_in_a_process_of_its_own(tmp_path):
    fill(str(tmp_path))
    port, environment = free_port(), {**os.environ, "LMCACHE_BLEND_TOKEN": TOKEN}
    command = [sys.executable, "-m", "lmcache_blend.cli", "store", "serve", str(tmp_path), "--port", str(port)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline().decode().strip() == f"http://127.0.0.1:{port}/v1"
            client = Api(None, port)
            end = time.monotonic() + 20
            while time.monotonic() < end:
                with contextlib.suppress(OSError):
                    assert client.post("usage")["store"]["chunks"] == 5
                    break
                time.sleep(0.1)
            else:
                raise AssertionError("it does not answer")
        finally:
            process.terminate()
        assert process.wait(10) in (0, -15)
