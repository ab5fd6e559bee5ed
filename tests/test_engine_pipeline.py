"""Layer by layer: first needed, first read; waiting is measured, and what fails half way is recomputed."""

import gc
import threading
import time

import pytest
import torch
from kv import chunk, equal, key, keys
from test_blender import PARTS, QUESTION, close, full
from third_party_tier import DictTier

from lmcache_blend import BlendConfig, Blender, KVEngine, Prompt
from lmcache_blend.engine import values
from lmcache_blend.engine.pipeline import LayerReads
from lmcache_blend.engine.tiers.base import Miss
from lmcache_blend.errors import ChunkLostError, CorruptChunkError
from lmcache_blend.types import KVChunk


class Watched(DictTier):
    """Notes what is read, waits before every read of `hold` bytes or more, and fails where `fail` says so."""

    def __init__(self):
        super().__init__()
        self.reads, self.delay, self.fail, self.gate = [], 0.0, None, None

    def get(self, keys, buffers, offsets=None):
        offsets = offsets or [0] * len(keys)
        if self.gate is not None and offsets[0]:
            self.gate.wait(10)
        time.sleep(self.delay)
        self.reads.append((list(keys), list(offsets)))
        out = super().get(keys, buffers, offsets)
        return [self.fail(k, at) or o for k, at, o in zip(keys, offsets, out, strict=True)] if self.fail else out


@pytest.fixture
def watched(monkeypatch):
    """Small values are read layer by layer too."""
    monkeypatch.setattr("lmcache_blend.engine.pipeline.WHOLE", 0)
    monkeypatch.setattr(values, "HEAD_GUESS", 700)


def open_engine(**settings):
    return KVEngine(tiers=[{"tier": "test_engine_pipeline.Watched", "faults": {"retries": 0}, **settings}], threads=1)


@pytest.mark.parametrize("codec", [None, "lossless", "raw", "cachegen"])
def test_layers_come_in_order_over_all_chunks(watched, codec):
    with open_engine(codec=codec) as engine:
        engine.store(keys(3), [chunk(i, layers=4) for i in range(3)], wait=True)
        tier = engine.top.tier
        tier.reads.clear()
        stored = engine.load(keys(3))
        coder = engine.top.codec
        for i, item in enumerate(stored):
            wanted = chunk(i, layers=4) if coder is None else coder.decode(coder.encode(chunk(i, layers=4)))
            assert item.chunk.shapes == wanted.shapes
            assert equal(KVChunk(item.chunk.tokens, tuple(item.chunk.layers), item.chunk.exact_after), wanted)
        layered = [k for k, offsets in tier.reads if len(k) == 3 and offsets[0]]
        assert len(layered) >= (1 if codec == "raw" else 4), "one read per layer, for all three chunks at once"


def test_a_layer_is_there_before_the_later_ones(watched):
    with open_engine() as engine:
        engine.store([key(0)], [chunk(0, layers=6)], wait=True)
        tier, gates = engine.top.tier, []
        release = threading.Semaphore(0)

        class Gate:
            def wait(self, seconds):
                gates.append(1)
                release.acquire(timeout=seconds)

        tier.gate = Gate()
        (item,) = engine.load([key(0)])
        release.release()
        assert torch.equal(item.chunk.layers[0][0], chunk(0, layers=6).layers[0][0])
        assert item.chunk.layers.layers[2] is None
        for _ in range(6):
            release.release()
        assert torch.equal(item.chunk.layers[5][1], chunk(0, layers=6).layers[5][1])


def test_waiting_is_measured(watched):
    with open_engine() as engine:
        engine.store([key(0)], [chunk(0, layers=8)], wait=True)
        engine.top.tier.delay = 0.02
        (item,) = engine.load([key(0)])
        list(item.chunk.layers)
        assert item.reads.waited > 0.3 * item.reads.seconds > 0.04, "nobody computed meanwhile: all is waiting"
        (item,) = engine.load([key(0)])
        time.sleep(0.4)
        list(item.chunk.layers)
        assert item.reads.waited < 0.02 < item.reads.seconds, "all was hidden"


def test_a_layer_that_does_not_come_is_an_error_that_names_the_chunk(watched):
    with open_engine() as engine:
        engine.store([key(0)], [chunk(0)], wait=True)
        engine.top.tier.fail = lambda k, at: Miss("absent") if at > 2000 else None
        (item,) = engine.load([key(0)])
        with pytest.raises(ChunkLostError, match="layer") as caught:
            list(item.chunk.layers)
        assert caught.value.key == key(0)


CONFIG = BlendConfig(policy="epic", recompute_ratio=0.2, store_misses=False)


