"""What every tier promises, as tests that third parties subclass. Import it from `lmcache_blend.testing`."""

import hashlib
import math
import random
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

from lmcache_blend.engine.tiers.base import ABSENT, Miss, Outcome, PinningTier, SteppingTier, Tier, size_of
from lmcache_blend.errors import ConfigError


class TierConformance:
    """The promises of `lmcache_blend.engine.tiers.base.Tier`: whole values or none, exact sizes, one outcome a key.

    A whole use, in a file that pytest collects:

        from lmcache_blend.testing import TierConformance

        class TestMine(TierConformance):
            def tier(self, **options):
                return Mine(path=fresh_folder(), **options)

    options: capacity_bytes, where `limited`. With `reopen`, persistence and sharing are tested as well.
    """

    sizes: Sequence[int] = (1, 100, 4096, 4097, 1 << 20, (5 << 20) + 3)
    """Bytes of the values that are stored; large enough for the tier to split them where it does."""
    limited: bool = True
    """The tier takes capacity_bytes and says "full"."""

    def tier(self, **options: int) -> Tier:
        """A tier that holds nothing."""
        raise NotImplementedError("override tier() with a fresh tier")

    def reopen(self, tier: Tier) -> Tier | None:
        """Another object over what `tier` stored, as a second process or a restart would make it; None if volatile."""
        return None

    # One value

    def test_values_come_back_whole_in_order(self) -> None:
        with self._open() as tier:
            values = [pattern(n, i) for i, n in enumerate(self.sizes)]
            assert tier.put(keys(len(values)), [[v] for v in values]) == list(self.sizes)
            order = list(reversed(range(len(values))))
            assert read(tier, [key(i) for i in order], [self.sizes[i] for i in order]) == [values[i] for i in order]

    def test_pieces_are_written_one_after_another(self) -> None:
        with self._open() as tier:
            pieces = [b"", b"ab", bytearray(b"cd"), memoryview(b"efgh")[1:3], memoryview(bytearray(70_000))]
            assert tier.put([key(0)], [pieces]) == [size_of(pieces)]
            assert read(tier, [key(0)], [70_006]) == [b"abcdfg" + bytes(70_000)]

    def test_many_pieces(self) -> None:
        """More than the 1,024 that the operating system takes in one call."""
        with self._open() as tier:
            pieces = [bytes([i % 256]) * (i % 7) for i in range(3_000)]
            tier.put([key(0)], [pieces])
            assert read(tier, [key(0)], [size_of(pieces)]) == [b"".join(pieces)]

    def test_the_pieces_are_the_callers_again_when_put_returns(self) -> None:
        with self._open() as tier:
            piece = bytearray(b"x" * 5_000)
            tier.put([key(0)], [[piece]])
            piece[:] = b"y" * 5_000
            assert read(tier, [key(0)], [5_000]) == [b"x" * 5_000]

    def test_parts_of_a_value(self) -> None:
        size = self.sizes[-1]
        with self._open() as tier:
            value = pattern(size, 0)
            tier.put([key(0)], [[value]])
            cuts = [(0, 1), (size - 1, 1), (size // 3, size // 2), (1, min(8192, size - 1)), (0, size), (size, 0)]
            buffers = [bytearray(n) for _, n in cuts]
            out = tier.get([key(0)] * len(cuts), [memoryview(b) for b in buffers], [at for at, _ in cuts])
            assert out == [n for _, n in cuts]
            for (at, n), buffer in zip(cuts, buffers, strict=True):
                assert buffer == value[at : at + n], f"bytes {at} to {at + n} differ"

    def test_reading_step_by_step(self) -> None:
        with self._open() as tier:
            if not isinstance(tier, SteppingTier):
                return
            value = pattern(self.sizes[-1], 0)
            tier.put([key(0)], [[value]])
            sizes, told = [len(value), 1, len(value) + 1], [[], [], []]
            buffers = [bytearray(n) for n in sizes]

            def reached(i: int, there: int) -> int:
                assert buffers[i][:there] == value[:there], "told before it was read"
                told[i].append(there)
                return there + len(value) // 3

            out = tier.get_stepwise(
                [key(0), key(1), key(0)], [memoryview(b) for b in buffers], [partial(reached, i) for i in range(3)]
            )
            assert [cause(o) for o in out] == [None, "absent", "corrupt"]
            assert buffers[0] == value
            assert told[0] == sorted(told[0])
            assert (told[0][0], told[0][-1], told[1]) == (0, len(value), [])

    def test_reading_past_the_end_is_a_miss(self) -> None:
        with self._open() as tier:
            tier.put([key(0)], [[b"12345678"]])
            for at, n in ((0, 9), (7, 2), (8, 1), (1 << 40, 1)):
                (out,) = tier.get([key(0)], [memoryview(bytearray(n))], [at])
                assert cause(out) == "corrupt", f"{n} bytes at {at} of 8 give {out}"

    def test_lookup_gives_sizes(self) -> None:
        with self._open() as tier:
            tier.put([key(0), key(2)], [[b"abc"], [b"abcde"]])
            assert tier.lookup([key(2), key(1), key(0)]) == [5, ABSENT, 3]

    def test_an_absent_key_is_a_miss_and_the_others_are_served(self) -> None:
        with self._open() as tier:
            tier.put([key(0), key(2)], [[b"abc"], [b"defgh"]])
            buffers = [bytearray(3), bytearray(3), bytearray(5)]
            out = tier.get(keys(3), [memoryview(b) for b in buffers])
            assert [cause(o) for o in out] == [None, "absent", None]
            assert (buffers[0], buffers[2]) == (b"abc", b"defgh")

    def test_a_new_value_replaces_the_old_one(self) -> None:
        with self._open() as tier:
            for value in (pattern(9_000, 0), pattern(200, 1), pattern(70_000, 2)):
                assert tier.put([key(0)], [[value]]) == [len(value)]
                assert read(tier, [key(0)], [len(value)]) == [value]
                self._holds(tier, {key(0): len(value)})

    def test_of_one_key_twice_in_a_batch_the_last_value_stays(self) -> None:
        with self._open() as tier:
            tier.put([key(0), key(0)], [[b"first"], [b"second"]])
            assert read(tier, [key(0)], [6]) == [b"second"]
            self._holds(tier, {key(0): 6})

    def test_delete_frees_what_it_says(self) -> None:
        with self._open() as tier:
            tier.put(keys(3), [[pattern(n, 0)] for n in (10, 20, 70_000)])
            assert tier.delete([key(1), key(7), key(2)]) == [20, ABSENT, 70_000]
            assert tier.delete([key(1)]) == [ABSENT]
            assert [cause(o) for o in tier.lookup(keys(3))] == [None, "absent", "absent"]
            self._holds(tier, {key(0): 10})

    def test_empty_batches(self) -> None:
        with self._open() as tier:
            assert tier.put([], []) == tier.get([], []) == tier.lookup([]) == tier.delete([]) == []
            self._holds(tier, {})

    def test_a_large_batch(self) -> None:
        with self._open() as tier:
            values = [pattern(1 + i % 50, i) for i in range(700)]
            tier.put(keys(700), [[v] for v in values])
            assert read(tier, keys(700), [len(v) for v in values]) == values
            self._holds(tier, {key(i): len(v) for i, v in enumerate(values)})

    def test_entries_carry_a_time(self) -> None:
        with self._open() as tier:
            tier.put([key(0)], [[b"abc"]])
            (entry,) = tier.entries()
            assert entry.modified == 0.0 or abs(entry.modified - time.time()) < 60

    def test_what_is_no_key_is_refused(self) -> None:
        """Names of files and objects are made of keys: nothing else may become one."""
        with self._open() as tier:
            for bad in (b"", b"short", b"x" * 33, "x" * 32, b"../../../../../../../etc/passwd"[:31], bytearray(32)):
                for call in (
                    lambda k: tier.put([k], [[b"v"]]),
                    lambda k: tier.get([k], [memoryview(bytearray(1))]),
                    lambda k: tier.lookup([k]),
                    lambda k: tier.delete([k]),
                ):
                    try:
                        call(bad)
                    except ConfigError:
                        continue
                    raise AssertionError(f"key {bad!r} is taken")
            self._holds(tier, {})

    def test_closing_twice(self) -> None:
        tier = self.tier()
        tier.close()
        tier.close()

    # Room

    def test_no_more_than_its_capacity(self) -> None:
        if not self.limited:
            return
        capacity = 1 << 20
        with self._open(capacity_bytes=capacity) as tier:
            assert tier.capacity_bytes == tier.usage().capacity_bytes == capacity
            out = tier.put(keys(8), [[pattern(200_000, i)] for i in range(8)])
            kept = [i for i, o in enumerate(out) if o == 200_000]
            assert 1 <= len(kept) <= 5
            assert {cause(o) for i, o in enumerate(out) if i not in kept} == {"full"}
            self._holds(tier, {key(i): 200_000 for i in kept})
            assert cause(tier.put([key(20)], [[bytes(capacity + 1)]])[0]) == "too_large"
            tier.delete([key(i) for i in kept])
            assert tier.put([key(9)], [[pattern(200_000, 9)]]) == [200_000]
            assert read(tier, [key(9)], [200_000]) == [pattern(200_000, 9)]

    # Many at once

    def test_threads(self) -> None:
        """Each has its own keys; all see exactly their own values."""
        with self._open() as tier:

            def work(n: int) -> None:
                rng, mine = random.Random(n), {}
                for _ in range(25):
                    k = key(1000 * n + rng.randrange(6))
                    if rng.random() < 0.6:
                        mine[k] = pattern(rng.randrange(1, 60_000), rng.randrange(250))
                        assert tier.put([k], [[mine[k]]]) == [len(mine[k])]
                    elif rng.random() < 0.3:
                        assert tier.delete([k]) == [len(mine.pop(k)) if k in mine else ABSENT]
                    found = tier.lookup([k])
                    assert found == [len(mine[k]) if k in mine else ABSENT]
                    if k in mine:
                        assert read(tier, [k], [len(mine[k])]) == [mine[k]]
                tier.delete(list(mine))

            with ThreadPoolExecutor(8) as pool:
                list(pool.map(work, range(8)))
            self._holds(tier, {})

    def test_a_reader_sees_no_mixture(self) -> None:
        with self._open() as tier:
            size, stop = 300_000, threading.Event()
            tier.put([key(0)], [[bytes([0]) * size]])

            def write() -> None:
                for i in range(1, 40):
                    tier.put([key(0)], [[bytes([i % 256]) * size]])
                stop.set()

            with ThreadPoolExecutor(1) as pool:
                done = pool.submit(write)
                while not stop.is_set() and not done.done():
                    (value,) = read(tier, [key(0)], [size])
                    assert value is not None, "a value that is replaced is missing in between"
                    assert len(set(value)) == 1, "a reader saw parts of two values"
                done.result()

    # Persistent tiers

    def test_values_outlive_the_object(self) -> None:
        with self._open() as tier:
            tier.put(keys(3), [[pattern(n, n)] for n in (5, 5_000, 70_000)])
            other = self.reopen(tier)
            if other is None:
                return
            assert read(other, keys(3), [5, 5_000, 70_000]) == [pattern(n, n) for n in (5, 5_000, 70_000)]
            self._holds(other, {key(i): n for i, n in enumerate((5, 5_000, 70_000))})
            other.delete([key(1)])
            assert tier.lookup([key(1)]) == [ABSENT]
            tier.put([key(4)], [[b"new"]])
            assert read(other, [key(4)], [3]) == [b"new"]
            self._holds(other, {key(0): 5, key(2): 70_000, key(4): 3})
            other.close()

    def test_pins_hold_against_everyone(self) -> None:
        with self._open() as tier:
            other = self.reopen(tier)
            if other is None or not isinstance(tier, PinningTier) or not isinstance(other, PinningTier):
                return
            tier.put(keys(3), [[b"abc"]] * 3)
            assert tier.pin([key(0), key(9)], math.inf) == [3, ABSENT]
            assert tier.pin([key(1)], time.time() - 1) == [3]
            assert [cause(o) for o in other.delete(keys(3))] == ["pinned", None, None]
            assert other.pinned() == {key(0): math.inf}
            assert other.unpin([key(0), key(1)]) == [3, ABSENT]
            assert tier.pinned() == {}
            assert tier.delete([key(0)]) == [3]
            self._holds(tier, {})
            other.close()

    def test_the_later_of_two_pins_holds_and_a_pin_ends(self) -> None:
        with self._open() as tier:
            if not isinstance(tier, PinningTier):
                return
            tier.put([key(0)], [[b"abc"]])
            now = time.time()
            tier.pin([key(0)], now + 100)
            tier.pin([key(0)], now + 1.5)
            assert abs(tier.pinned()[key(0)] - now - 100) < 1
            tier.unpin([key(0)])
            tier.pin([key(0)], time.time() + 1.5)
            assert cause(tier.delete([key(0)])[0]) == "pinned"
            time.sleep(1.8)
            assert tier.pinned() == {}
            assert tier.delete([key(0)]) == [3]

    @contextmanager
    def _open(self, **options: int) -> Iterator[Tier]:
        tier = self.tier(**options)
        try:
            yield tier
        finally:
            tier.close()

    def _holds(self, tier: Tier, wanted: dict[bytes, int]) -> None:
        listed = [(e.key, e.nbytes) for e in tier.entries()]
        assert len(listed) == len(set(listed)), "a value is listed twice"
        assert dict(listed) == wanted
        assert tier.usage()[:2] == (sum(wanted.values()), len(wanted))


def key(i: int) -> bytes:
    return hashlib.sha256(str(i).encode()).digest()


def keys(n: int) -> list[bytes]:
    return [key(i) for i in range(n)]


def pattern(size: int, seed: int) -> bytes:
    """`size` bytes that depend on their place and the seed."""
    block = hashlib.sha256(seed.to_bytes(4, "little")).digest() + bytes([seed % 251])
    return (block * (size // len(block) + 1))[:size]


def cause(outcome: Outcome) -> str | None:
    """Of a Miss; None for what succeeded."""
    return outcome.cause if isinstance(outcome, Miss) else None


def read(tier: Tier, wanted: Sequence[bytes], sizes: Sequence[int]) -> list[bytes | None]:
    """Whole values; None for a Miss."""
    buffers = [bytearray(n) for n in sizes]
    out = tier.get(wanted, [memoryview(b) for b in buffers])
    return [bytes(b) if o == len(b) else None for o, b in zip(out, buffers, strict=True)]
