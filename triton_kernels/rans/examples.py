"""rANS of a chunk of 256 tokens: 16 layers' keys of 1,024 channels; small: 3 of 24."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from lmcache_blend.triton_kernels.example import Example
from lmcache_blend.triton_kernels.rans import ops, reference
from lmcache_blend.triton_kernels.tables.examples import symbols
from lmcache_blend.triton_kernels.tables.ops import frequencies, histogram
from lmcache_blend.triton_kernels.tables.reference import normalise, slots_reference

CPU = torch.device("cpu")


def tables() -> tuple[ops.EncodeTables, ops.DecodeTables]:
    """Three tables of 12 bits: tuples of 4 from -2..2, of 2 from -7..7, single values from -127..126."""
    parts: list[tuple[int, int, Tensor, Tensor]] = []
    for width, reach, spread in ((4, 2, 0.4), (2, 7, 2.0), (1, 127, 20.0)):
        steps = torch.arange(-reach, reach + 1)
        tuples = torch.cartesian_prod(*(steps for _ in range(width))).reshape(-1, width)
        weight = torch.exp(-tuples.abs().sum(1).double() / spread)
        keep = torch.sort(weight, descending=True, stable=True).indices[: reference.ESCAPE]
        freq, values = torch.zeros(256, dtype=torch.int64), torch.zeros(256, 4, dtype=torch.int16)
        # Every symbol keeps a frequency of 1 or more; the escape has what one step of 1/256 is worth.
        shares = torch.cat((weight[keep] / weight[keep].sum() + 1e-3, torch.tensor([4e-3], dtype=torch.float64)))
        made = torch.from_numpy(normalise(shares.numpy(), 12).astype("int64"))
        freq[: len(keep)], freq[reference.ESCAPE] = made[:-1], made[-1]
        values[: len(keep), :width], values[reference.ESCAPE] = tuples[keep].to(torch.int16), -32768
        parts.append((width, reach, freq, values))
    maps = torch.full((len(parts), 1024), reference.ESCAPE, dtype=torch.uint8)
    for i, (width, reach, freq, values) in enumerate(parts):
        used = freq[: reference.ESCAPE].nonzero()[:, 0]
        base = (2 * reach + 1) ** torch.arange(width - 1, -1, -1)
        maps[i, ((values[used, :width].long() + reach) * base).sum(1)] = used.to(torch.uint8)
    freq = torch.stack([p[2] for p in parts])
    counts, width = freq.to(torch.uint16), torch.tensor([p[0] for p in parts], dtype=torch.uint8)
    reaches = torch.tensor([p[1] for p in parts], dtype=torch.int16)
    lut = slots_reference(counts, 12).to(torch.int64)
    # Kind 1 has values for symbols: those of the third table.
    byte = torch.where(lut[2] & 255 == reference.ESCAPE, -128, parts[2][3][lut[2] & 255, 0].to(torch.int64))
    lut[2] = (lut[2] & 0xFFFFFF00) | (byte & 255)
    lut = lut.to(torch.uint32)
    return (
        ops.EncodeTables(12, width, reaches, maps, counts, (freq.cumsum(1) - freq).to(torch.uint16)),
        ops.DecodeTables(12, width, lut, torch.stack([p[3] for p in parts])),
    )


def values(small: bool) -> tuple[Tensor, ops.Rows]:
    """Rows of every spread in several streams, the last of odd lengths."""
    streams, tokens = (3, 61) if small else (16, 256)
    q = symbols(CPU, small)[:, :tokens].repeat(1 if small else streams, 1)
    lengths = torch.full((len(q),), tokens)
    lengths[-5:] = torch.tensor([1, 0, tokens - 1, 33, 3])
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), ((lengths + 3) // 4 * 4).cumsum(0)))
    flat = torch.zeros(int(starts[-1]), dtype=torch.int16)
    for row, at, n in zip(q, starts.tolist(), lengths.tolist(), strict=False):
        flat[at : at + n] = row[:n]
    spread = q.double().abs().mean(1)
    ids = (spread > 0.5).long() + (spread > 2.5)
    return flat, ops.Rows(torch.linspace(0, len(q), streams + 1).long(), starts, lengths, ids)


def compact(made: ops.Encoded, rows: ops.Rows) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `encode` made, with the streams' words and escapes one after another: the front arguments of `decode`."""
    first = rows.starts[rows.streams[:-1]]
    ends = rows.starts[rows.streams[1:]] + torch.arange(len(first), device=first.device) + 1
    words = [made.words[a:b] for a, b in zip(made.firsts.tolist(), ends.tolist(), strict=True)]
    escapes = [made.escapes[a : a + n] for a, n in zip(first.tolist(), made.counts.tolist(), strict=True)]
    zero = torch.zeros(1, dtype=torch.int64, device=first.device)
    return (
        torch.cat((*words, made.words.new_zeros(ops.LANES))),
        torch.cat((zero, (ends - made.firsts).cumsum(0))),
        made.states,
        torch.cat(escapes),
        torch.cat((zero, made.counts.cumsum(0))),
    )


