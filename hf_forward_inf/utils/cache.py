"""The size of the cache: what is in it, what was used last, and the limit that it is kept under."""

import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from hf_forward_inf.utils.sizes import parse_size, size_text

KINDS = {
    "passes": "passes/*/*",  # of one model on some candidates, one for each query
    "encoded": "encoded/*",
    "curvature": "curvature/*",
    "models": "models/*",
    "retraining": "retraining/*",
}
"""What the cache holds, and where. Nothing else in the cache folder is ever removed."""
VARIABLE = "HF_FORWARD_INF_CACHE_LIMIT"
LIMIT = "20GB"
"""Default of the environment variable that holds the limit."""
RECENT = 3600
"""Seconds for which nothing is removed to meet the limit: a run may be using it."""
_checked: set[Path] = set()


class Entry(NamedTuple):
    """A file of the cache, or a folder such as that of a trained model.

    Args:
        kind (`str`): One of [`KINDS`].
        path (`Path`): The file or folder.
        size (`int`): Bytes.
        used (`float`): When it was used last, in seconds since the epoch.
    """

    kind: str
    path: Path
    size: int
    used: float


def entries(folder: Path) -> list[Entry]:
    """Return what is in the cache, used longest ago first."""
    found = []
    for kind, path in ((kind, path) for kind, pattern in KINDS.items() for path in sorted(folder.glob(pattern))):
        with suppress(FileNotFoundError):  # another process has removed it
            stats = [file.stat() for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
            used = max((max(one.st_atime, one.st_mtime) for one in stats), default=path.stat().st_mtime)
            found.append(Entry(kind, path, sum(_on_disk(one) for one in stats), used))
    return sorted(found, key=lambda entry: entry.used)


def _on_disk(stats: os.stat_result) -> int:
    """Return the bytes that a file takes: a file with holes takes less than its size."""
    return min(stats.st_size, getattr(stats, "st_blocks", sys.maxsize) * 512)


def mark_used(path: Path) -> None:
    """Record that a file is used now: file systems need not record it themselves."""
    with suppress(OSError):  # a cache that can't be written to can be read
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))


def prune(folder: Path, keep: int, before: float | None = None) -> list[Entry]:
    """Remove what was used longest ago until the cache is no larger than `keep`, and return what was removed.

    Args:
        folder (`Path`): The cache folder.
        keep (`int`): Bytes.
        before (`float`, *optional*): Leave what was used later, in seconds since the epoch.
    """
    found = entries(folder)
    removed = list(_beyond(found, sum(entry.size for entry in found) - keep, before))
    for entry in removed:
        if entry.path.is_dir():
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            entry.path.unlink(missing_ok=True)
    return removed


def _beyond(found: Sequence[Entry], excess: int, before: float | None) -> Iterator[Entry]:
    for entry in found:
        if excess <= 0 or (before is not None and entry.used > before):
            return
        excess -= entry.size
        yield entry


def enforce_limit(folder: Path) -> None:
    """Bring the cache under its limit, once in a process, and warn if something was removed.

    Raises:
        ValueError: If `HF_FORWARD_INF_CACHE_LIMIT` is no size.
    """
    if folder in _checked:
        return
    _checked.add(folder)
    limit = cache_limit()
    removed = [] if limit is None else prune(folder, limit, time.time() - RECENT)
    if removed:
        warnings.warn(
            f"The cache {folder} was larger than {VARIABLE}={os.environ.get(VARIABLE, LIMIT)}: the "
            f"{size_text(sum(entry.size for entry in removed))} that were used longest ago are removed.",
            stacklevel=2,
        )


def cache_limit() -> int | None:
    """Return the limit in bytes: `HF_FORWARD_INF_CACHE_LIMIT`, by default 20GB; `None` if it is `none`."""
    said = os.environ.get(VARIABLE, LIMIT)
    if said.lower() == "none":
        return None
    try:
        return parse_size(said)
    except ValueError as error:
        raise ValueError(f"{VARIABLE}: {error}") from error