@pytest.mark.parametrize("codec", [None, "lossless"])
def test_blending_over_an_engine_gives_the_same_as_over_memory(tiny, tmp_path, watched, codec):
    prompt = Prompt.join(PARTS, QUESTION)
    plain = Blender(tiny, CONFIG)
    plain.store(prompt)
    want = plain.prefill(prompt).logits
    tiers = [{"tier": "disk", "path": str(tmp_path), "codec": codec}]
    with KVEngine(tiers=tiers) as engine:
        blender = Blender(tiny, CONFIG, engine)
        blender.store(prompt)
        engine.flush()
        out = blender.prefill(prompt)
        assert torch.equal(out.logits, want)
        assert {kind for *_, kind in out.trace.hits} == {"exact", "reused"}
        assert out.trace.loading_ms > 0
        assert 0 <= out.trace.overlap <= 1
        assert out.trace.loaded_bytes > 0
    with KVEngine(tiers=[{"tier": "cpu", "capacity_bytes": 64 << 20}, *tiers]) as engine:
        for _ in range(3):
            out = Blender(tiny, CONFIG, engine).prefill(prompt)
            assert torch.equal(out.logits, want)
            time.sleep(0.1)
        assert out.trace.loading_ms == 0, "promoted: nothing comes layer by layer any more"
        assert out.trace.overlap is None


@pytest.mark.parametrize("policy", ["epic", "full_reuse", "cacheblend", "attention_value_norm"])
def test_chunks_lost_in_the_middle_of_a_forward_are_recomputed(tiny, watched, policy):
    prompt = Prompt.join(PARTS, QUESTION)
    with open_engine() as engine:
        blender = Blender(tiny, BlendConfig(policy=policy, store_misses=False), engine)
        blender.store(prompt)
        engine.flush()
        bad = [blender._key(prompt, i) for i in (1, 2)]
        engine.top.tier.fail = lambda k, at: Miss("absent") if k in bad and at > 3000 else None
        out = blender.prefill(prompt)
        assert [kind for *_, kind in out.trace.hits] == ["exact", "miss", "miss", "reused"]
        engine.top.tier.fail = lambda k, at: Miss("absent") if at > 3000 else None
        engine.flush()
        out = blender.prefill(prompt)
        assert {kind for *_, kind in out.trace.hits} == {"miss"}
        assert close(out.logits, full(tiny, prompt))


@pytest.mark.parametrize("corrupt", [False, True])
def test_nobody_waits_for_what_an_unforeseen_error_has_stopped(watched, monkeypatch, corrupt):
    with open_engine() as engine:
        engine.store(keys(1), [chunk(0)], wait=True)
        error = CorruptChunkError("whose it is nobody knows") if corrupt else ZeroDivisionError()

        def fail(*_):
            raise error

        monkeypatch.setattr(LayerReads, "_decode", fail)
        (stored,) = engine.load(keys(1))
        with pytest.raises(ChunkLostError, match=type(error).__name__):
            tuple(stored.chunk.layers)
        assert engine.lookup(keys(1)).prefix == 1, "nothing is deleted for it"


@pytest.mark.parametrize("codec", [None, "lossless", "fisher_klt"])
def test_memory_is_free_again_when_the_layers_are_gone(watched, codec, tmp_path):
    gc.disable()  # without a search for cycles
    try:
        with open_engine(codec=codec, tier="disk", path=str(tmp_path)) as engine:
            engine.store(keys(3), [chunk(i) for i in range(3)], wait=True)
            whole = engine._landing.free_bytes()
            stored = engine.load(keys(3))
            wanted = tuple(stored[0].chunk.layers)
            assert engine._landing.free_bytes() < whole
            del stored, wanted
            for _ in range(100):
                if engine._landing.free_bytes() == whole:
                    break
                time.sleep(0.02)  # the worker lets go of its last layer
            assert engine._landing.free_bytes() == whole
    finally:
        gc.enable()


@pytest.mark.parametrize("fails", [False, True])
def test_readers_are_told_to_do_more_with_each_layer_that_they_bring(watched, fails):
    with open_engine() as engine:
        engine.store(keys(2), [chunk(i, layers=5) for i in range(2)], wait=True)
        engine.top.tier.gate = threading.Event()
        stored = engine.load(keys(2))
        seen = []

        def more(layer):
            assert all(item.chunk.layers.has(layer) for item in stored)
            seen.append((layer, threading.current_thread() is threading.main_thread()))
            if fails and layer == 2:
                raise ZeroDivisionError

        stored[0].reads.then(more)
        assert not any(item.chunk.layers.has(4) for item in stored)
        engine.top.tier.gate.set()
        if fails:
            with pytest.raises(ChunkLostError, match="ZeroDivisionError"):
                tuple(stored[1].chunk.layers)
            return
        for item in stored:
            tuple(item.chunk.layers)
        for _ in range(100):
            if len(seen) == 5:
                break
            time.sleep(0.02)  # the last layer is there before its call returns
        assert seen == [(layer, False) for layer in range(5)]
        stored[0].reads.then(more)
        assert stored[0].reads._then is None, "nothing is kept alive for what will not come"
