"""rANS kernels give the CPU's streams bit for bit, read them back, and keep within the bounds of damaged ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_lab import both_orders, traffic

from lmcache_blend.triton_kernels.rans import examples, ops, reference
from lmcache_blend.triton_kernels.tables import slots

CPU = torch.device("cpu")
ENCODE, DECODE = examples.tables()
LUT = slots(ENCODE.freq, 12)


@st.composite
def rows_of_values(draw) -> tuple[torch.Tensor, ops.Rows]:
    """Streams of rows, empty ones too, of lengths around the 32 lanes, with values that no table has."""
    count = draw(st.integers(1, 6))
    lengths = torch.tensor(
        draw(st.lists(st.sampled_from((0, 1, 3, 31, 33, 63, 64, 111, 257)), min_size=count, max_size=count))
    )
    streams = sorted(draw(st.lists(st.integers(0, count), max_size=2)))
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), ((lengths + 3) // 4 * 4).cumsum(0)))
    ids = torch.tensor(draw(st.lists(st.integers(0, 2), min_size=count, max_size=count)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    q = torch.zeros(int(starts[-1]), dtype=torch.int16)
    for row in range(count):
        spread = (0.6, 2.0, 20.0)[int(ids[row])] * draw(st.sampled_from((0.1, 1.0, 9.0)))
        n = int(lengths[row])
        q[starts[row] : starts[row] + n] = (torch.randn(n, generator=generator) * spread).round().to(torch.int16)
        if n and draw(st.booleans()):
            q[starts[row] + draw(st.integers(0, n - 1))] = draw(st.sampled_from((-32767, 32767, -128, 128)))
    return q, ops.Rows(torch.tensor([0, *streams, count]), starts, lengths, ids)


@settings(max_examples=25, deadline=None)
@given(drawn=rows_of_values())
def test_streams_are_those_of_the_cpu_and_come_back(drawn):
    q, rows = drawn
    got = both_orders(lambda: examples.compact(ops.encode(q, rows, ENCODE), rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "on_triton", lambda *tensors: False)
        want = examples.compact(ops.encode(q, rows, ENCODE), rows)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    made = both_orders(lambda: examples.decode(*got, rows, len(q), DECODE))
    assert torch.equal(made[0], q[examples.inside(rows)])
    # Single values in place of the symbols of the look-up table are the same.
    plain = DECODE._replace(kind=DECODE.kind * (DECODE.kind > 1), lut=LUT)
    assert torch.equal(examples.decode(*got, rows, len(q), plain)[0], made[0])
    assert torch.equal(made[1], got[1].diff())
    assert torch.equal(made[2], got[4].diff())
    assert (made[3].to(torch.int64) == reference.LOW).all()


@settings(max_examples=15, deadline=None)
@given(drawn=rows_of_values(), data=st.data())
def test_damaged_streams_stay_within_bounds_and_are_noticed_as_on_cpu(drawn, data):
    """Cut words, flipped bits, wrong tables: no access outside (the lab's alarm), the same verdict on every path."""
    q, rows = drawn
    words, starts, states, escapes, escape_starts = examples.compact(ops.encode(q, rows, ENCODE), rows)
    kind = data.draw(st.sampled_from(("cut", "flip", "tables", "escapes")))
    if kind == "cut":
        lost = data.draw(st.integers(1, max(1, int(starts.diff()[-1]))))
        starts = torch.cat((starts[:-1], (starts[-1:] - lost).clamp_min(int(starts[-2]))))
    elif kind == "flip":
        flat = words.to(torch.int32)
        at = data.draw(st.integers(0, len(flat) - 1))
        flat[at] = int(flat[at]) ^ 1 << data.draw(st.integers(0, 15))
        words = flat.to(torch.uint16)
    elif kind == "tables":
        rows = rows._replace(ids=(rows.ids + 1) % 3)
    else:
        escape_starts = escape_starts.clone()
        escape_starts[-1] = max(int(escape_starts[-2]), int(escape_starts[-1]) - 1)
    # The compacted words of a cut stream end where the next 32 of padding start: anything may stand there.
    args = (words, starts, states, escapes, escape_starts, rows, len(q), DECODE)
    got = both_orders(lambda: ops.decode(*args)[1:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "on_triton", lambda *tensors: False)
        want = ops.decode(*args)[1:]

    def verdict(used, filled, ends):
        whole = (used == starts.diff()) & (ends.to(torch.int64) == reference.LOW).all(1)
        return whole & (filled == escape_starts.diff()), whole

    for a, b in zip(verdict(*got), verdict(*want), strict=True):
        assert torch.equal(a, b)


def test_the_decoder_reads_each_word_and_writes_each_value_once():
    args = examples.decode_args(CPU, True)
    with traffic() as moved:
        ops.decode(*args)
    words, _, _, escapes, _, rows, _, tables = args
    width = tables.kind.long().clamp_min(1)[rows.ids]
    symbols = -(-rows.lengths // width)
    assert moved["words", "load"] == 2 * (len(words) - ops.LANES)
    # Symbols pass through memory as a byte each, values are written once, escaped ones once more.
    assert moved["symbols", "load"] <= 4 * int(symbols.sum())
    values = int((symbols * width).sum())
    assert moved["out", "store"] == int(symbols.sum()) + 2 * values + 2 * len(escapes)


@pytest.mark.parametrize("stream", ["interleaved", "lanes"])
def test_the_reference_agrees(stream):
    if stream == "lanes":
        args = examples.lanes_words(CPU, True)
        want = examples.decode_lanes_reference(*args)
        got = both_orders(lambda: ops.decode_lanes(*args))
    else:
        words, starts, states, *_, rows, _, t = examples.decode_args(CPU, True)
        want = reference.decode_streams_reference(words, starts, states, rows, t.lut, t.kind, t.bits)[1:]
        got = ops.decode(*examples.decode_args(CPU, True))
        got = (got.used, got.states)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@settings(max_examples=5, deadline=None)
@given(tokens=st.sampled_from((1, 3, 63)), channels=st.sampled_from((1, 15, 33, 80)), seed=st.integers(0, 99))
def test_a_stream_per_lane_comes_back_and_notices_a_cut(tokens, channels, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(tokens, channels, generator=generator) * 20).round().clamp(-60, 60).add(60).to(torch.uint8)
    ids = torch.full((channels,), 2)
    words, starts, states = both_orders(lambda: examples.encode_lanes(x, ids, ENCODE))
    want = reference.encode_lanes_reference(x, ids, ENCODE.freq, ENCODE.cum, 12)
    for a, b in zip((words, starts, states), want, strict=True):
        assert torch.equal(a, b)
    out, used, ends = both_orders(lambda: ops.decode_lanes(words, starts, states, ids, LUT, 12, tokens))
    assert torch.equal(out, x)
    assert torch.equal(used, starts.diff())
    assert (ends.to(torch.int64) == reference.LOW).all()
    if len(words):
        short = torch.minimum(starts, starts[-1] - 1)
        out, used, _ = ops.decode_lanes(words[:-1], short, states, ids, LUT, 12, tokens)
        assert (used > short.diff()).any()


def test_rows_with_a_table_each():
    args = examples.exact_args(CPU, True)
    for a, b in zip(both_orders(lambda: ops.decode_exact(*args)), examples.exact_reference(*args), strict=True):
        assert torch.equal(a, b)
