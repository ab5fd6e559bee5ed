"""rANS: exact at every length, equal to its reference on good and bad bytes, as short as another coder's."""

import hashlib
import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_blend.codecs import rans
from lmcache_blend.codecs.tables import ESCAPE, MISSING, REACH, Tables, bank, exact, histogram, laplace_bank, normalise
from lmcache_blend.errors import CorruptChunkError
from lmcache_blend.triton_kernels.rans import avx2, cpu

BANK = laplace_bank()
EXTREMES = (-32767, 32767, -128, 127, 128, -127, REACH + 1, 0)


def laplace(rows: int, length: int, scale: float, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).laplace(0, scale, (rows, length))
    return np.clip(np.rint(x), -32767, 32767).astype(np.int16)


@st.composite
def symbols(draw) -> np.ndarray:
    """[R, T] int16, rows of any spread, with extreme values strewn in."""
    rows, length = draw(st.integers(0, 6)), draw(st.integers(0, 140))
    q = laplace(rows, length, draw(st.sampled_from((0.01, 0.3, 2.0, 30.0, 3000.0))), draw(st.integers(0, 999)))
    if q.size:
        for _ in range(draw(st.integers(0, 4))):
            q[draw(st.integers(0, rows - 1)), draw(st.integers(0, length - 1))] = draw(st.sampled_from(EXTREMES))
    return q


@st.composite
def own_tables(draw) -> Tables:
    """A bank of distributions that no built-in table has: few values, gaps, skew."""
    weights = st.lists(st.integers(0, 50), min_size=1, max_size=9).filter(any)
    sides = draw(st.lists(weights, min_size=1, max_size=4))
    return bank(np.array([0] * (len(w) - 1) + w, float) for w in sides)


@settings(max_examples=150, deadline=None)
@given(q=symbols(), tables=st.just(BANK) | own_tables(), data=st.data())
def test_any_rows_come_back_with_any_tables(q, tables, data):
    ids = data.draw(st.lists(st.integers(0, len(tables) - 1), min_size=len(q), max_size=len(q)))
    ids = np.array(ids, np.uint8)
    stream = rans.encode(q, ids, tables)
    assert np.array_equal(rans.decode(stream, ids, q.shape[1], tables), q)
    assert np.array_equal(rans.decode_reference(stream, ids, q.shape[1], tables), q)


@pytest.mark.skipif(not avx2.available(), reason="this processor has no AVX2")
@pytest.mark.parametrize("width", [0, 1, 2, 4])
def test_the_avx2_loop_does_what_the_portable_one_does(width):
    rng = np.random.default_rng(width)
    table = int(np.flatnonzero(BANK.width == max(width, 1))[0])
    words = rng.integers(0, 1 << 16, 3000 + rans.LANES).astype(np.uint16)
    states = rng.integers(1 << 16, 1 << 32, rans.LANES).astype(np.uint32)
    for count in (0, 40, 3000):  # the first two run dry
        seen = []
        for loop in (cpu.portable_blocks, avx2.decode_blocks):
            x, out = states.copy(), np.zeros(64 * 32 * max(width, 1), np.int16)
            luts = (BANK.direct if width else BANK.lut)[table]
            at = loop(words, 7, count, x, luts, BANK.values[table], avx2.SPREAD, 12, width, 64, out)
            seen.append((at, x.tolist() if at >= 0 else None, out.tolist() if at >= 0 else None))
        assert seen[0] == seen[1]
    assert seen[0][0] > 7


@settings(deadline=None)
@given(lengths=st.lists(st.integers(0, 90), max_size=6), seed=st.integers(0, 999))
def test_rows_of_different_lengths_come_back(lengths, seed):
    starts = rans.row_starts(np.array(lengths))
    assert (starts % 4 == 0).all()
    rows = [laplace(1, n, 3.0, seed + i)[0] for i, n in enumerate(lengths)]
    q = np.zeros(starts[-1], np.int16)
    for at, row in zip(starts, rows, strict=False):
        q[at : at + len(row)] = row
    ids = np.random.default_rng(seed).integers(0, len(BANK), len(rows)).astype(np.uint8)
    stream = rans.encode_rows(q, np.array(lengths), ids, BANK)
    out = rans.decode_rows(stream, np.array(lengths), ids, BANK)
    for at, row in zip(starts, rows, strict=False):
        assert np.array_equal(out[at : at + len(row)], row)


def test_every_length_to_300_is_exact():
    for length in range(1, 301):
        q = np.concatenate([laplace(1, length, scale, length) for scale in (0.02, 1.0, 40.0)])
        ids = BANK.choose(q)
        stream = rans.encode(q, ids, BANK)
        assert np.array_equal(rans.decode(stream, ids, length, BANK), q), length


