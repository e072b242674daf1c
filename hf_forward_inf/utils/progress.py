"""One progress bar for a whole run: how many queries or rows are done, what is being done, and how long it takes.

A part of the work opens a bar of its own only where no bar is open; else it is named behind the one that is.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from datasets import are_progress_bars_disabled
from tqdm.auto import tqdm

from hf_forward_inf.utils.processes import process_state

T = TypeVar("T")
Advance = Callable[[int], None]
"""Takes the number of units that were done."""
DELAY = 1.0
"""Seconds before a bar is shown: what is done by then needs none."""
KNOWN = "{desc}: {percentage:3.0f}%|{bar}| {n:,.0f}/{total:,.0f} {unit} [{elapsed}<{remaining}]"
UNKNOWN = "{desc}: {n:,.0f} {unit} [{elapsed}]"


class _Bar:
    """The bar that is open.

    Args:
        title (`str`): What is done.
        total (`int`, *optional*): Number of units, where it is known.
        unit (`str`): What is counted, in the plural.
        done (`int`): Units that an earlier run has done.
    """

    def __init__(self, title: str, total: int | None, unit: str, done: int):
        self.title, self.share = title, 0.0
        hidden = are_progress_bars_disabled() or not process_state().is_main_process
        self.bar = tqdm(
            desc=title, total=total, unit=unit, initial=done, delay=DELAY, disable=hidden, dynamic_ncols=True,
            bar_format=UNKNOWN if total is None else KNOWN,
        )  # fmt: skip

    def advance(self, count: float) -> None:
        """Count units as done, no more than there are."""
        left = count if self.bar.total is None else self.bar.total - self.bar.n
        self.bar.update(min(count, left))

    def name(self, part: str) -> None:
        """Say what is being done now."""
        self.bar.set_description_str(f"{self.title} ({part})" if part else self.title, refresh=False)
        self.bar.update(0)


_open: list[_Bar] = []


@contextmanager
def progress(title: str, total: int | None, unit: str, done: int = 0) -> Iterator[Advance]:
    """Show the progress of some work, by a bar where none is open.

    Args:
        title (`str`): What is done, such as `"tracing"`.
        total (`int`, *optional*): Number of units, where it is known.
        unit (`str`): What is counted, in the plural: `"queries"`, `"rows"`.
        done (`int`, defaults to 0): Units that an earlier run has done.

    Yields:
        `Callable`: Takes the number of further units that are done.
    """
    if _open:
        with _part(_open[-1], title, total, unit) as advance:
            yield advance
        return
    bar = _Bar(title, total, unit, done)
    _open.append(bar)
    try:
        yield bar.advance
    finally:
        _open.pop()
        bar.name("")
        bar.bar.close()


def clear() -> None:
    """Clear the line of the open bar, which is drawn again as it advances: a message is printed there."""
    for bar in _open:
        bar.bar.clear()


@contextmanager
def _part(bar: _Bar, title: str, total: int | None, unit: str) -> Iterator[Advance]:
    """Name a part behind the open bar, which it advances by its share ([`counting`])."""
    done, share = 0, bar.share

    def advance(count: int) -> None:
        nonlocal done
        done += count
        bar.name(f"{title}, {done:,} {unit}" if total is None else f"{title}, {done:,}/{total:,} {unit}")
        if total:
            bar.advance(share * count / total)

    advance(0)
    try:
        yield advance
    finally:
        bar.name("")


@contextmanager
def counting(units: int, parts: int = 1) -> Iterator[None]:
    """Count some units of the open bar as done at the end, and before that as far as the parts within are.

    Args:
        units (`int`): Number of units, such as the queries of a block.
        parts (`int`, defaults to 1): Number of parts within.
    """
    if not _open:
        yield
        return
    bar = _open[-1]
    before, bar.share = bar.bar.n, units / parts
    try:
        yield
        bar.advance(before + units - bar.bar.n)  # what is cached is not counted by its part
    finally:
        bar.share = 0.0


def shown(
    values: Iterable[T], title: str, total: int, unit: str, count: Callable[[T], int] = lambda value: 1
) -> Iterator[T]:
    """Return values one by one, and show how many units are done: one for each, or as `count` says."""
    with progress(title, total, unit) as advance:
        for value in values:
            yield value
            advance(count(value))
