"""rANS in plain torch, symbol by symbol of each lane (Giesen, arXiv 1402.3392); for tests."""

import torch
from torch import Tensor

LOW, ESCAPE = 1 << 16, 255
MISSING, MISSING_BYTE = -32768, -128
"""What a decoded escape reads before its value is filled in, and its low byte in a look-up table; never a value."""


def encode_lane_reference(symbols: list[int], freq: list[int], cum: list[int], bits: int) -> tuple[list[int], int]:
    """(words in decoding order, final state) of one lane's symbols under one table."""
    x, words = LOW, []
    for s in reversed(symbols):
        if (x >> (32 - bits)) >= freq[s]:
            words.append(x & 0xFFFF)
            x >>= 16
        x = (x // freq[s] << bits) + x % freq[s] + cum[s]
    return words[::-1], x


def encode_lanes_reference(
    symbols: Tensor, ids: Tensor, freq: Tensor, cum: Tensor, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `ops.encode_lanes`: (words of all channels, where each channel's start [C + 1], states [C])."""
    words, starts, states = [], [0], []
    for c in range(symbols.shape[1]):
        table = int(ids[c])
        out, x = encode_lane_reference(symbols[:, c].tolist(), freq[table].tolist(), cum[table].tolist(), bits)
        words += out
        starts.append(len(words))
        states.append(x)
    unsigned = torch.tensor(states, dtype=torch.int64).to(torch.uint32)
    return torch.tensor(words, dtype=torch.int64).to(torch.uint16), torch.tensor(starts), unsigned


def decode_lanes_reference(
    words: Tensor, starts: Tensor, states: Tensor, ids: Tensor, lut: Tensor, bits: int, tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """As `ops.decode_lanes`: (symbols [T, C], words used [C], states at the end [C])."""
    table, x = lut.to(torch.int64)[ids], states.to(torch.int64)
    flat, used = words.to(torch.int64), torch.zeros(len(ids), dtype=torch.int64)
    out = torch.empty(tokens, len(ids), dtype=torch.uint8)
    for t in range(tokens):
        entry = table.gather(1, (x & ((1 << bits) - 1))[:, None])[:, 0]
        out[t] = (entry & 255).to(torch.uint8)
        x = ((entry >> 20) + 1) * (x >> bits) + ((entry >> 8) & 4095)
        need = x < LOW
        at = starts[:-1] + used
        inside = need & (at < starts[1:])
        word = torch.where(inside, flat[torch.where(inside, at, 0)] if len(flat) else 0, 0)
        x = torch.where(need, (x << 16) | word, x)
        used += need
    return out, used, x.to(torch.uint32)


def decode_streams_reference(
    words: Tensor, word_starts: Tensor, states: Tensor, rows: tuple, lut: Tensor, widths: Tensor, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(symbols at the places that `rows` (streams, starts, lengths, ids) give them, words used, states at the end)."""
    streams, starts, lengths, ids = rows
    out, used, ends = torch.zeros(int(starts[-1]), dtype=torch.uint8), [], []
    for s in range(len(streams) - 1):
        mine = words[int(word_starts[s]) : int(word_starts[s + 1])].to(torch.int64)
        x, at = states[s].to(torch.int64), 0
        for row in range(int(streams[s]), int(streams[s + 1])):
            table, width = int(ids[row]), int(widths[int(ids[row])])
            steps = -(-int(lengths[row]) // width)
            for first in range(0, steps, 32):
                n = min(32, steps - first)
                entry = lut[table].to(torch.int64)[x[:n] & ((1 << bits) - 1)]
                place = int(starts[row]) + first
                out[place : place + n] = (entry & 255).to(torch.uint8)
                y = ((entry >> 20) + 1) * (x[:n] >> bits) + ((entry >> 8) & 4095)
                need = (y < LOW).nonzero()[:, 0]
                given = torch.zeros(len(need), dtype=torch.int64)
                left = mine[at : at + len(need)]
                given[: len(left)] = left
                y[need] = (y[need] << 16) | given
                x[:n], at = y, at + len(need)
        used.append(at)
        ends.append(x)
    return out, torch.tensor(used, dtype=torch.int64), torch.stack(ends).to(torch.uint32)
