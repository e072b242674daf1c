"""The result in a terminal: what the model said, and the training examples behind it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hf_forward_inf.attribution import Attribution
from hf_forward_inf.report.lines import Line, classes_of, lines
from hf_forward_inf.report.texts import shortened
from hf_forward_inf.utils.processes import process_state

BEST = 3
"""Candidates shown of each query."""
QUERIES = 10
"""Queries shown; the page has all."""
SHARE = 0.3
"""Tokens with this share of the highest token's score matter."""
LONGEST = 300
"""Characters of a query's input that are shown."""
LEAST = 4
"""Letters of a word that counts as shared."""
KNOWN = ("rank", "score", "candidate", "level")
"""Columns of the best candidates that are shown, where they are known."""
WIDTH = 120
"""Width of what is printed where there is no terminal."""


def answers(found: Attribution, k: int = BEST) -> list[dict[str, Any]]:
    """Return the best candidates of each query with their texts, as JSON can hold them.

    Args:
        found (`Attribution`): The result.
        k (`int`, defaults to 3): Candidates of each query.

    Returns:
        `list[dict]`: For each query `query` (row number), `asked`, `said`, and `best`: `rank`, `score`, `candidate`
        (row number), `text` and `matters`, the parts of the text that matter: the tokens with the highest scores where
        they were computed, else the words that it shares with the query.
    """
    details = {(row["query"], row["candidate"]): row for row in found.details or []}
    queries = lines(found.queries, classes_of(found.candidates))
    return [_answer(found, i, query, details, k) for i, query in enumerate(queries)]


def _answer(found: Attribution, i: int, query: Line, details: Mapping[tuple[int, int], Any], k: int) -> dict[str, Any]:
    best = []
    for line in lines(found.top(i, k)):
        detail: Mapping[str, Any] = details.get((i, line.row["candidate"])) or {}
        matters = _hottest(detail, line.text) if "term_scores" in detail else _shared(line.text, query)
        own = {name: line.row[name] for name in KNOWN if name in line.row}
        best.append(own | {"text": line.text, "matters": matters})
    return {"query": i, "asked": query.asked, "said": query.said, "verdict": found.verdict(i), "best": best}


def _hottest(detail: Mapping[str, Any], text: str) -> list[str]:
    """Return the words with the tokens of the highest scores, as far as they are in the text that is shown."""
    least, hot, end = SHARE * max(detail["term_scores"], default=0.0), set(), 0
    for term, score in zip(detail["terms"], detail["term_scores"], strict=False):
        if score >= least > 0:
            hot |= set(range(end, end + len(term)))
        end += len(term)
    words = re.finditer(r"\w+|[^\w\s]+", "".join(detail["terms"]))
    found = (match.group() for match in words if hot & set(range(*match.span())))
    return [word for word in dict.fromkeys(found) if word in text]


def _shared(text: str, query: Line) -> list[str]:
    """Return the words that a text shares with a query, the short ones left out."""
    asked = {word.lower() for word in _words(f"{query.asked} {query.said}")}
    return list(dict.fromkeys(word for word in _words(text) if word.lower() in asked))


def _words(text: str) -> Iterator[str]:
    return (word for word in re.findall(r"\w+", text) if len(word) >= LEAST)


def show(shown: Sequence[Mapping[str, Any]], page: str) -> None:
    """Print the answers and where the page is, on the main process: in colours on a terminal, else as plain text.

    Args:
        shown (`list[dict]`): What [`answers`] returns.
        page (`str`): The file of the page.
    """
    if not process_state().is_main_process:
        return
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    with console.capture() as printed:
        for one in shown[:QUERIES]:
            _print(console, one)
        if len(shown) > QUERIES:
            console.print(f"\n... and {len(shown) - QUERIES} more queries.")
        console.print(f"\nThe page: {page}", soft_wrap=True)
    print("\n".join(line.rstrip() for line in printed.get().splitlines()), flush=True)


def _print(console: Any, shown: Mapping[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    title = Text(f"\n{shown['query'] + 1}. ", style="bold")
    title.append(shortened(shown["asked"], LONGEST), style="not bold")
    console.print(title)
    if shown["said"]:
        console.print(Text("   → ").append(shortened(shown["said"], LONGEST), style="bold green"))
    console.print(Text(f"   {shown['verdict']}", style="italic"))
    table = Table(box=None, padding=(0, 1, 0, 1), header_style="dim")
    leveled = any(row.get("level") for row in shown["best"])
    for name, width in (("rank", 4), ("score", 6), ("row", 6), *([("level", 6)] if leveled else [])):
        table.add_column(name, justify="right", min_width=width, no_wrap=True)
    table.add_column("training example", no_wrap=True, overflow="ellipsis")
    room = console.width - 36
    for row in shown["best"]:
        text = _marked(row["text"], row["matters"], room)
        level = [row.get("level") or ""] if leveled else []
        table.add_row(str(row["rank"]), f"{row['score']:.3g}", str(row["candidate"]), *level, text)
    console.print(table if shown["best"] else "   No candidate has a score.")


def _marked(text: str, matters: Sequence[str], room: int) -> Any:
    """Return a text of one line around what matters most, that in bold."""
    from rich.text import Text

    line, first = _line(text), min((at for one in matters if (at := _line(text).find(one)) >= 0), default=0)
    if len(line) > room and first > room // 2:
        line = "… " + line[first - room // 4 :].partition(" ")[2]
    marked = Text(line)
    for one in matters:
        edge = r"\b" if one[0].isalnum() and len(one) >= LEAST else ""
        marked.highlight_regex(edge + re.escape(one), "bold magenta")
    return marked


def _line(text: str) -> str:
    return " ".join(text.split())
