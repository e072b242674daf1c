"""What was computed last, kept in memory for the next call of this process."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")
_known: ContextVar[dict[tuple[str, int], tuple[Any, Any]] | None] = ContextVar("_known", default=None)


@contextmanager
def unchanged() -> Iterator[None]:
    """Within a `with`, take it that no object changes: [`once`] computes once what depends on one."""
    token = _known.set(_known.get() or {})
    try:
        yield
    finally:
        _known.reset(token)


def once(name: str, thing: Any, compute: Callable[[], Value]) -> Value:
    """Return what is computed from an object: within [`unchanged`] it is computed once for each name and object."""
    known = _known.get()
    if known is None:
        return compute()
    if (name, id(thing)) not in known:
        known[name, id(thing)] = thing, compute()  # which holds the object, so that no other has its id
    return known[name, id(thing)][1]


class Memory(Generic[Value]):
    """The values of the keys that were used last.

    Args:
        size (`int`, defaults to 4): Number of values.
    """

    def __init__(self, size: int = 4):
        self.size, self.values = size, OrderedDict[str, Value]()

    def get(self, key: str, compute: Callable[[], Value]) -> Value:
        """Return the value of a key, which says all that it depends on; compute it where it is not known."""
        value = self.values.pop(key) if key in self.values else compute()
        self.values[key] = value
        while len(self.values) > self.size:
            self.values.popitem(last=False)
        return value
