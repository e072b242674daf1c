"""T5's sentinels: `<extra_id_0>` stands in the input where the target fills in."""

import re

SENTINEL = re.compile(r"<extra_id_\d+>")


def fill_in(inputs: str, target: str) -> str:
    """Put the target's spans in the places of their sentinels.

    Example:

        >>> fill_in("The capital of France is <extra_id_0>.", "<extra_id_0> Paris")
        'The capital of France is Paris.'
    """
    spans = dict(zip(SENTINEL.findall(target), (s.strip() for s in SENTINEL.split(target)[1:]), strict=True))
    if not spans:
        return f"{inputs} {target}".strip()
    return SENTINEL.sub(lambda match: spans.get(match.group(), match.group()), inputs)


def without_sentinels(target: str) -> str:
    """Give a target's plain words: "<extra_id_0> New York" is "New York"."""
    return " ".join(SENTINEL.sub(" ", target).split())
