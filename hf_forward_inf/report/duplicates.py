"""Rows that say nearly the same, shown once."""

import re

ALIKE = 0.8
"""Two texts are nearly the same if they share this much of their triples of words."""


def stacked(texts: list[str]) -> list[list[int]]:
    """Return the positions of texts in groups of nearly equal ones, each led by its first; empty texts stay alone."""
    shingles = [_triples(text) for text in texts]
    groups: list[list[int]] = []
    for i, mine in enumerate(shingles):
        group = next((group for group in groups if mine and _alike(mine, shingles[group[0]])), None)
        if group is None:
            groups.append([i])
        else:
            group.append(i)
    return groups


def _triples(text: str) -> frozenset[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    return frozenset(tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))) if words else frozenset()


def _alike(one: frozenset[tuple[str, ...]], other: frozenset[tuple[str, ...]]) -> bool:
    return len(one & other) >= ALIKE * len(one | other) > 0
