"""GPUs that kernels are compiled for, and the limits of boards with them."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """shared_bytes: largest shared memory of a block. tensor_core: machine instructions that use tensor cores.

    board, bandwidth (bytes/s) and flops (dense bf16 per second) are of the named board (vendors' data sheets).
    """

    name: str
    backend: str
    arch: int | str
    warp: int
    shared_bytes: int
    tensor_core: str
    board: str
    bandwidth: float
    flops: float

    def gpu(self) -> Any:
        """Triton's name for it."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.backend, self.arch, self.warp)

    def floor_us(self, moved: int, flops: int = 0) -> float:
        """Microseconds below which no kernel can move so many bytes and do so many operations on the board."""
        return 1e6 * max(moved / self.bandwidth, flops / self.flops)


TARGETS = {
    t.name: t
    for t in (
        Target("sm80", "cuda", 80, 32, 163 << 10, r"HMMA|IMMA", "A100 80GB SXM", 2.039e12, 312e12),
        Target("sm90", "cuda", 90, 32, 227 << 10, r"HMMA|IMMA|[HIQ]GMMA", "H100 SXM", 3.35e12, 989e12),
        Target("sm100", "cuda", 100, 32, 227 << 10, r"HMMA|IMMA|UTC\w*MMA", "B200", 8.0e12, 2250e12),
        Target("gfx942", "hip", "gfx942", 64, 64 << 10, r"v_mfma", "MI300X", 5.3e12, 1307e12),
    )
}