def encode_args(device: torch.device, small: bool) -> tuple:
    """Of `ops.encode`."""
    q, rows = values(small)
    return q.to(device), ops.Rows(*(x.to(device) for x in rows)), tables()[0].to(device)


def decode_args(device: torch.device, small: bool) -> tuple:
    """Of `ops.decode`, its tables last."""
    q, rows = values(small)
    front = compact(ops.encode(q, rows, tables()[0]), rows)
    moved = [x.to(device) for x in front]
    return (*moved, ops.Rows(*(x.to(device) for x in rows)), int(rows.starts[-1]), tables()[1].to(device))


def decode(*args: Any) -> tuple:
    """Only what `ops.decode` defines: not what lies between rows."""
    made = ops.decode(*args)
    return made.values[inside(args[5])], *made[1:]


def decode_reference(*args: Any) -> tuple:
    """The values that were coded, all words and escapes used, and the states that every stream starts from."""
    _, word_starts, states, _, escape_starts, rows, _, _ = args
    flat = values(len(rows.streams) == 4)[0].to(states.device)
    ends = torch.full(states.shape, reference.LOW, device=states.device).to(torch.uint32)
    return flat[inside(rows)], word_starts.diff(), escape_starts.diff(), ends


def inside(rows: ops.Rows) -> Tensor:
    """Places of all values in the flat array."""
    row = torch.repeat_interleave(torch.arange(len(rows.lengths), device=rows.lengths.device), rows.lengths)
    before = rows.lengths.cumsum(0) - rows.lengths
    return rows.starts[row] + torch.arange(len(row), device=row.device) - before[row]


def encode(q: Tensor, rows: ops.Rows, t: ops.EncodeTables) -> tuple:
    """The streams, one after another: not what lies between them."""
    return compact(ops.encode(q, rows, t), rows)


def encode_reference(q: Tensor, rows: ops.Rows, t: ops.EncodeTables) -> tuple:
    """The CPU's streams, bit for bit."""
    cpu = ops.Rows(*(x.cpu() for x in rows))
    return tuple(x.to(q.device) for x in compact(ops.encode(q.cpu(), cpu, t.to(CPU)), cpu))


def lanes_args(device: torch.device, small: bool) -> tuple[Tensor, Tensor, ops.EncodeTables]:
    """Of `ops.encode_lanes`: symbols [T, C] of the table of single values."""
    x = symbols(CPU, small)[:, :61] if small else symbols(CPU, small).repeat(16, 1)
    x = (x.clamp(-60, 60) + 60).T.contiguous().to(torch.uint8)
    return x.to(device), torch.full((x.shape[1],), 2, device=device), tables()[0].to(device)


def lanes_words(device: torch.device, small: bool) -> tuple:
    """Of `ops.decode_lanes`."""
    x, ids, t = lanes_args(CPU, small)
    words, firsts, states = ops.encode_lanes(x, ids, t)
    kept = torch.arange(len(x)) >= firsts[:, None]
    starts = torch.cat((torch.zeros(1, dtype=torch.int64), kept.sum(1).cumsum(0)))
    packed = words.to(torch.int32)[kept].to(torch.uint16)
    lut = slots_reference(t.freq, t.bits)
    return (*(v.to(device) for v in (packed, starts, states, ids, lut)), t.bits, len(x))


def encode_lanes(x: Tensor, ids: Tensor, t: ops.EncodeTables) -> tuple:
    """The words of all channels, one after another: not what lies between them."""
    words, firsts, states = ops.encode_lanes(x, ids, t)
    kept = torch.arange(len(x), device=x.device) >= firsts[:, None]
    zero = torch.zeros(1, dtype=torch.int64, device=x.device)
    return words.to(torch.int32)[kept].to(torch.uint16), torch.cat((zero, kept.sum(1).cumsum(0))), states


def encode_lanes_reference(x: Tensor, ids: Tensor, t: ops.EncodeTables) -> tuple:
    """Symbol by symbol where they are few, else the CPU's."""
    if x.numel() > 1 << 16:
        return tuple(v.to(x.device) for v in encode_lanes(x.cpu(), ids.cpu(), t.to(CPU)))
    made = reference.encode_lanes_reference(x.cpu(), ids.cpu(), t.freq.cpu(), t.cum.cpu(), t.bits)
    return tuple(v.to(x.device) for v in made)


