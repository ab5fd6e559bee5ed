"""The lab itself: each of its repairs and alarms works, on small kernels with known faults."""

import pytest
import torch
import triton
import triton.language as tl
from kernel_lab import both_orders, traffic

from lmcache_blend.triton_kernels.launch import launch


@triton.jit
def copy(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n).to(tl.float32), mask=i < n)


@triton.jit
def add_previous(x, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) + 1
    tl.store(x + i, tl.load(x + i) + tl.load(x + i - 1))


@triton.jit
def add_bf16(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i) + tl.load(x + i))


@triton.jit
def to_bf16(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i).to(tl.bfloat16))


def test_bytes_outside_of_a_view_are_refused():
    whole = torch.zeros(64)
    launch(copy, (2,), whole[:32], torch.empty(32), 32, BLOCK=16)
    with pytest.raises(Exception, match="outside of every tensor"):
        launch(copy, (2,), whole[:32], torch.empty(31), 32, BLOCK=16)
    with pytest.raises(Exception, match="outside of every tensor"):
        launch(copy, (2,), whole[:31], torch.empty(64), 32, BLOCK=16)


def test_bfloat16_rounds_to_nearest_and_is_not_computed_with():
    x = torch.tensor([1.0, 1.00390625, 1.01171875, float("nan"), -3.3, 1e-40, 3e38, float("inf")])
    y = torch.empty(8, dtype=torch.bfloat16)
    launch(to_bf16, (1,), x, y, BLOCK=8)
    assert torch.equal(y.view(torch.int16)[:3], x.bfloat16().view(torch.int16)[:3])
    assert torch.equal(y[4:], x.bfloat16()[4:])
    assert y[3].isnan()
    with pytest.raises(Exception, match="arithmetic on bfloat16"):
        launch(add_bf16, (1,), y, y, BLOCK=8)


def test_a_race_between_programs_shows():
    def run():
        x = torch.ones(9)
        launch(add_previous, (8,), x, 9, BLOCK=1)
        return x

    with pytest.raises(AssertionError, match="order of programs"):
        both_orders(run)


def test_outputs_are_poisoned_and_traffic_is_counted():
    assert torch.empty(3).isnan().all()
    assert torch.empty(3, dtype=torch.int16).eq(0x5A5A).all()
    x, y = torch.ones(20, dtype=torch.bfloat16), torch.empty(20)
    with traffic() as moved:
        launch(copy, (2,), x, y, 20, BLOCK=16)
    assert moved == {("x", "load"): 40, ("y", "store"): 80}
