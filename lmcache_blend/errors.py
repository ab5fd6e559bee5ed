"""Errors: one base, one child per cause, each also the builtin that a caller would catch.

Messages name the value, the limit and the remedy, in one line.
"""

import difflib
from collections.abc import Iterable

MOST_CHARACTERS = 1000
"""Of a message: the value that it names may be anything that somebody sent."""


class LMCacheBlendError(Exception):
    """Base of every error that this package raises on purpose."""

    def __str__(self) -> str:
        text = str(self.args[0]) if self.args else type(self).__name__
        return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..."


class ConfigError(LMCacheBlendError, ValueError):
    """A setting or an argument is outside what it may be."""


class UnknownNameError(LMCacheBlendError, KeyError):
    """A policy, task, codec, tier or model of that name is not registered."""

    def __init__(self, kind: str, name: str, known: Iterable[str]):
        known = sorted(known)
        super().__init__(f"unknown {kind} {name!r:.100}: {nearest(name[:100], known)}")
        self.kind, self.name, self.known = kind, name, known


class DuplicateNameError(LMCacheBlendError, ValueError):
    """Two different objects want the same name in one registry."""


class SegmentError(LMCacheBlendError, ValueError):
    """Spans overlap, are out of order or lie outside the prompt."""


class ContextLengthError(LMCacheBlendError, ValueError):
    """A prompt is longer than the model's positions."""


class UnsupportedModelError(LMCacheBlendError, ValueError):
    """The model failed one of the gates, so blending it would serve wrong KV."""


class ModelNotFoundError(LMCacheBlendError, FileNotFoundError):
    """No hub, path or package holds the model."""


class DataError(LMCacheBlendError, ValueError):
    """A data file is broken: the message names the file and the line."""


class ResultsError(LMCacheBlendError, OSError):
    """Results could not be read or written; what was written before is intact."""


class CorruptChunkError(LMCacheBlendError, ValueError):
    """Stored bytes do not decode to the chunk that they claim to be."""


class ForeignChunkError(CorruptChunkError):
    """A chunk is coded by a codec, or with a profile, that this process does not have; others may."""


class ChunkLostError(LMCacheBlendError, OSError):
    """A chunk whose layers were on their way will not come in full; the prompt is computed without it."""

    def __init__(self, key: bytes, reason: str):
        super().__init__(f"chunk {key.hex()[:16]}: {reason}")
        self.key = key


class TierError(LMCacheBlendError, OSError):
    """A tier that an administrator asked about does not answer."""


class ServingError(LMCacheBlendError, ConnectionError):
    """A server does not answer, or not as the OpenAI API says."""


class KernelError(LMCacheBlendError, RuntimeError):
    """A kernel breaks a rule of the compile gate, or its result differs from its reference."""


def nearest(name: str, known: Iterable[str]) -> str:
    """One phrase that helps with a misspelt name: the nearest known one, or the whole list."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return (f"did you mean {close[0]!r}? " if close else "") + f"known: {', '.join(known)}"