@settings(deadline=None)
@given(
    rows=st.integers(0, 5),
    length=st.integers(0, 70),
    size=st.integers(1, 255),
    peaked=st.booleans(),
    seed=st.integers(0, 999),
)
def test_exact_tables_are_decoded_from_their_frequencies(rows, length, size, peaked, seed):
    rng = np.random.default_rng(seed)
    q = (rng.integers(0, size, (rows, length)) * (rng.random((rows, length)) > 0.9 * peaked)).astype(np.int16)
    counts = histogram(q - 127, 127)[:, : int(q.max(initial=0)) + 1]
    tables, ids = exact(counts, 8), np.arange(rows)
    stream = rans.encode(q, ids, tables)
    used = tables.freq[:, : counts.shape[1]]
    freq = (used - (used == 256)).astype(np.uint8)
    assert np.array_equal(rans.decode_exact(stream, freq, length), q)
    assert np.array_equal(rans.decode_reference(stream, ids, length, tables), q)


@settings(max_examples=300, deadline=None)
@given(q=symbols().filter(lambda q: q.size), data=st.data())
def test_damage_reads_the_same_in_both_decoders(q, data):
    """Flipped bits, wrong tables, wrong lengths: CorruptChunkError, or the same symbols from both."""
    ids, length = BANK.choose(q), q.shape[1]
    bad = bytearray(rans.encode(q, ids, BANK))
    kind = data.draw(st.sampled_from(("flip", "numbers", "ids", "length")))
    if kind == "flip":
        at = data.draw(st.integers(0, len(bad) - 1))
        bad[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "numbers":
        words, escapes = struct.unpack_from("<II", bad)
        shift = data.draw(st.integers(-words, escapes))
        struct.pack_into("<II", bad, 0, words + shift, escapes - shift)
    elif kind == "ids":
        ids = np.roll(ids, 1) ^ np.uint8(data.draw(st.integers(1, 31)))
    else:
        length = data.draw(st.integers(0, 200))
    assert same(outcome(rans.decode, bytes(bad), ids, length), outcome(rans.decode_reference, bytes(bad), ids, length))


def outcome(decode, data, ids, length):
    try:
        return decode(data, ids, length, BANK)
    except CorruptChunkError:
        return None


def same(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return (a is None) == (b is None) and (a is None or np.array_equal(a, b))


@given(size=st.integers(0, 300), words=st.integers(0, 40), escapes=st.integers(0, 40), seed=st.integers(0, 99))
def test_random_bytes_are_corrupt(size, words, escapes, seed):
    noise = np.random.default_rng(seed).bytes(4 * rans.LANES + 2 * (words + escapes))
    ids = np.array([50, 90], np.uint8)
    for data in (noise[:size], struct.pack("<II", words, escapes) + noise):
        with pytest.raises(CorruptChunkError):
            rans.decode(data, ids, 64, BANK)
        with pytest.raises(CorruptChunkError):
            rans.decode_exact(data, np.full((2, 4), 64, np.uint8), 64)


def test_streams_of_another_size_and_unknown_tables_are_corrupt():
    q = laplace(3, 50, 4.0)
    ids = BANK.choose(q)
    stream = rans.encode(q, ids, BANK)
    for bad in (b"", stream[:-1], stream[:100], stream + b"\0", stream + b"\0\0"):
        with pytest.raises(CorruptChunkError):
            rans.decode(bad, ids, 50, BANK)
    with pytest.raises(CorruptChunkError, match="table 96 of 96"):
        rans.decode(stream, np.array([0, 96, 0], np.uint8), 50, BANK)


@pytest.mark.parametrize("freq", [[], [255, 0, 0], [128, 127], [255, 2], [64, 64, 64, 65], [0, 0]])
def test_frequencies_that_are_no_table_are_corrupt(freq):
    good = rans.encode(np.zeros((1, 3), np.int16), np.zeros(1, int), exact(np.ones((1, 1)), 8))
    table = np.array(freq, np.uint8).reshape(1, -1)
    if freq == [255, 0, 0]:
        assert not rans.decode_exact(good, table, 3).any(), "255 alone stands for 256"
        return
    with pytest.raises(CorruptChunkError, match="sum to 256"):
        rans.decode_exact(good, table, 3)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_code_lengths_are_those_of_constriction(width):
    """Same integer frequencies, another coder (constriction's ANS): equal to .2 % and the 32 lanes' states."""
    constriction = pytest.importorskip("constriction", reason="constriction has no wheel here")
    table = int(np.flatnonzero(BANK.width == width)[len(np.flatnonzero(BANK.width == width)) // 2])
    mean = np.geomspace(1 / 400, 60, len(BANK))[table]
    q = laplace(64, 1024, max(0.15, mean), 1)
    ids = np.full(len(q), table, np.uint8)
    words, escapes = struct.unpack_from("<II", rans.encode(q, ids, BANK))
    number = {tuple(v[:width]): s for s, v in enumerate(BANK.values[table]) if BANK.freq[table, s] and s != ESCAPE}
    coded = np.array([number.get(tuple(t), ESCAPE) for t in q.reshape(-1, width).tolist()], np.int32)
    assert escapes == width * (coded == ESCAPE).sum()
    used = np.flatnonzero(BANK.freq[table])
    model = constriction.stream.model.Categorical(BANK.freq[table][used] / 4096, perfect=True)
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(np.searchsorted(used, coded).astype(np.int32), model)
    assert 16 * words == pytest.approx(coder.num_valid_bits(), rel=0.002, abs=32 * 16)
    ideal = float((12 - np.log2(BANK.freq[table][coded])).sum())
    assert 16 * words == pytest.approx(ideal, rel=0.002, abs=32 * 16)


@given(
    weights=st.lists(st.just(0.0) | st.floats(1e-9, 1e9), min_size=1, max_size=255),
    bits=st.sampled_from((8, 12)),
)
def test_normalised_frequencies_sum_and_leave_no_symbol_out(weights, bits):
    freq = normalise(np.array(weights), bits).astype(int)
    assert freq.sum() == 1 << bits
    assert ((freq > 0) == (np.array(weights) > 0)).all() or not any(weights)


@given(st.lists(st.integers(1, 99), min_size=2, max_size=5))
def test_units_of_frequency_are_where_they_shorten_the_code_most(weights):
    """Moving one unit from any symbol to any other shortens the code by less than .1 %."""
    p = np.array(weights, float)
    freq = normalise(p, 8).astype(int)

    def bits(f):
        return -(p * np.log2(f / 256)).sum()

    for a in range(len(p)):
        for b in range(len(p)):
            moved = freq.copy()
            moved[a], moved[b] = moved[a] - 1, moved[b] + 1
            assert a == b or moved[a] < 1 or bits(moved) >= bits(freq) * 0.999


def test_the_shortest_table_is_chosen():
    q = np.concatenate([laplace(3, 256, scale, i) for i, scale in enumerate((0.05, 0.4, 1.5, 9.0, 40.0))])
    chosen = BANK.choose(q)
    for row, table in zip(q, chosen, strict=True):
        value = np.clip(row, -REACH, REACH) + REACH
        assert BANK.cost[table][value].sum() == pytest.approx(BANK.cost[:, value].sum(1).min(), rel=1e-4)
        sizes = [len(rans.encode(row[None], np.array([i], np.uint8), BANK)) for i in range(len(BANK))]
        assert sizes[table] <= min(sizes) * 1.02 + 8, (table, np.argmin(sizes))


def test_tables_are_sound():
    for tables in (BANK, exact(np.arange(1, 8)[None].repeat(3, 0), 8)):
        assert (tables.freq.sum(1, dtype=int) == 1 << tables.bits).all()
        assert tables.freq.max(initial=0) <= 4096
        assert (tables.values[:, ESCAPE] == MISSING).all()
        assert set(tables.width) <= {1, 2, 4}
        for freq, values, width in zip(tables.freq, tables.values, tables.width, strict=True):
            used = values[np.flatnonzero(freq[:ESCAPE]), :width]
            assert len(np.unique(used, axis=0)) == len(used), "two symbols stand for the same values"
            assert not (used == MISSING).any()


def test_values_beyond_a_byte_come_back_from_shared_tables():
    """Tables of single values up to 254 cannot have the values themselves, int8, in their look-up entries."""
    q = np.random.default_rng(0).integers(0, 255, (3, 700)).astype(np.int16)
    tables, ids = exact(histogram(q - 127, 127), 12), np.arange(3)
    stream = rans.encode(q, ids, tables)
    assert np.array_equal(rans.decode(stream, ids, 700, tables), q)
    assert np.array_equal(rans.decode_reference(stream, ids, 700, tables), q)
    batch = rans.decode_batch([stream], [np.full(3, 700)], [ids], tables, torch.device("cpu"))
    assert np.array_equal(batch.numpy().reshape(3, 700), q)


def test_the_built_in_bank_is_frozen():
    """Chunks hold numbers of these tables: another bank reads them wrongly. Whoever changes one adds a new bank."""
    digest = hashlib.sha256()
    for part, kind in ((BANK.freq, "<u2"), (BANK.width, "u1"), (BANK.values, "<i2")):
        digest.update(part.astype(kind).tobytes())
    assert digest.hexdigest() == "e484f611fd77d9c3a8ec6261260e0e308561463a4bf63682647baad89e396a94"


@settings(max_examples=40, deadline=None)
@given(planes=st.lists(symbols().filter(len), min_size=1, max_size=4), device=st.just(torch.device("cpu")))
def test_a_batch_has_the_bytes_of_single_streams(planes, device):
    padded = [np.pad(q, ((0, 0), (0, -q.shape[1] % 4))).ravel() for q in planes]
    ids, lengths = [BANK.choose(q) for q in planes], [np.full(len(q), q.shape[1]) for q in planes]
    flat = torch.from_numpy(np.concatenate(padded)).to(device)
    streams = rans.encode_batch(flat, lengths, ids, BANK)
    assert streams == [rans.encode(q, i, BANK) for q, i in zip(planes, ids, strict=True)]
    out = rans.decode_batch(streams, lengths, ids, BANK, device).cpu().numpy()
    at = 0
    for q, part in zip(planes, padded, strict=True):
        assert np.array_equal(out[at : at + len(part)].reshape(len(q), -1)[:, : q.shape[1]], q)
        at += len(part)
    if at:
        cut = [*streams[:-1], streams[-1][:-2]]
        with pytest.raises(CorruptChunkError):
            rans.decode_batch(cut, lengths, ids, BANK, device)
