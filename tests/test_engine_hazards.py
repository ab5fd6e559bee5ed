"""What could lose or mix up chunks: two names of one store, foreign codecs, quotas, pins of damaged files."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from kv import chunk, equal, flip, key, keys
from third_party_tier import DictTier

from lmcache_blend import KVEngine
from lmcache_blend.engine import Keyer, chunk_key, values
from lmcache_blend.engine.tiers.base import Miss
from lmcache_blend.errors import ConfigError
from lmcache_blend.metrics import value

SIZE = values.Blank.of(key(0), chunk(0)).nbytes


def disk(path, **settings):
    return {"tier": "disk", "path": str(path), **settings}


# Keys


@pytest.mark.parametrize(
    "bad", [[-1], [1 << 32], [1 << 70], [1.5], [True], "abc", torch.zeros(1, 3, dtype=torch.long), torch.ones(3)]
)
def test_what_are_no_token_ids_has_no_key(bad):
    """Cut down to 32 bits it would have the key of other tokens."""
    for call in (Keyer("m").prefix_keys, Keyer("m").segment_key):
        with pytest.raises(ConfigError, match="token ids") as caught:
            call(bad)
        assert "\n" not in str(caught.value)


def test_a_key_does_not_depend_on_the_width_of_the_ids():
    ids = torch.tensor([5, 0])
    assert chunk_key("m", "", b"", ids.int()) == chunk_key("m", "", b"", ids) != chunk_key("m", "", b"", ids[:1])
    assert Keyer("m").prefix_keys(ids.int()) == Keyer("m").prefix_keys([5, 0]) == Keyer("m").prefix_keys(ids)
    assert Keyer("m").prefix_keys([]) == Keyer("m").prefix_keys(torch.empty(0)) == []
    assert Keyer("m").segment_key(torch.stack([ids, ids], 1)[:, 0]) == Keyer("m").segment_key(ids)


def test_a_salt_that_is_no_text_is_refused():
    with pytest.raises(ConfigError, match="no Unicode text"):
        Keyer("m", salt="\udcff")


# Moving


def test_moving_between_two_names_of_one_store_loses_nothing(tmp_path):
    (tmp_path / "other").symlink_to(tmp_path / "kv")
    with KVEngine(tiers=[disk(tmp_path / "kv", name="a"), disk(tmp_path / "other", name="b")]) as engine:
        engine.store(keys(3), [chunk(i) for i in range(3)], wait=True)
        assert engine.move(keys(3), "a", "b") == [True] * 3
        assert all(map(equal, engine.retrieve(keys(3)), [chunk(i) for i in range(3)]))
        assert engine.move(keys(3), "a", "a") == [True] * 3
        assert engine.lookup(keys(3)).prefix == 3


def test_readers_never_get_another_chunk_while_chunks_move(tmp_path):
    with KVEngine(tiers=[{"tier": "cpu", "capacity_bytes": 1 << 22}, disk(tmp_path, write="back")]) as engine:
        engine.store(keys(8), [chunk(i) for i in range(8)], wait=True)
        stop, wrong, read = threading.Event(), [], [0]

        def reader():
            while not stop.is_set():
                for i, found in enumerate(engine.retrieve(keys(8))):
                    if found is not None and not equal(found, chunk(i)):
                        wrong.append(i)
                    read[0] += found is not None

        threads = [threading.Thread(target=reader) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(10):
            assert engine.move(keys(8), "cpu", "disk") == [True] * 8
            engine.move(keys(8), "disk", "cpu")
            engine.store(keys(8), [chunk(i) for i in range(8)], wait=True)
        stop.set()
        for thread in threads:
            thread.join()
        assert not wrong
        assert read[0] > 100
        assert all(map(equal, engine.retrieve(keys(8)), [chunk(i) for i in range(8)]))


# Codecs that this process does not have

THIRD_PARTY = """
import sys
sys.path[:0] = {path!r}
from kv import chunk, keys
from lmcache_blend import KVEngine, register_codec
from lmcache_blend.codecs import Zstd

@register_codec("third_partys")
class ThirdPartys(Zstd):
    pass

with KVEngine(tiers=[{{"tier": "disk", "path": {folder!r}, "codec": "third_partys"}}]) as engine:
    engine.store(keys(3), [chunk(i) for i in range(3)], wait=True)
    print(sum(c is not None for c in engine.retrieve(keys(3))))
