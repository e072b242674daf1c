"""Numbers of bytes, as people read and write them: in powers of 1,000."""

import re

MB, GB = 10**6, 10**9
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": MB, "GB": GB, "TB": 10**12}


def parse_size(text: str) -> int:
    """Return a size such as `10GB` in bytes.

    Raises:
        ValueError: If it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?B?)\s*", text.upper())
    if match is None:
        raise ValueError(f"{text!r} is no size: give one such as 500MB or 10GB.")
    unit = match[2] if match[2].endswith("B") or not match[2] else f"{match[2]}B"
    return int(float(match[1]) * UNITS[unit])


def size_text(size: float) -> str:
    """Return a number of bytes for people: `1.5 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
