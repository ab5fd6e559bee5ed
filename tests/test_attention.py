"""Masks equal a brute-force mask, and attention of rows equals the naive reference, for any rows and chunk order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from lmcache_blend.blend import Blender
from lmcache_blend.config import BlendConfig
from lmcache_blend.hf import intercept
from lmcache_blend.hf.dense import DenseKV, KVPool
from lmcache_blend.triton_kernels.attention import row_attention, row_attention_mass, row_attention_reference
from lmcache_blend.types import Prompt

POOL = KVPool(((1, 2, 1, 2),), torch.float32, torch.device("cpu"))


@st.composite
def row_sets(draw):
    length = draw(st.integers(2, 60))
    batch = draw(st.integers(1, 3))
    count = draw(st.integers(1, length))
    rows = [
        sorted(draw(st.lists(st.integers(0, length - 1), min_size=count, max_size=count, unique=True)))
        for _ in range(batch)
    ]
    return length, torch.tensor(rows)


@given(row_sets(), st.integers(1, 20), st.data())
@settings(max_examples=150, deadline=None)
def test_masks_equal_brute_force(rows_of, window, data):
    length, rows = rows_of
    forward = intercept.Forward([DenseKV(POOL, length, 0) for _ in rows], rows, 1)
    hidden = torch.tensor(data.draw(st.lists(st.booleans(), min_size=length, max_size=length)))
    forward.hidden = hidden if data.draw(st.booleans()) else None
    for function, limit in ((causal_mask_function, length), (sliding_window_causal_mask_function(window), window)):
        mask = forward.mask(rows, function, torch.float32)
        for b in range(len(rows)):
            for i, p in enumerate(rows[b].tolist()):
                for key in range(length):
                    seen = key <= p and p - key < limit and not (forward.hidden is not None and hidden[key])
                    assert (mask[b, 0, i, key] == 0) == seen


@given(row_sets(), st.sampled_from([(4, 4), (4, 2), (6, 1)]), st.integers(2, 9))
@settings(max_examples=60, deadline=None)
def test_row_attention_equals_reference(rows_of, heads, block):
    length, rows = rows_of
    hq, h = heads
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(len(rows), hq, rows.shape[1], 8),
        torch.randn(len(rows), h, length, 8),
        torch.randn(len(rows), h, length, 6),
    )
    if rows.max() + 1 < length:  # keys that nobody may see must not leak in, whatever they hold
        k[:, :, rows.max() + 1 :], v[:, :, rows.max() + 1 :] = 1e4, 1e4
    mask = torch.zeros(len(rows), 1, rows.shape[1], length)
    mask.masked_fill_(torch.arange(length) > rows[:, None, :, None], torch.finfo(torch.float32).min)
    want = row_attention_reference(q, k, v, mask, 0.3)
    last = rows.max(0).values.tolist()
    got = row_attention(q, k, v, mask, last, 0.3, block)
    out, mass = row_attention_mass(q, k, v, mask, last, 0.3)
    for x in (got, out):
        assert (x - want).square().mean().sqrt() / want.square().mean().sqrt() < 1e-5
    every = torch.eye(length).expand(len(rows), h, length, length)  # as values: the output is the weights
    weights = row_attention_reference(q, k, every, mask, 0.3)
    assert torch.allclose(mass.double(), weights.mean(2), atol=1e-5)
    assert torch.all(mass[(mask < 0).all(2).expand_as(mass)] == 0), "nobody attends to what no row may see"


@given(
    order=st.permutations(range(4)),
    stored=st.sets(st.integers(0, 3)),
    ratio=st.floats(0.05, 0.95),
    policy=st.sampled_from(["random", "epic", "cacheblend", "query_attention"]),
)
@settings(max_examples=40, deadline=None)
def test_masks_of_a_blended_forward(tiny, order, stored, ratio, policy):
    """The masks that the model really gets, over chunk orders, partial hits and dropped rows."""
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randint(3, 200, (n,), generator=generator).tolist() for n in (9, 14, 5, 11)]
    question = torch.randint(3, 200, (6,), generator=generator).tolist()
    blender = Blender(tiny, BlendConfig(policy=policy, recompute_ratio=ratio, store_misses=False))
    for i in stored:
        blender.store(Prompt.join([parts[i]], question))
    prompt = Prompt.join([parts[i] for i in order], question)

    seen = []
    original = intercept.row_attention

    def spy(q, k, v, mask, last, scale, *rest):
        forward = intercept.CURRENT.get()
        seen.append(
            (forward.rows[0].tolist(), mask[0, 0] == 0, None if forward.hidden is None else forward.hidden.clone())
        )
        return original(q, k, v, mask, last, scale, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intercept, "row_attention", spy)
        blender.prefill(prompt)
    keys = torch.arange(len(prompt))
    for rows, visible, hidden in seen:
        want = keys <= torch.tensor(rows)[:, None]
        if hidden is not None:
            want &= ~hidden
        assert torch.equal(visible, want)
    assert seen or stored != {0, 1, 2, 3}
