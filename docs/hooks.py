"""What mkdocs is to do besides: docstrings name other objects in brackets, which are no links on these pages."""

import re
from typing import Any

NAMED = re.compile(r"\[(<code>[^<]+</code>)\]")


def on_page_content(html: str, **_: Any) -> str:
    """Return a page's HTML with the brackets around names left out."""
    return NAMED.sub(r"\1", html)
