"""The result in a terminal: what the model said, and the training examples behind it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Image

from hf_forward_inf.attribution import Attribution
from hf_forward_inf.report.rows import named
from hf_forward_inf.report.summary import readable
from hf_forward_inf.report.texts import BLANK, answer, is_language, plain, question, shortened
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
IMAGE, FILE = "image", "_file"
"""Column of pictures, and the name under which their files go."""
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
    return [_answer(found, i, query, details, k) for i, query in enumerate(_with_file_names(found.queries))]


def _answer(
    found: Attribution, i: int, query: Mapping[str, Any], details: Mapping[tuple[int, int], Any], k: int
) -> dict[str, Any]:
    classes = next((one for one in found.candidates.features.values() if isinstance(one, ClassLabel)), None)
    asked, said = _asked_and_said(query, found.queries, classes)
    best = []
    top = found.top(i, k)
    for row in _with_file_names(top):
        text = _joined(*_asked_and_said(row, top, classes), row)
        detail: Mapping[str, Any] = details.get((i, row["candidate"])) or {}
        matters = _hottest(detail, text) if "term_scores" in detail else _shared(text, f"{asked} {said}")
        own = {name: row[name] for name in KNOWN if name in row}
        best.append(own | {"text": text, "matters": matters})
    return {"query": i, "asked": asked, "said": said, "verdict": found.verdict(i), "best": best}


def _with_file_names(rows: Dataset) -> list[dict[str, Any]]:
    """Return rows with the names of pictures' files in the place of the pictures, which a terminal doesn't show."""
    names = [""] * len(rows)
    if isinstance(rows.features.get(IMAGE), Image):
        files = rows.select_columns([IMAGE]).cast_column(IMAGE, Image(decode=False))
        names = [Path((row[IMAGE] or {}).get("path") or "").name for row in files]
    return [{**readable(rows, i), FILE: file} for i, file in enumerate(names)]


def _asked_and_said(row: Mapping[str, Any], rows: Dataset, classes: ClassLabel | None) -> tuple[str, str]:
    """Return what a row asks and what the model says to it: of a picture its file, of a class its name."""
    file, own = row[FILE], {name: value for name, value in row.items() if name != FILE}
    label = next((name for name in ("label", "labels") if name in own), None)
    if label is None or is_language(own):
        asked, said = question(own), answer(own)
    else:
        kind = rows.features[label] if isinstance(rows.features[label], ClassLabel) else classes
        asked, said = plain(own), named(own, {label: kind}, label)
    return f"{file} {asked}".strip(), said


def _joined(asked: str, said: str, row: Mapping[str, Any]) -> str:
    """Return both as one text: what is said in its place, or after an arrow."""
    if BLANK in asked:
        return plain(row)
    return f"{asked} → {said.strip()}" if asked and said else asked or said


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


def _shared(text: str, query: str) -> list[str]:
    """Return the words that a text shares with a query, the short ones left out."""
    asked = {word.lower() for word in _words(query)}
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
