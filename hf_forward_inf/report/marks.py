"""Marks in a text: the answer, tokens by their share of the score, and words that it shares with the query."""

import re
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from hf_forward_inf.report.texts import TEMPLATE, Piece
from hf_forward_inf.utils.rows import SENTINEL

SHARES = (0.1, 0.25, 0.5, 0.75)
"""Shares of the highest token's score at which the next mark begins."""
WORD = re.compile(r"\w+(?:['’-]\w+)*")
FILLERS = """
about after all also and any are because been before being but can could did does for from had has have her his how
into its just like may more most not now off one only other our out over own said same she should some such than that
the their them then there these they this those through too under until very was were what when where which while who
whom whose why will with would you your
"""
COMMON = frozenset(FILLERS.split())
"""English words that mean nothing when two texts share them."""


class Span(NamedTuple):
    """A stretch of text with the same marks.

    Args:
        text (`str`): The text.
        answer (`bool`): Whether the model learns to say it.
        heat (`int`): From 0 to 4: its token's share of the score.
        shared (`bool`): Whether it is a word of the query's.
        score (`float`, *optional*): The token's score.
    """

    text: str
    answer: bool
    heat: int
    shared: bool
    score: float | None


class Heat:
    """Scores of a row's tokens, to be found again in its texts.

    Args:
        detail (`dict`, *optional*): A row of `Attribution.details`. Without it there is no heat.
        highest (`float`, *optional*): The score of the hottest token of all rows of the query. Defaults to this row's.
    """

    def __init__(self, detail: Mapping[str, Any] | None, highest: float | None = None):
        pairs = [] if detail is None else list(zip(detail["terms"], detail["term_scores"], strict=True))
        self.terms = [(_bare(text), float(score)) for text, score in pairs]
        own = max((abs(score) for text, score in self.terms if text.strip()), default=0.0)
        self.highest = own if highest is None else highest
        self.is_lost = bool(self.terms)  # until some of the tokens are found in a text
        self.characters = [(one, i) for i, (text, _) in enumerate(self.terms) for one in text if not one.isspace()]
        self.joined = "".join(one for one, _ in self.characters)

    def tokens_of(self, text: str) -> list[int | None]:
        """Return the number of the token that each character of a text belongs to; `None` if it isn't found."""
        places = [place for place, one in enumerate(text) if not one.isspace()]
        start = self.joined.rfind("".join(text[place] for place in places)) if places else -1
        found: list[int | None] = [None] * len(text)
        if start >= 0:
            self.is_lost = False
            for offset, place in enumerate(places):
                found[place] = self.characters[start + offset][1]
        return found

    def level(self, token: int | None) -> int:
        """Return how hot a token is, from 0 to 4."""
        if token is None or not self.highest:
            return 0
        return sum(self.terms[token][1] / self.highest >= share for share in SHARES)

    def spans(self) -> list[Span]:
        """Return the tokens themselves, for texts in which they aren't found."""
        return [Span(text, False, self.level(i), False, score) for i, (text, score) in enumerate(self.terms) if text]


def _bare(token: str) -> str:
    """Return a token without what templates and sentinels write."""
    return TEMPLATE.sub("", SENTINEL.sub("", token))


def words(text: str) -> set[str]:
    """Return the words of a text that mean something when another text has them, too."""
    found = {word.casefold() for word in WORD.findall(text)}
    return {word for word in found - COMMON if len(word) > 2 or word.isdigit()}


def marked(pieces: Sequence[Piece], heat: Heat, shared: Collection[str] = ()) -> list[Span]:
    """Return a text in spans.

    Args:
        pieces (`list[Piece]`): The text.
        heat (`Heat`): Scores of its tokens.
        shared (`set[str]`, defaults to none): Words to mark ([`words`]).
    """
    text = "".join(piece.text for piece in pieces)
    answers = [piece.answer for piece in pieces for _ in piece.text]
    common = [False] * len(text)
    for word in WORD.finditer(text) if shared else ():
        if word.group().casefold() in shared:
            common[word.start() : word.end()] = [True] * len(word.group())
    tokens = heat.tokens_of(text)
    if all(token is None for token in tokens):  # the target alone has scores
        tokens = [token for piece in pieces for token in _alone(piece, heat)]

    def marks(i: int) -> tuple[bool, bool, int]:
        token = tokens[i]
        return answers[i], common[i], token if token is not None and heat.level(token) else -1

    found = []
    for (answer, shared_word, token), places in groupby(range(len(text)), key=marks):
        score = heat.terms[token][1] if token >= 0 else None
        level = heat.level(token) if token >= 0 else 0
        found.append(Span("".join(text[i] for i in places), answer, level, shared_word, score))
    return found


def _alone(piece: Piece, heat: Heat) -> list[int | None]:
    return heat.tokens_of(piece.text) if piece.answer else [None] * len(piece.text)


def cut(spans: list[Span], length: int) -> tuple[list[Span], list[Span]]:
    """Split a long text after so many characters, at a space; a text that is hardly longer stays whole."""
    total = sum(len(span.text) for span in spans)
    if total <= length * 1.3:
        return spans, []
    first: list[Span] = []
    for i, span in enumerate(spans):
        left = length - sum(len(one.text) for one in first)
        if len(span.text) >= left:
            space = span.text.rfind(" ", 0, left) + 1 or left
            head, tail = span._replace(text=span.text[:space]), span._replace(text=span.text[space:])
            return [*first, head], [one for one in (tail, *spans[i + 1 :]) if one.text]
        first.append(span)
    return first, []
