"""The command `cache`: what is in the cache folder, and removing it."""

import time
from typing import Any

from hf_forward_inf.commands.options import CacheOptions
from hf_forward_inf.utils.cache import KINDS, Entry, cache_limit, entries, prune
from hf_forward_inf.utils.sizes import parse_size, size_text
from hf_forward_inf.utils.storage import default_cache_dir
from hf_forward_inf.utils.text_tables import text_table

CONTENTS = {
    "passes": "losses of candidates",
    "encoded": "tokens and pixels",
    "curvature": "what directions were fitted to",
    "models": "models that recipes have trained",
    "retraining": "losses of retrained models",
}


def cache_run(options: CacheOptions) -> dict[str, Any]:
    """Show the cache, prune it to a size, or clear it.

    Returns:
        `dict`: The folder, and the bytes that are in it and that were removed.

    Raises:
        ValueError: If the size is none.
    """
    folder = default_cache_dir()
    removed = []
    if options.action != "show":
        size = 0 if options.action == "clear" else _size_to_keep(options)
        removed = prune(folder, size)
        freed = size_text(sum(entry.size for entry in removed))
        print(f"{len(removed)} entries removed, {freed}.")
    found = entries(folder)
    if options.action == "show":
        print(f"{folder}\n{_table(found)}\nLimit: {_limit()}")
    return {
        "folder": str(folder), "bytes": sum(entry.size for entry in found),
        "removed_bytes": sum(entry.size for entry in removed),
    }  # fmt: skip


def _size_to_keep(options: CacheOptions) -> int:
    if options.keep is not None:
        return parse_size(options.keep)
    limit = cache_limit()
    if limit is None:
        raise ValueError("The cache has no limit: say how much to keep, such as --keep 10GB.")
    return limit


def _limit() -> str:
    limit = cache_limit()
    return "none" if limit is None else f"{size_text(limit)} (HF_FORWARD_INF_CACHE_LIMIT)"


def _table(found: list[Entry]) -> str:
    """Return number, size and age of the entries of each kind."""
    rows = [["", "entries", "size", "used last"]]
    for kind in KINDS:
        own = [entry for entry in found if entry.kind == kind]
        used = max((entry.used for entry in own), default=0.0)
        if own:
            size = size_text(sum(entry.size for entry in own))
            rows.append([CONTENTS[kind], str(len(own)), size, _age(time.time() - used)])
    rows.append(["all", str(len(found)), size_text(sum(entry.size for entry in found)), ""])
    return text_table(rows)


def _age(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"