def decode_lanes_reference(
    words: Tensor, starts: Tensor, states: Tensor, ids: Tensor, lut: Tensor, bits: int, tokens: int
) -> tuple:
    """Lane by lane."""
    front = (words.cpu(), starts.cpu(), states.cpu(), ids.cpu(), lut.cpu())
    return tuple(v.to(words.device) for v in reference.decode_lanes_reference(*front, bits, tokens))


def exact_args(device: torch.device, small: bool) -> tuple:
    """Of `ops.decode_exact`: rows with a table each, as the codecs' row tables."""
    q = symbols(CPU, small).clamp(-15, 15) + 15
    q[0] = 7
    streams = torch.linspace(0, len(q), 4 if small else 17).long()
    freq = frequencies(histogram(q - 15, 15).double(), 8)
    full = torch.zeros(len(q), 256, dtype=torch.int64)
    full[:, :31] = freq.long()
    made = ops.EncodeTables(
        8,
        torch.ones(len(q), dtype=torch.uint8),
        torch.full((len(q),), 30, dtype=torch.int16),
        torch.cat((torch.zeros(len(q), 30, dtype=torch.uint8), torch.arange(31).expand(len(q), 31).to(torch.uint8)), 1),
        full.to(torch.uint16),
        (full.cumsum(1) - full).to(torch.uint16),
    )
    index = torch.arange(len(q) + 1)
    rows = ops.Rows(streams, index * q.shape[1], torch.full((len(q),), q.shape[1]), index[:-1].contiguous())
    words, word_starts, states, _, _ = compact(ops.encode(q.reshape(-1), rows, made), rows)
    byte = (freq.long() - (freq.long() == 256).long()).to(torch.uint8)
    return (*(x.to(device) for x in (words, word_starts, states, streams, byte)), q.shape[1])


def exact_reference(*args: Any) -> tuple:
    """The symbols that were coded."""
    _, word_starts, states, streams, _, _ = args
    q = symbols(CPU, len(streams) == 4).clamp(-15, 15) + 15
    q[0] = 7
    ends = torch.full(states.shape, reference.LOW, device=states.device).to(torch.uint32)
    return q.to(states.device), word_starts.diff(), ends


def _nvcomp(x: Tensor) -> tuple[Any, Any]:
    """nvCOMP's ANS codec, of DietGPU's kind, and x in its hands."""
    if not x.is_cuda:
        raise NotImplementedError("nvcomp runs on CUDA")
    from nvidia import nvcomp  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

    return nvcomp.Codec(algorithm="ANS"), nvcomp.as_array(x)


def _nvcomp_encode(q: Tensor, rows: ops.Rows, t: ops.EncodeTables) -> Any:
    """The same values as bytes."""
    codec, data = _nvcomp(q.to(torch.uint8))
    return codec.encode(data)


@cache
def _nvcomp_coded(device: torch.device, small: bool) -> Any:
    return _nvcomp_encode(values(small)[0].to(device), *encode_args(CPU, small)[1:])


def _nvcomp_decode(*args: Any) -> Any:
    words, rows = args[0], args[5]
    codec, _ = _nvcomp(words)
    return codec.decode(_nvcomp_coded(words.device, len(rows.streams) == 4))


EXAMPLES = [
    Example("rans_encode", encode_args, encode, encode_reference, rivals={"nvcomp ANS": _nvcomp_encode}),
    Example(
        "rans_decode",
        decode_args,
        decode,
        decode_reference,
        # Compressed words and escapes once, values once; tables stay in the caches.
        moved=lambda args, result: 2 * len(args[0]) + 2 * len(args[3]) + 2 * args[6],
        rivals={"nvcomp ANS": _nvcomp_decode},
        coder={"decode_streams": 32 * ops.UNROLL},
    ),
    Example(
        "rans_decode_exact",
        exact_args,
        ops.decode_exact,
        exact_reference,
        coder={"decode_streams": 32 * ops.UNROLL_INT16},
    ),
    Example("rans_encode_lanes", lanes_args, encode_lanes, encode_lanes_reference),
    Example(
        "rans_decode_lanes",
        lanes_words,
        ops.decode_lanes,
        decode_lanes_reference,
        moved=lambda args, result: 2 * len(args[0]) + result[0].numel(),
        rivals={"torch": decode_lanes_reference},
        coder={"decode_lanes": 32 * ops.UNROLL},
    ),
]
