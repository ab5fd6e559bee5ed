"""KVEngine: what goes in comes out or is a miss, whatever tiers, codecs, evictions and faults lie between."""

import asyncio
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from kv import chunk, equal, key, keys

from lmcache_blend import KVEngine, MemoryStore, get_codec
from lmcache_blend.engine import EngineConfig, Keyer, TierConfig, chunk_key, values
from lmcache_blend.engine.keys import tenant
from lmcache_blend.errors import ConfigError, UnknownNameError
from lmcache_blend.metrics import value

SIZE = values.Blank.of(key(0), chunk(0)).nbytes
CPU = {"tier": "cpu", "capacity_bytes": 64 << 20}
CODED = ["int8", "cachegen", "zstd", {"id": "raw", "dtype": "bfloat16"}]


def cpu(n, **settings):
    """Room for n chunks."""
    return {"tier": "cpu", "capacity_bytes": n * -(-SIZE // 4096) * 4096, **settings}


def disk(path, **settings):
    return {"tier": "disk", "path": str(path), **settings}


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    assert condition()


@pytest.fixture
def two(tmp_path):
    with KVEngine(tiers=[CPU, disk(tmp_path)]) as engine:
        yield engine


# Keys


def test_keys_chain_over_the_prefix_and_are_the_same_everywhere():
    keyer = Keyer("model", salt="tenant")
    a, b = keyer.prefix_keys(range(700)), keyer.prefix_keys([*range(300), 9, *range(301, 700)])
    assert len(a) == 3
    assert a[0] == b[0]
    assert a[1] != b[1]
    assert a[2] != b[2]
    assert keyer.prefix_keys(torch.arange(700)) == a == Keyer("model", "tenant").prefix_keys(np.arange(700))
    assert keyer.prefix_keys(range(700), partial=False) == a[:2]
    assert keyer.prefix_keys(range(512)) == a[:2]
    assert a[2].hex() == "fbce3007cfe0f1288ddb09ff5f1437c67d56f2732ee0d4ad549ae81c3b966726"
    assert chunk_key("m", "s", b"b", torch.arange(3)).hex() == (
        "96899495b41e217a7de8f3ef48c386fb3d5577a622e725520b2d83e59140367e"
    )


@pytest.mark.parametrize(
    "other",
    [Keyer("model2"), Keyer("model", salt="x"), Keyer("model", layout="post_rope"), Keyer("model", chunk_tokens=128)],
)
def test_keys_of_other_models_tenants_layouts_and_sizes_never_meet(other):
    mine = Keyer("model")
    tokens = range(256)
    assert not set(mine.prefix_keys(tokens)) & set(other.prefix_keys(tokens))
    if other.chunk_tokens == 256:
        assert mine.segment_key(tokens) != other.segment_key(tokens)
    assert mine.segment_key(tokens) not in mine.prefix_keys(tokens)


def test_a_keys_first_bytes_are_the_tenants():
    a, b = Keyer("m", "a"), Keyer("m", "b")
    assert {k[:4] for k in a.prefix_keys(range(600))} == {a.segment_key([1])[:4]} == {tenant("a")}
    assert a.segment_key([1])[4:] != b.segment_key([1])[4:]


# Store, look up, retrieve


@pytest.mark.parametrize("codec", [None, "raw", "lossless"])
def test_chunks_come_back_from_every_tier(tmp_path, codec):
    chunks = [chunk(i) for i in range(5)]
    with KVEngine(tiers=[CPU, disk(tmp_path, codec=codec)]) as engine:
        assert engine.store(keys(5), chunks) == [True] * 5
        assert all(map(equal, engine.retrieve(keys(5)), chunks))
        engine.flush()
        assert engine.lookup(keys(5)).tiers == ["cpu"] * 5
        engine.clear("cpu")
        assert engine.lookup(keys(5)).tiers == ["disk"] * 5
        assert all(map(equal, engine.retrieve(keys(5)), chunks))
    with KVEngine(tiers=[CPU, disk(tmp_path, codec=codec)]) as engine:
        assert all(map(equal, engine.retrieve(keys(5)), chunks))


@pytest.mark.parametrize("codec", CODED)
def test_a_coded_tier_gives_what_its_codec_gives(tmp_path, codec):
    item, coder = chunk(0), get_codec(codec)
    wanted = coder.decode(coder.encode(item))
    with KVEngine(tiers=[disk(tmp_path, codec=codec)]) as engine:
        engine.store([key(0)], [item], wait=True)
        assert equal(engine.retrieve([key(0)])[0], wanted)
        assert equal(replace(wanted, layers=tuple(engine.get(key(0)).chunk.layers)), wanted)
    with KVEngine(tiers=[disk(tmp_path)]) as engine:
        assert equal(engine.retrieve([key(0)])[0], wanted), "a value names its codec"


def test_lookup_gives_the_longest_prefix_and_every_segment_in_one_call(two):
    two.store([key(0), key(1), key(3)], [chunk(0), chunk(1), chunk(3)], wait=True)
    found = two.lookup(keys(5), segments=[key(3), key(9)])
    assert found == (2, ["cpu", "cpu", None, "cpu", None], ["cpu", None])
    assert two.lookup([]) == (0, [], [])


def test_what_was_stored_is_served_before_it_is_written(tmp_path):
    with KVEngine(tiers=[disk(tmp_path, codec="cachegen")]) as engine:
        many = 20
        engine.store(keys(many), [chunk(i) for i in range(many)])
        assert engine.lookup(keys(many)).prefix == many
        assert all(c is not None for c in engine.retrieve(keys(many)))


def test_the_caller_may_change_its_memory_after_store(tmp_path):
    for tiers in ([CPU], [disk(tmp_path)]):
        with KVEngine(tiers=tiers) as engine:
            mine = chunk(0)
            engine.store([key(0)], [mine])
            for pair in mine.layers:
                for x in pair:
                    x.zero_()
            engine.flush()
            assert equal(engine.retrieve([key(0)])[0], chunk(0))


def test_retrieved_chunks_outlive_eviction(tmp_path):
    """Their memory is not handed out again while a tensor refers to it."""
    with KVEngine(tiers=[cpu(3)]) as engine:
        engine.store([key(0)], [chunk(0)])
        (mine,) = engine.retrieve([key(0)])
        for i in range(1, 20):
            engine.store([key(i)], [chunk(i)])
        assert engine.lookup([key(0)]).tiers == [None]
        assert equal(mine, chunk(0))


def test_retrieve_into_buffers(tmp_path):
    with KVEngine(tiers=[CPU, disk(tmp_path)]) as engine:
        engine.store(keys(3), [chunk(i) for i in range(3)], wait=True)
        for tier in ("cpu", "disk"):
            buffers = [np.zeros(1 << 16, np.uint8) for _ in range(3)]
            out = engine.retrieve(keys(3), into=buffers)
            for i, (item, buffer) in enumerate(zip(out, buffers, strict=True)):
                assert equal(item, chunk(i))
                at = item.layers[0][0].data_ptr() - buffer.ctypes.data
                assert 0 <= at < buffer.nbytes
            if tier == "cpu":
                engine.clear("cpu")
        with pytest.raises(ConfigError, match="buffer 0 has 8 bytes"):
            engine.retrieve(keys(1), into=[bytearray(8)])


def test_a_hit_below_is_promoted(tmp_path):
    for codec in (None, "int8"):
        path = tmp_path / str(codec)
        with KVEngine(tiers=[CPU, disk(path, codec=codec)]) as engine:
            engine.store(keys(2), [chunk(0), chunk(1)], wait=True)
            engine.clear("cpu")
            engine.retrieve([key(0)])
            wait_for(lambda engine=engine: engine.lookup([key(0)]).tiers == ["cpu"])
            engine.get(key(1)).chunk.layers[2]
            wait_for(lambda engine=engine: engine.lookup([key(1)]).tiers == ["cpu"])
            assert engine.prefetch([key(0), key(5)]).result() == [True, False]
        with KVEngine(tiers=[CPU, disk(path, codec=codec, promote=False)]) as engine:
            engine.retrieve(keys(2))
            assert engine.lookup(keys(2)).tiers == ["disk", "disk"]


def test_asynchronous_twins(two):
    async def work():
        await two.aio.store(keys(2), [chunk(0), chunk(1)], wait=True)
        assert (await two.aio.lookup(keys(2))).prefix == 2
        assert await two.aio.prefetch(keys(2)) == [True, True]
        first, second = await asyncio.gather(two.aio.retrieve([key(0)]), two.aio.retrieve([key(1)]))
        assert equal(first[0], chunk(0))
        assert equal(second[0], chunk(1))
        assert await two.aio.pin([key(0), key(7)]) == [True, False]
        with pytest.raises(AttributeError, match="no operation"):
            two.aio.levels

    asyncio.run(work())


def test_a_third_partys_tier_by_dotted_path():
    with KVEngine(tiers=["third_party_tier.DictTier"]) as engine:
        engine.store(keys(2), [chunk(0), chunk(1)], wait=True)
        assert all(map(equal, engine.retrieve(keys(2)), [chunk(0), chunk(1)]))
        assert engine.levels[0].name == "DictTier"


@pytest.mark.parametrize("first", [CPU, None])
def test_storing_layer_by_layer(tmp_path, first):
    item = chunk(0)
    with KVEngine(tiers=[*([first] if first else []), disk(tmp_path)]) as engine:
        dtypes = [(torch.float32, torch.float32)] * 3
        writer = engine.store_layers(key(0), item.tokens, item.shapes, dtypes, item.exact_after)
        assert writer.taken
        for i in (2, 0):
            writer.put(i, *item.layers[i])
        with pytest.raises(ConfigError, match="layer 1 is"):
            writer.put(1, item.layers[1][0][:, :-1], item.layers[1][1])
        engine.flush()
        assert engine.lookup([key(0)]).prefix == 0, "a chunk is there whole or not at all"
        writer.put(1, *item.layers[1])
        assert equal(engine.retrieve([key(0)])[0], item)
        engine.flush()
        assert engine.usage()["disk"].chunks == 1
        assert equal(engine.retrieve([key(0)])[0], item)


# Down and up


def test_write_back_writes_when_the_tier_above_evicts(tmp_path):
    with KVEngine(tiers=[cpu(8), disk(tmp_path, write="back")]) as engine:
        engine.store(keys(4), [chunk(i) for i in range(4)], wait=True)
        assert engine.usage()["disk"].chunks == 0
        for i in range(4, 30):
            engine.store([key(i)], [chunk(i)])
            engine.flush()
        assert engine.usage()["cpu"].nbytes <= engine.usage()["cpu"].capacity_bytes
        assert engine.lookup(keys(30)).prefix == 30, "nothing is lost on the way down"
        assert all(map(equal, engine.retrieve(keys(30)), [chunk(i) for i in range(30)]))
    with KVEngine(tiers=[cpu(8), disk(tmp_path)]) as engine:
        assert engine.usage()["disk"].chunks == 30, "close writes what was not written yet"


def test_write_back_under_a_burst(tmp_path):
    """More than the first tier holds, faster than the second takes it: nothing is lost, and nobody waits."""
    with KVEngine(tiers=[cpu(4), disk(tmp_path, write="back")]) as engine:
        assert all(engine.store(keys(60), [chunk(i) for i in range(60)]))
        engine.flush()
        assert all(map(equal, engine.retrieve(keys(60)), [chunk(i) for i in range(60)]))


def test_what_waits_is_bounded(tmp_path):
    config = EngineConfig(tiers=("third_party_tier.SlowTier",), max_pending_bytes=3 * chunk(0).nbytes)
    before = value("lmcache_blend_errors_total", tier="SlowTier", error="QueueFull")
    with KVEngine(config) as engine:
        taken = [engine.store([key(i)], [chunk(i)])[0] for i in range(12)]
        assert sum(taken) <= 6
        assert value("lmcache_blend_errors_total", tier="SlowTier", error="QueueFull") - before == 12 - sum(taken)
        engine.flush()
        assert [item is not None for item in engine.retrieve(keys(12))] == taken


def test_store_does_not_wait_for_slow_tiers():
    with KVEngine(tiers=[CPU, "third_party_tier.SlowTier"]) as engine:
        began = time.perf_counter()
        engine.store(keys(20), [chunk(i) for i in range(20)])
        assert time.perf_counter() - began < 0.2, "20 writes of 50 ms each"
        engine.flush()
        assert engine.usage()["SlowTier"].chunks == 20


# Room


def test_a_full_tier_evicts_the_least_recently_used():
    with KVEngine(tiers=[cpu(4)]) as engine:
        for i in range(4):
            engine.store([key(i)], [chunk(i)])
        engine.retrieve([key(0)])
        engine.store([key(4)], [chunk(4)])
        assert engine.lookup(keys(5)).tiers == ["cpu", None, "cpu", "cpu", "cpu"]


def test_a_restart_knows_what_was_used_last(tmp_path):
    with KVEngine(tiers=[disk(tmp_path)]) as engine:
        for i in range(4):
            engine.store([key(i)], [chunk(i)], wait=True)
            time.sleep(0.02)
        engine.retrieve([key(0)])
        size = engine.usage()["disk"].nbytes // 4
    limit = {"capacity_bytes": 4 * size}
    with KVEngine(tiers=[disk(tmp_path, **limit)]) as engine:
        engine.store([key(4)], [chunk(4)], wait=True)
        assert engine.lookup(keys(5)).tiers == ["disk", None, "disk", "disk", "disk"]
        assert engine.usage()["disk"].nbytes <= 4 * size


def test_pinned_chunks_survive_and_pins_end():
    with KVEngine(tiers=[cpu(4)]) as engine:
        engine.store([key(0)], [chunk(0)])
        assert engine.pin([key(0), key(50)]) == [True, False]
        assert engine.pin([key(0)], seconds=0.01) == [True], "the longer pin holds"
        for i in range(1, 30):
            engine.store([key(i)], [chunk(i)])
        assert engine.lookup([key(0)]).prefix == 1
        assert engine.clear() == 3
        assert engine.lookup([key(0)]).prefix == 1
        assert engine.unpin([key(0)]) == [True]
        assert engine.unpin([key(0)]) == [False]
        engine.pin([key(0)], seconds=0.05)
        time.sleep(0.1)
        for i in range(1, 30):
            engine.store([key(i)], [chunk(i)])
        assert engine.lookup([key(0)]).prefix == 0


def test_where_all_is_pinned_nothing_more_is_taken():
    with KVEngine(tiers=[cpu(3)]) as engine:
        engine.store(keys(3), [chunk(i) for i in range(3)])
        assert engine.pin(keys(3)) == [True] * 3
        engine.store([key(3)], [chunk(3)], wait=True)
        assert engine.lookup(keys(4)).prefix == 3


def test_pins_on_a_shared_disk_hold_against_other_engines(tmp_path):
    with KVEngine(tiers=[disk(tmp_path)]) as a, KVEngine(tiers=[disk(tmp_path, capacity_bytes=40_000)]) as b:
        a.store([key(0)], [chunk(0)], wait=True)
        a.pin([key(0)])
        for i in range(1, 12):
            b.store([key(i)], [chunk(i)], wait=True)
        assert b.clear() > 0
        assert a.lookup([key(0)]).prefix == 1
        assert [item.pinned for item in b.list()] == [True]


def test_a_tenants_quota_leaves_the_others_alone():
    limit = 3 * SIZE
    with KVEngine(tiers=[cpu(40, quotas={"small": limit})]) as engine:
        for i in range(10):
            engine.store([key(i, "small"), key(i, "big")], [chunk(i), chunk(i)])
        small = [i for i in range(10) if engine.lookup([key(i, "small")]).prefix]
        assert small == [7, 8, 9]
        assert engine.lookup(keys(10, "big")).prefix == 10


def test_clearing_one_tenant(two):
    two.store([*keys(3, "a"), *keys(3, "b")], [chunk(i) for i in range(6)], wait=True)
    assert two.clear(salt="a") == 6, "three chunks in two tiers"
    assert two.lookup(keys(3, "a")).prefix == 0
    assert two.lookup(keys(3, "b")).prefix == 3


# Administration


def test_move_compress_decompress_verify(tmp_path):
    with KVEngine(tiers=[CPU, disk(tmp_path, write="back")]) as engine:
        engine.store(keys(3), [chunk(i) for i in range(3)])
        assert engine.move([key(0), key(9)], "cpu", "disk") == [True, False]
        assert engine.lookup(keys(3)).tiers == ["disk", "cpu", "cpu"]
        assert engine.move([key(1)], "cpu", "disk", keep=True) == [True]
        before = engine.usage()["disk"].nbytes
        assert engine.compress([key(0)], "disk", "int8") == [True]
        assert engine.usage()["disk"].nbytes < before
        coder = get_codec("int8")
        wanted = coder.decode(coder.encode(chunk(0)))
        assert equal(engine.retrieve([key(0)])[0], wanted)
        assert engine.decompress([key(0)], "disk") == [True]
        assert equal(engine.retrieve([key(0)])[0], wanted)
        assert engine.usage()["disk"].nbytes == before
        assert engine.verify()["disk"] == (2, 0, 0, 0)
        with pytest.raises(UnknownNameError):
            engine.compress([key(0)], "disk", "int9")
        with pytest.raises(ConfigError, match="no tier 'tape'"):
            engine.move([key(0)], "cpu", "tape")


def test_events_say_what_happened(two):
    two.store([key(0)], [chunk(0)], wait=True)
    two.pin([key(0)])
    two.unpin([key(0)])
    two.clear("cpu")
    actions = [(e.action, e.tier) for e in two.events.after(0, timeout=0)]
    assert actions == [
        ("stored", "cpu"),
        ("stored", "disk"),
        ("pinned", ""),
        ("unpinned", ""),
        ("removed", "cpu"),
        ("cleared", "cpu"),
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tiers": []}, "at least one"),
        ({"tiers": ["cpu", "cpu"]}, "name of its own"),
        ({"tiers": [{"tier": "cpu", "evicton": "lru"}]}, "refuses"),
        ({"tiers": [{"tier": "cpu", "eviction": "lruu"}]}, "did you mean 'lru'"),
        ({"tiers": [{"path": "x"}]}, 'no "tier"'),
        ({"tiers": ["cpu"], "thread": 1}, "did you mean 'threads'"),
        ({"tiers": ["no.such.module:Tier"]}, "cannot be imported"),
        ({"tiers": ["collections.OrderedDict"]}, "is no tier"),
    ],
)
def test_bad_settings_are_one_clear_error(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        KVEngine(**settings)
    assert "\n" not in str(caught.value)


def test_settings_read_flat_dicts():
    config = TierConfig.read({"tier": "disk", "path": "/kv", "codec": "int8", "fsync": "data"})
    assert (config.label, config.codec, config.options) == ("disk", "int8", {"path": "/kv", "fsync": "data"})
    assert TierConfig.read("redis://h:1/0").label == "redis"


def test_a_dropped_engine_frees_its_memory_at_once():
    """Not only when the garbage collector comes by: a benchmark makes one store after the other."""
    import gc
    import weakref

    gc.disable()
    try:
        store = MemoryStore()
        store.put(key(0), chunk(0))
        assert equal(store.get(key(0)).chunk, chunk(0))
        gone = weakref.ref(store.top)
        del store
        assert gone() is None
    finally:
        gc.enable()
