"""The limit of the Redis tier: a bare pipelined client, redis-py with hiredis, on the same server and sizes."""

import time
from collections.abc import Sequence
from typing import Any

DEPTHS = (1, 4, 16)


def bare_client(url: str, values: Sequence[Any], repeat: int = 3) -> dict[str, float]:
    """Bytes per second of "write" (SET) and "read" (GET) of the values, at the pipeline depth that is fastest."""
    import redis

    client = redis.Redis.from_url(url.replace("redis+unix:", "unix:"))
    names = [f"bare:{i}" for i in range(len(values))]
    total = sum(len(memoryview(v).cast("B")) for v in values)
    best = {"write": 0.0, "read": 0.0}
    try:
        for depth in DEPTHS * repeat:
            runs = range(0, len(names), depth)
            start = time.perf_counter()
            for at in runs:
                pipe = client.pipeline(transaction=False)
                for name, value in zip(names[at : at + depth], values[at : at + depth], strict=True):
                    pipe.set(name, value)
                pipe.execute()
            middle = time.perf_counter()
            for at in runs:
                pipe = client.pipeline(transaction=False)
                for name in names[at : at + depth]:
                    pipe.get(name)
                pipe.execute()
            best["write"] = max(best["write"], total / (middle - start))
            best["read"] = max(best["read"], total / (time.perf_counter() - middle))
    finally:
        client.delete(*names)
        client.close()
    return best
