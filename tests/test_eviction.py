"""Eviction policies: exact orders on small cases, promises that all of them keep, and what each is good at."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_blend.engine.eviction import policies

ALL = ["lru", "lfu", "fifo", "s3fifo", "arc", "cost"]


def test_all_are_registered():
    assert sorted(ALL) == policies.names()


def leave(policy, skip=lambda key: False):
    """The next victim, gone."""
    key = policy.victim(skip)
    if key is not None:
        policy.remove(key)
    return key


def order(name, uses=b"", sizes=None, costs=None, keys=b"abcd", capacity=4):
    """The order in which chunks leave that came as a, b, c, d and were then used."""
    policy = policies.get(name)(capacity)
    for k in keys:
        key = bytes([k])
        policy.add(key, (sizes or {}).get(key, 1), (costs or {}).get(key, 1.0))
    for k in uses:
        policy.touch(bytes([k]))
    return b"".join(iter(lambda: leave(policy) or b"", b""))


def test_orders():
    assert order("fifo", b"aab") == b"abcd"
    assert order("lru", b"ab") == b"cdab"
    assert order("lfu", b"aabc") == b"dbca"
    assert order("cost", costs={b"a": 9.0, b"b": 5.0, b"c": 7.0}) == b"dbca"
    assert order("cost", sizes={b"a": 9, b"b": 5, b"c": 7}) == b"acbd"
    assert order("cost", b"aaa", sizes={b"a": 2}) == b"bcda", "used often outweighs its bytes"
    assert order("arc", b"a") == b"bcda"
    assert order("s3fifo", b"aab") == b"bcda", "used twice moves to the main queue"


def test_old_merit_fades():
    """GreedyDual: the clock rises with what is evicted, so that a chunk once used often does not stay for ever."""
    policy = policies.get("cost")(4)
    policy.add(b"old", 1, 1.0)
    for _ in range(5):
        policy.touch(b"old")
    for i in range(100):
        policy.add(bytes([i]), 1, 1.0)
        policy.touch(bytes([i]))
        if leave(policy) == b"old":
            return
        policy.add(bytes([i]), 1, 1.0)
    raise AssertionError("the old chunk was never evicted")


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("atrv"), st.integers(0, 12)), max_size=120), st.integers(0, 12))
def test_a_victim_is_there_and_not_skipped(name, steps, pinned):
    policy, there = policies.get(name)(20), {}
    held = bytes([pinned])
    for what, i in steps:
        key = bytes([i])
        if what == "a":
            policy.add(key, 1 + i % 3, 1.0 + i)
            there[key] = 1
        elif what == "t":
            policy.touch(key)
        elif what == "r":
            policy.remove(key)
            there.pop(key, None)
        else:
            victim = policy.victim(lambda k: k == held)
            assert (victim in there and victim != held) if set(there) - {held} else victim is None
            if victim is not None:
                policy.remove(victim)
                del there[victim]
    gone = set(iter(lambda: leave(policy), None))
    assert gone == set(there), "what came in leaves, exactly once"


def hit_rate(name, trace, capacity):
    policy, there, hits = policies.get(name)(capacity), set(), 0
    for i in trace:
        key = i.to_bytes(4, "little")
        if key in there:
            hits += 1
            policy.touch(key)
            continue
        while len(there) >= capacity:
            victim = policy.victim(lambda k: False)
            policy.remove(victim)
            there.discard(victim)
        policy.add(key, 1, 1.0)
        there.add(key)
    return hits / len(trace)


def test_scans_do_not_drive_out_the_working_set():
    """50 chunks used again and again between one-time documents, with room for 100: LRU loses what the others keep."""
    rng, trace, once = random.Random(0), [], 10_000
    for _ in range(60):
        trace += [rng.randrange(50) for _ in range(100)]
        trace += range(once, once + 120)
        once += 120
    rates = {name: hit_rate(name, trace, 100) for name in ALL}
    assert rates["lru"] > rates["fifo"] * 0.9
    for name in ("s3fifo", "arc", "lfu"):
        assert rates[name] > rates["lru"] + 0.1, rates


def test_many_pinned_chunks_do_not_stop_eviction():
    for name in ALL:
        policy = policies.get(name)(1000)
        for i in range(1000):
            policy.add(i.to_bytes(4, "little"), 1, 1.0)
            policy.touch(i.to_bytes(4, "little"))
        assert policy.victim(lambda k: int.from_bytes(k, "little") != 777) == (777).to_bytes(4, "little"), name
