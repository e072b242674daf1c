"""Corrections of the pages that are made from docstrings in Hugging Face form."""

import re
from typing import Any

NAMED = re.compile(r"\[(<code>[^<]+</code>)\]")
"""Another object, in brackets, which are no link here."""
TYPE = re.compile(r"<code>(`[^<]*|\*optional\*)</code>(, default:)?")
"""A parameter's type, with Markdown's marks and its default, which is shown once more."""
DEFAULT = re.compile(r"(, )?(defaults to .*|\*optional\*)$")


def on_page_content(html: str, **_: Any) -> str:
    """Return a page's HTML with plain names and types."""
    return TYPE.sub(_plain, NAMED.sub(r"\1", html))


def _plain(found: re.Match[str]) -> str:
    kind = DEFAULT.sub("", found[1]).replace("`", "")
    shown = f"<code>{kind}</code>" if kind else ""
    return f"{shown}{found[2] or ''}" if shown else (found[2] or "").removeprefix(", ")
