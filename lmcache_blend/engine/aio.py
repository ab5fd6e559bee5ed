"""Every operation of the engine for asyncio: the same call on a thread, so that no event loop waits for a tier."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

from lmcache_blend.engine.workers import Workers

OPERATIONS = (
    *("store", "flush", "lookup", "retrieve", "load", "prefetch", "pin", "unpin"),
    *("move", "compress", "decompress", "clear", "verify", "list", "usage", "close"),
)


class Async:
    """`await engine.aio.<operation>(...)`: arguments and result as those of engine.<operation>, of `list` a list."""

    def __init__(self, engine: Any, pool: Workers):
        self._engine, self._pool = engine, pool

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        if name not in OPERATIONS:
            raise AttributeError(f"{name!r} is no operation of the engine: {', '.join(OPERATIONS)}")
        return partial(self._call, name)

    async def _call(self, name: str, *arguments: Any, **settings: Any) -> Any:
        def call() -> Any:
            result = getattr(self._engine, name)(*arguments, **settings)
            return list(result) if isinstance(result, Iterator) else result  # else the loop would do the work

        result = await asyncio.wrap_future(self._pool.submit(call))
        return await asyncio.wrap_future(result) if isinstance(result, Future) else result
