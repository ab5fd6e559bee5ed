"""LMCache's in-process engine on the sizes of `engine bench`, run by an interpreter that has LMCache 0.5.6.

    python lmcache_engine_peer.py BYTES LAYERS HEADS DIM TIER...      TIER: cpu, disk

The last line of its output is a JSON list of rows. "GPU" memory is plain memory here: the connector copies each chunk's
[2, L, T, H * D] in one piece, the cheapest that a connector can do.
"""

import json
import os
import shutil
import statistics
import sys
import tempfile
import time

os.environ.setdefault("PYTHONHASHSEED", "0")
os.environ.setdefault("LMCACHE_TRACK_USAGE", "false")

import torch
from lmcache.v1.cache_engine import LMCacheEngineBuilder
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.gpu_connector.mock_gpu_connector import MockGPUConnector
from lmcache.v1.metadata import LMCacheMetadata

CHUNK, ROUNDS, LOOKUP_CHUNKS = 256, 3, 20_000


class Copy(MockGPUConnector):
    """Chunks in ordinary memory, `kv` by the chunk's number."""

    kv: list

    def get_shape(self, num_tokens=None):
        layers, two, _, heads, dim = self.kv_shape
        return torch.Size([two, layers, num_tokens, heads * dim])

    def from_gpu(self, memory_obj, start, end, **kwargs):
        memory_obj.tensor.copy_(self.kv[start // CHUNK])

    def to_gpu(self, memory_obj, start, end, **kwargs):
        self.kv[start // CHUNK].copy_(memory_obj.tensor)

    def batched_from_gpu(self, memory_objs, starts, ends, **kwargs):
        for item in zip(memory_objs, starts, ends, strict=True):
            self.from_gpu(*item)

    def batched_to_gpu(self, memory_objs=None, starts=None, ends=None, **kwargs):
        for item in zip(memory_objs, starts, ends, strict=True):
            self.to_gpu(*item)


def engine(tier: str, shape, nbytes: int, folder: str, chunk_tokens: int = CHUNK):
    layers, heads, dim = shape
    config = LMCacheEngineConfig.from_defaults(
        chunk_size=chunk_tokens,
        local_cpu=tier == "cpu",
        max_local_cpu_size=max(1.0, 1.3 * nbytes / 2**30),
        local_disk=None if tier == "cpu" else f"file://{folder}/",
        max_local_disk_size=0 if tier == "cpu" else (ROUNDS + 2) * nbytes / 2**30,
    )
    kv_shape = (layers, 2, chunk_tokens, heads, dim)
    metadata = LMCacheMetadata("bench", 1, 1, 0, 0, torch.bfloat16, kv_shape)
    connector = Copy(kv_shape)
    built = LMCacheEngineBuilder.get_or_create(tier, config, metadata, connector, lambda x, src: x, lambda x, src: x)
    built.post_init()
    return built, connector


def timed(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def settle(built, tokens) -> None:
    """Wait until the disk tier has written what was stored: store returns before."""
    end = time.time() + 120
    while time.time() < end and built.lookup(tokens) < len(tokens):
        time.sleep(0.001)


def measure(tier: str, shape, nbytes: int) -> list[dict]:
    layers, heads, dim = shape
    count = nbytes // (layers * 2 * heads * CHUNK * dim * 2)
    folder = tempfile.mkdtemp()
    built, connector = engine(tier, shape, nbytes, folder)
    connector.kv = [torch.ones(2, layers, CHUNK, heads * dim, dtype=torch.bfloat16) for _ in range(count)]
    total = sum(x.nbytes for x in connector.kv)

    def store(tokens) -> None:
        built.store(tokens)
        if tier == "disk":
            settle(built, tokens)

    def retrieve(tokens) -> None:
        found = int(built.retrieve(tokens).sum())
        assert found == len(tokens), f"{found} of {len(tokens)} tokens came back"

    seconds = {"store": [], "retrieve": []}
    for i in range(ROUNDS + 1):
        tokens = torch.arange(count * CHUNK) + i * 1_000_000  # clear() leaves the disk tier's index as it is
        for name, work in (("store", store), ("retrieve", retrieve)):
            spent = timed(lambda work=work, tokens=tokens: work(tokens))
            if i:
                seconds[name].append(spent)
        built.clear()
    LMCacheEngineBuilder.destroy(tier)
    shutil.rmtree(folder, ignore_errors=True)
    rows = []
    for name, spent in seconds.items():
        rate = total / statistics.median(spent)
        rows.append({"tier": tier, "operation": name, "chunks": count, "bytes": total, "bytes_per_s": rate})
    return rows


def lookup() -> dict:
    """All of 20,000 chunks of 256 tokens, from token ids, as small as they can be stored."""
    built, connector = engine("cpu", (1, 1, 8), 1 << 30, "")
    connector.kv = [torch.ones(2, 1, CHUNK, 8, dtype=torch.bfloat16)] * LOOKUP_CHUNKS
    tokens = torch.arange(LOOKUP_CHUNKS * CHUNK) % 50_000
    built.store(tokens)
    found = built.lookup(tokens)
    assert found == len(tokens), f"{found} of {len(tokens)} tokens are found"
    rate = LOOKUP_CHUNKS / statistics.median(timed(lambda: built.lookup(tokens)) for _ in range(ROUNDS))
    LMCacheEngineBuilder.destroy("cpu")
    return {"tier": "cpu", "operation": "lookup", "chunks": LOOKUP_CHUNKS, "chunks_per_s": rate}


if __name__ == "__main__":
    size, layers, heads, dim = map(int, sys.argv[1:5])
    out = [row for tier in sys.argv[5:] for row in measure(tier, (layers, heads, dim), size)]
    out.append(lookup())
    print(json.dumps(out), flush=True)
    os._exit(0)  # its threads do not end by themselves