"""


def test_chunks_of_a_codec_that_is_not_at_hand_are_misses_and_stay(tmp_path):
    """Whoever has the codec still needs them: `store verify` on another machine must not delete them."""
    where = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    code = THIRD_PARTY.format(path=where, folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3"
    with KVEngine(tiers=[disk(tmp_path)]) as engine:
        assert engine.verify()["disk"] == (0, 0, 0, 3)
        assert engine.retrieve(keys(3)) == [None] * 3
        assert [engine.get(k) for k in keys(3)] == [None] * 3
        assert engine.compress(keys(3), "disk", "int8") == [False] * 3
        assert engine.move(keys(3), "disk", "disk") == [False] * 3
        assert len(list(engine.list())) == 3
        # A miss is recomputed and stored, in our codec.
        assert engine.lookup(keys(3)).prefix == 0
        engine.store([key(0)], [chunk(0)], wait=True)
        assert equal(engine.retrieve([key(0)])[0], chunk(0))
        assert engine.verify()["disk"] == (1, 0, 0, 2)


def test_chunks_of_another_profile_are_misses_and_stay(tmp_path, monkeypatch):
    """A profile that was fitted anew does not make what others still read with the old one garbage."""
    with KVEngine(tiers=[disk(tmp_path, codec="cachegen")]) as engine:
        engine.store([key(0)], [chunk(0)], wait=True)
        before = value("lmcache_blend_errors_total", tier="disk", error="ForeignChunkError")
        with monkeypatch.context() as patch:
            patch.setattr(type(engine.levels[0].codec), "profile_digest", "0" * 64)
            assert engine.retrieve([key(0)]) == [None]
        assert value("lmcache_blend_errors_total", tier="disk", error="ForeignChunkError") - before == 1
    with KVEngine(tiers=[disk(tmp_path, codec="cachegen")]) as engine:
        assert engine.retrieve([key(0)]) != [None]


class Failing(DictTier):
    """Fails where `fail` says so."""

    fail = None

    def get(self, keys, buffers, offsets=None):
        out = super().get(keys, buffers, offsets)
        return [self.fail(at) or o for at, o in zip(offsets or [0] * len(keys), out, strict=True)] if self.fail else out


def test_a_timeout_half_way_through_a_head_deletes_nothing(monkeypatch):
    monkeypatch.setattr("lmcache_blend.engine.pipeline.WHOLE", 0)
    monkeypatch.setattr(values, "HEAD_GUESS", 60)
    with KVEngine(tiers=[{"tier": "test_engine_hazards.Failing", "faults": {"retries": 0, "failures": 99}}]) as engine:
        engine.store([key(0)], [chunk(0)], wait=True)
        engine.levels[0].tier.fail = lambda at: Miss("error", "no answer") if at else None
        assert engine.get(key(0)) is None
        engine.levels[0].tier.fail = None
        stored = engine.get(key(0))
        assert stored is not None
        assert all(torch.equal(a[0], b[0]) for a, b in zip(stored.chunk.layers, chunk(0).layers, strict=True))


class Broken:
    """A codec of a third party that fails on the way down, or up."""

    def __init__(self, encode=None, decode=None):
        self._encode, self._decode = encode, decode

    def get_config(self):
        return {"id": "zstd", "level": 3, "dtype": None}

    def encode(self, item):
        if self._encode:
            raise self._encode
        from lmcache_blend import get_codec

        return get_codec("zstd").encode(item)

    def decode(self, data):
        raise self._decode


def test_a_codec_that_fails_is_a_miss_and_a_metric(tmp_path):
    with KVEngine(tiers=[disk(tmp_path, codec="zstd")]) as engine:
        good = engine.levels[0].codec
        before = value("lmcache_blend_errors_total", tier="disk", error="ZeroDivisionError")
        engine.levels[0].codec = Broken(encode=ZeroDivisionError("x"))
        engine.store([key(0)], [chunk(0)], wait=True)
        assert engine.lookup([key(0)]).prefix == 0
        engine.levels[0].codec = good
        engine.store([key(0)], [chunk(0)], wait=True)
        engine.levels[0].codec = Broken(decode=ZeroDivisionError("x"))
        assert engine.retrieve([key(0)]) == [None]
        assert value("lmcache_blend_errors_total", tier="disk", error="ZeroDivisionError") - before == 2
        engine.levels[0].codec = good
        assert equal(engine.retrieve([key(0)])[0], chunk(0)), "it was not damaged"


def test_compressing_with_a_codec_that_takes_none_of_the_chunks_changes_nothing(tmp_path, monkeypatch):
    from lmcache_blend.codecs import Zstd

    with KVEngine(tiers=[disk(tmp_path)]) as engine:
        engine.store(keys(3), [chunk(i) for i in range(3)], wait=True)
        plain = Zstd.encode

        def encode(self, item):
            if int(item.tokens[0]) in refused:
                raise ConfigError("the profile is of another model")
            return plain(self, item)

        monkeypatch.setattr(Zstd, "encode", encode)
        refused = {0, 1, 2}
        with pytest.raises(ConfigError, match="another model"):
            engine.compress(keys(3), "disk", "zstd")
        refused = {1}
        assert engine.compress(keys(3), "disk", "zstd") == [True, False, True]
        assert all(map(equal, engine.retrieve(keys(3)), [chunk(i) for i in range(3)]))


# Damage that cannot be deleted


def test_a_damaged_chunk_that_another_process_pins_heals_with_the_next_store(tmp_path):
    with KVEngine(tiers=[disk(tmp_path)]) as engine, KVEngine(tiers=[disk(tmp_path)]) as other:
        engine.store(keys(2), [chunk(0), chunk(1)], wait=True)
        assert other.pin([key(0)]) == [True]
        flip(engine.levels[0].tier._directory.path(key(0)))
        assert engine.verify()["disk"] == (2, 1, 1, 0)
        assert engine.lookup(keys(2)).tiers == [None, "disk"]
        engine.store([key(0)], [chunk(0)], wait=True)
        assert all(map(equal, engine.retrieve(keys(2)), [chunk(0), chunk(1)]))
        assert [item.pinned for item in engine.list() if item.key == key(0)] == [True], "the pin holds"
        assert engine.verify()["disk"] == (2, 0, 0, 0)


# Quotas


@pytest.mark.parametrize("tier", ["cpu", "disk"])
def test_a_quota_holds_for_batches_and_threads(tmp_path, tier):
    options = {"path": str(tmp_path)} if tier == "disk" else {}
    settings = {"tier": tier, "capacity_bytes": 400 * SIZE, "quotas": {"a": 3 * SIZE, "none": 0}, **options}
    with KVEngine(tiers=[settings]) as engine:
        engine.store(keys(10, "a"), [chunk(i) for i in range(10)], wait=True)
        assert [i for i in range(10) if engine.lookup([key(i, "a")]).prefix] == [7, 8, 9]
        threads = [
            threading.Thread(
                target=lambda n=n: engine.store(
                    [key(100 * n + i, "a") for i in range(6)], [chunk(i) for i in range(6)], wait=True
                )
            )
            for n in range(1, 9)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        engine.store(keys(5, "none"), [chunk(i) for i in range(5)], wait=True)
        engine.store(keys(5, "unknown"), [chunk(i) for i in range(5)], wait=True)
        held = [item.key for item in engine.list()]
        assert sum(k[:4] == key(0, "a")[:4] for k in held) <= 3
        assert engine.lookup(keys(5, "none")).tiers == [None] * 5
        assert engine.lookup(keys(5, "unknown")).prefix == 5


def test_what_a_quota_refuses_costs_the_others_nothing(tmp_path):
    settings = disk(tmp_path, capacity_bytes=6 * SIZE, quotas={"none": 0, "small": SIZE})
    with KVEngine(tiers=[settings]) as engine:
        engine.store(keys(6, "b"), [chunk(i) for i in range(6)], wait=True)
        engine.store(keys(6, "none"), [chunk(i) for i in range(6)], wait=True)
        assert engine.lookup(keys(6, "b")).prefix == 6
        engine.store(keys(6, "small"), [chunk(i) for i in range(6)], wait=True)
        assert sum(item.key[:4] == key(0, "b")[:4] for item in engine.list()) == 5, "one chunk is what it may have"


def test_a_quota_below_0_is_refused():
    with pytest.raises(ConfigError, match=r"quotas\.a = -1"):
        KVEngine(tiers=[{"tier": "cpu", "capacity_bytes": 1 << 20, "quotas": {"a": -1}}])


# Pins and events


def test_unpin_of_another_engines_pin_says_so(tmp_path):
    with KVEngine(tiers=[disk(tmp_path)]) as engine, KVEngine(tiers=[disk(tmp_path)]) as other:
        engine.store([key(0)], [chunk(0)], wait=True)
        engine.pin([key(0)])
        assert other.unpin(keys(2)) == [True, False]
        assert other.unpin(keys(2)) == [False, False]


def test_nothing_that_changes_nothing_is_an_event():
    """An event without keys means every chunk of a tier."""
    with KVEngine() as engine:
        engine.store(keys(2), [chunk(0), chunk(1)], wait=True)
        last = engine.events.last
        engine.pin([key(9)])
        engine.unpin([key(0)])
        engine.move([key(9)], "cpu", "cpu")
        assert engine.events.last == last
        engine.pin([key(0)])
        engine.clear()
        actions = [(e.action, e.keys) for e in engine.events.after(last, timeout=0)]
        assert actions == [("pinned", (key(0).hex(),)), ("removed", (key(1).hex(),))], "not all of the tier is cleared"
        engine.clear(force=True)
        assert [e.action for e in engine.events.after(engine.events.last - 2, timeout=0)] == ["removed", "cleared"]
