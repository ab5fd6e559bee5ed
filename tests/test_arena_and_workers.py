"""The memory under the cpu tier, and the threads under every tier."""

import subprocess
import sys
import threading
from contextlib import suppress
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_blend.engine.arena import PAGE, Arena
from lmcache_blend.engine.copying import SHARED, STREAMED, copy_all
from lmcache_blend.engine.workers import Workers
from lmcache_blend.errors import ConfigError


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5 * PAGE)), max_size=60))
def test_slots_never_overlap_and_all_memory_comes_back(steps):
    arena, held = Arena(16 * PAGE), []
    for give, n in steps:
        if give and held:
            held.pop(n % len(held))
            continue
        slot = arena.take(n)
        if slot is None:
            assert arena.free_bytes() < 16 * PAGE
            continue
        assert slot.ctypes.data % PAGE == 0
        slot[:] = len(held) % 251
        held.append(slot)
        starts = sorted((s.ctypes.data, s.nbytes) for s in held)
        assert all(a + n <= b for (a, n), (b, _) in pairwise(starts))
    slot = None
    held.clear()
    assert arena.free_bytes() == 16 * PAGE
    assert arena.take(16 * PAGE) is not None, "free blocks are joined again"


def test_a_slot_lives_as_long_as_any_view_of_it():
    arena = Arena(4 * PAGE)
    slot = arena.take(3 * PAGE)
    tensor = torch.frombuffer(slot.data[PAGE : 2 * PAGE], dtype=torch.float32).view(-1, 8)[3]
    del slot
    assert arena.take(3 * PAGE) is None
    assert tensor.shape == (8,)
    del tensor
    assert arena.take(3 * PAGE) is not None


def test_threads_share_an_arena():
    arena, wrong = Arena(64 * PAGE), []

    def work(n):
        rng = np.random.default_rng(n)
        for _ in range(300):
            slot = arena.take(int(rng.integers(1, 4 * PAGE)))
            if slot is not None:
                slot[:] = n
                if not (slot == n).all():
                    wrong.append(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
    assert arena.free_bytes() == 64 * PAGE


def test_huge_pages_and_numa_on_request():
    """Either the system gives what was asked for, or one error says what to do."""
    assert Arena(1, huge_pages="transparent").nbytes == 2 << 20
    for asked in ({"huge_pages": "reserved"}, {"numa_node": 0}):
        with suppress(ConfigError):  # a machine without reserved pages, or without NUMA
            slot = Arena(1 << 20, **asked).take(PAGE)
            slot[:] = 1
    with pytest.raises(ConfigError, match="numa_node = 63"):
        Arena(1 << 20, numa_node=63)
    with pytest.raises(ConfigError, match="bytes of memory"):
        Arena(1 << 60)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="needs CUDA"):
            Arena(1 << 20, pin=True)


def test_the_lowest_number_goes_first_and_errors_reach_the_caller():
    workers, seen, gate = Workers(1, "t"), [], threading.Event()
    workers.submit(gate.wait)
    futures = [workers.submit(seen.append, n, priority=n) for n in (3, 1, 2, 1)]
    bad = workers.submit(int, "x", priority=9)
    gate.set()
    with pytest.raises(ValueError, match="invalid literal"):
        bad.result(10)
    assert all(f.done() for f in futures)
    assert seen == [1, 1, 2, 3]
    workers.close()
    with pytest.raises(RuntimeError, match="closed"):
        workers.submit(int)


def test_a_call_that_hangs_for_ever_does_not_keep_the_process():
    code = (
        "import threading; from lmcache_blend.engine.workers import Workers\n"
        "Workers(2, 't').submit(threading.Event().wait); print('done')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


@pytest.mark.parametrize("size", [1, 100, STREAMED - 1, STREAMED, STREAMED + 1, SHARED + 300_007])
@pytest.mark.parametrize("shift", [0, 1, 31, 32, 64])
def test_copies_past_the_caches_are_exact(size, shift):
    rng = np.random.default_rng(size + shift)
    source, target = rng.integers(0, 256, size + 200, np.uint8), np.zeros(size + 200, np.uint8)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        copy_all([(target.ctypes.data + shift, source.ctypes.data + 7, size)])
    finally:
        torch.set_num_threads(threads)
    assert np.array_equal(target[shift : shift + size], source[7 : 7 + size])
    assert not target[:shift].any()
    assert not target[shift + size :].any()
