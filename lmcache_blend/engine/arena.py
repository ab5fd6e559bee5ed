"""One large block of memory, cut into slots that free themselves when the last view of them is gone."""

import bisect
import ctypes
import mmap
import os
import threading
import weakref
from collections import deque
from typing import Any, Literal

import numpy as np
import torch

from lmcache_blend.errors import ConfigError

PAGE = 4096
HUGE_PAGE = 2 << 20
MAP_HUGETLB = 0x40000
MPOL_BIND = 2
SYS_MBIND = {"x86_64": 237, "aarch64": 235}

HugePages = Literal["off", "transparent", "reserved"]


class Slot(np.ndarray):
    """[n] uint8, page aligned. Views of it (memoryview, tensor) keep it; once all are gone its memory is free again."""


class Arena:
    """nbytes of memory. huge_pages: "transparent" asks for them (madvise), "reserved" takes them (vm.nr_hugepages).

    numa_node: bind the memory to that node. pin: lock and register it with CUDA for fast copies; by default where
    CUDA is there. Raises ConfigError where the system refuses what was asked for.
    """

    def __init__(
        self, nbytes: int, huge_pages: HugePages = "off", numa_node: int | None = None, pin: bool | None = None
    ):
        step = PAGE if huge_pages == "off" else HUGE_PAGE
        self.nbytes = -(-nbytes // step) * step
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (MAP_HUGETLB if huge_pages == "reserved" else 0)
        try:
            memory = mmap.mmap(-1, self.nbytes, flags=flags)
            if huge_pages == "transparent":
                memory.madvise(mmap.MADV_HUGEPAGE)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{self.nbytes} bytes of memory with huge_pages {huge_pages!r} are refused ({error}); take a smaller "
                "capacity_bytes, or reserve pages with sysctl vm.nr_hugepages"
            ) from None
        self._all = np.frombuffer(memory, np.uint8)
        if numa_node is not None:
            _bind(self._all, numa_node)
        self.pinned = torch.cuda.is_available() if pin is None else pin
        if self.pinned:
            _register(self._all)
        self._starts, self._sizes = [0], [self.nbytes]  # of the free blocks, by address
        self._freed: deque[tuple[int, int]] = deque()
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> Slot | None:
        """A slot of n bytes with undefined content; None where no free block is that long."""
        size = max(PAGE, -(-nbytes // PAGE) * PAGE)
        with self._lock:
            self._collect()
            i = next((i for i, free in enumerate(self._sizes) if free >= size), None)
            if i is None:
                return None
            free = self._sizes[i]
            start = self._starts[i]
            if free == size:
                del self._starts[i], self._sizes[i]
            else:
                self._starts[i], self._sizes[i] = start + size, free - size
        slot = self._all[start : start + nbytes].view(Slot)
        # The callback may run inside any allocation of any thread, so it takes no lock: deque.append is atomic.
        weakref.finalize(slot, self._freed.append, (start, size))
        return slot

    def free_bytes(self) -> int:
        """Bytes in no slot."""
        with self._lock:
            self._collect()
            return sum(self._sizes)

    def _collect(self) -> None:
        while self._freed:
            start, size = self._freed.popleft()
            i = bisect.bisect(self._starts, start)
            if i < len(self._starts) and start + size == self._starts[i]:
                size += self._sizes[i]
                del self._starts[i], self._sizes[i]
            if i and self._starts[i - 1] + self._sizes[i - 1] == start:
                self._sizes[i - 1] += size
            else:
                self._starts.insert(i, start)
                self._sizes.insert(i, size)


def _bind(memory: np.ndarray, node: int) -> None:
    """mbind(2), so that libnuma is not needed."""
    number, mask = SYS_MBIND.get(os.uname().machine), ctypes.c_ulong(1 << node if 0 <= node < 64 else 0)
    if number is None or not mask.value:
        raise ConfigError(f"numa_node = {node}: no such node can be bound on {os.uname().machine}")
    libc = ctypes.CDLL(None, use_errno=True)
    args = ctypes.c_void_p(memory.ctypes.data), ctypes.c_ulong(memory.nbytes), MPOL_BIND, ctypes.byref(mask)
    if libc.syscall(number, *args, ctypes.c_ulong(65), 0):
        reason = os.strerror(ctypes.get_errno())
        raise ConfigError(f"numa_node = {node}: {reason}; /sys/devices/system/node lists the nodes")


def _register(memory: np.ndarray) -> None:
    if not torch.cuda.is_available():
        raise ConfigError("pin = True needs CUDA; leave it out to pin only where CUDA is there")
    cudart: Any = torch.cuda.cudart()
    code = int(cudart.cudaHostRegister(memory.ctypes.data, memory.nbytes, 0))
    if code:
        raise ConfigError(f"CUDA cannot pin {memory.nbytes} bytes (error {code}); take a smaller capacity_bytes")
    # The last slot may outlive the arena; its memory is unregistered when the block itself goes.
    weakref.finalize(memory.base, cudart.cudaHostUnregister, memory.ctypes.data)
