"""A tier as a third party writes it: nothing of the engine's is imported but the protocol's words."""

import threading
import time

from lmcache_blend.engine.tiers.base import ABSENT, Entry, Miss, Usage, check_keys


class DictTier:
    """Values in a dict."""

    threads, capacity_bytes = 1, None

    def __init__(self):
        self.data = {}

    def put(self, keys, values):
        check_keys(keys)
        for key, value in zip(keys, values, strict=True):
            self.data[key] = b"".join(value)
        return [len(self.data[key]) for key in keys]

    def get(self, keys, buffers, offsets=None):
        check_keys(keys)
        out = []
        for key, buffer, at in zip(keys, buffers, offsets or [0] * len(keys), strict=True):
            found = self.data.get(key)
            if found is None:
                out.append(ABSENT)
            elif at + len(buffer) > len(found):
                out.append(Miss("corrupt", "too short"))
            else:
                buffer[:] = found[at : at + len(buffer)]
                out.append(len(buffer))
        return out

    def lookup(self, keys):
        check_keys(keys)
        return [len(self.data[key]) if key in self.data else ABSENT for key in keys]

    def delete(self, keys):
        check_keys(keys)
        return [ABSENT if (old := self.data.pop(key, None)) is None else len(old) for key in keys]

    def entries(self):
        return iter([Entry(key, len(value)) for key, value in self.data.copy().items()])

    def usage(self):
        return Usage(sum(map(len, self.data.values())), len(self.data), None)

    def close(self):
        pass


class SlowTier(DictTier):
    """Takes 50 ms to write."""

    def put(self, keys, values):
        time.sleep(0.05 * len(keys))
        return super().put(keys, values)


class Unruly(DictTier):
    """Does what `mode` says: an exception to raise, or an event to wait for."""

    threads = 2

    def __init__(self):
        super().__init__()
        self.mode, self.calls = None, 0

    def _act(self):
        self.calls += 1
        if isinstance(self.mode, threading.Event):
            self.mode.wait(30)
        elif self.mode is not None:
            raise self.mode

    def get(self, keys, buffers, offsets=None):
        self._act()
        return super().get(keys, buffers, offsets)

    def put(self, keys, values):
        self._act()
        return super().put(keys, values)

    def lookup(self, keys):
        self._act()
        return super().lookup(keys)
