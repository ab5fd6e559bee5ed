"""The seam between the run loop and what runs the model."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from lmcache_blend.eval.measure import Item
from lmcache_blend.eval.results import SampleResult


class Backend(Protocol):
    """What measures samples. burst: so many are measured together. versions: complete after start()."""

    tokenizer: Any
    max_tokens: int
    fingerprint: str
    burst: int
    versions: dict[str, str | int]

    def start(self, items: Sequence[Item], combinations: Sequence[Any]) -> None:
        """Get ready for these samples and run every method uncounted."""
        ...

    def measure(
        self, items: Sequence[Item], combinations: Sequence[Any], say: Callable[[str], Any]
    ) -> Iterator[tuple[Any, Item, SampleResult]]:
        """Each sample under each of the loop's combinations; say() takes what is being done."""
        ...

    def close(self) -> None: ...
