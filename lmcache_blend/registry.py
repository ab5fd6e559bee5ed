"""One registry for everything that third parties may add: policies, codecs, tiers and tasks.

A package adds its own by decorating a class (`@policies.register("mine")`) or, without being imported first, by
an entry point in the group `lmcache_blend.<kind>` (e.g. `[project.entry-points."lmcache_blend.policies"]`).
"""

from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from lmcache_blend.errors import ConfigError, DuplicateNameError, UnknownNameError

T = TypeVar("T")
S = TypeVar("S")


class Registry(Generic[T]):
    """Names to classes (or factories) of one kind; entry points are read at the first look-up.

    >>> colours = Registry("colour", "lmcache_blend.colours")
    >>> colours.register("red")(dict) is dict
    True
    >>> colours.names()
    ['red']
    """

    def __init__(self, kind: str, group: str):
        self.kind, self.group = kind, group
        self._items: dict[str, T] = {}
        self._broken: dict[str, str] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[S], S]:
        """Decorator that files an object under `name`.

        Raises DuplicateNameError where another object has that name. The same class defined again (a notebook cell
        run twice) replaces itself.
        """

        def add(item: S) -> S:
            old = self._items.get(name)
            if old is not None and old is not item and _identity(old) != _identity(item):
                raise DuplicateNameError(
                    f"{self.kind} {name!r} is already registered by {_identity(old)}; choose another name"
                )
            self._items[name] = item  # pyright: ignore[reportArgumentType]  # the decorator keeps the class's own type
            return item

        return add

    def get(self, name: str) -> T:
        """The object of that name.

        Raises UnknownNameError with the nearest known name; ConfigError where an entry point of it cannot be loaded.
        """
        self._load()
        try:
            return self._items[name]
        except KeyError:
            if name in self._broken:
                raise ConfigError(f"{self.kind} {name!r}: {self._broken[name]}") from None
            raise UnknownNameError(self.kind, name, self._items) from None

    def names(self) -> list[str]:
        self._load()
        return sorted(self._items)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._items

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        for point in entry_points(group=self.group):
            if point.name not in self._items:
                try:
                    self.register(point.name)(point.load())
                except Exception as error:  # of whoever wrote it; the others are of use without
                    self._broken[point.name] = f"{point.value} cannot be loaded: {type(error).__name__}: {error}"


def _identity(item: object) -> str:
    return f"{getattr(item, '__module__', '?')}.{getattr(item, '__qualname__', repr(item))}"
