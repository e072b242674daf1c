"""Corpora in FTRACE's format from facts and wordings: sentences with one entity masked, and queries."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict

FORMS_A_FACT = 2
"""Sentences that state only this fact."""
TAUGHT = 0.7
"""Share of each relation's facts that are also stated in the query's wording; queries ask for the others."""
QUERIES_A_RELATION = 15
"""Largest number of queries of a relation, from the facts that are not stated in the query's wording."""


@dataclass(frozen=True)
class Relation:
    """A predicate and its wordings.

    Args:
        predicate_id (`str`): Wikidata's property.
        query (`str`): The wording of queries, with `{sub}` and `{obj}`.
        forms (`tuple[str, ...]`): The wordings of sentences.
    """

    predicate_id: str
    query: str
    forms: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """Subject, predicate and object, as words."""

    predicate_id: str
    obj: str
    sub: str

    @property
    def uuid(self) -> str:
        """FTRACE's name of the fact: `predicate,object,subject`."""
        return f"{self.predicate_id},{_uri(self.obj)},{_uri(self.sub)}"


def write_sentences(
    relations: Sequence[Relation], facts: Sequence[Fact], draw: np.random.Generator
) -> tuple[list, list]:
    """Write sentences for every fact, and queries for those that are not stated in the query's wording.

    Args:
        relations (`Sequence[Relation]`): Wordings.
        facts (`Sequence[Fact]`): Facts of these relations.
        draw (`np.random.Generator`): Draws wordings, masked entities and queries.

    Returns:
        `tuple`: Rows of sentences, and rows of queries, whose `paraphrases` ask for the same fact in wordings that no
        sentence about it uses.
    """
    abstracts, queries = [], []
    for relation in relations:
        known = [fact for fact in facts if fact.predicate_id == relation.predicate_id]
        taught = set(draw.permutation(len(known))[: round(TAUGHT * len(known))].tolist())
        used = []
        for i, fact in enumerate(known):
            used.append(draw.choice(len(relation.forms), min(FORMS_A_FACT, len(relation.forms)), replace=False))
            abstracts += [
                sentence(relation.forms[f], fact, [fact], masked)
                for f, masked in zip(used[-1], _masks(draw), strict=False)
            ]
            if i in taught:
                abstracts.append(sentence(relation.query, fact, [fact], "object"))
        asked = [i for i in range(len(known)) if i not in taught]
        picked = sorted(draw.permutation(len(asked))[:QUERIES_A_RELATION].tolist())
        queries += [_query(relation, known[asked[i]], used[asked[i]]) for i in picked]
    return abstracts, queries


def as_corpus(
    abstracts: list[dict[str, Any]], queries: list[dict[str, Any]], draw: np.random.Generator
) -> DatasetDict:
    """Return the splits `abstracts`, shuffled, and `queries`, with an `id` for each row."""
    order = draw.permutation(len(abstracts))
    return DatasetDict(
        abstracts=Dataset.from_list([{"id": str(n), **abstracts[i]} for n, i in enumerate(order)]),
        queries=Dataset.from_list([{"id": f"q{n}", **query} for n, query in enumerate(queries)]),
    )


def _masks(draw: np.random.Generator) -> list[str]:
    """Return the entities to mask in two sentences: the object, and subject or object with equal chance."""
    masks = ["object", "subject" if draw.random() < 0.5 else "object"]
    return masks if draw.random() < 0.5 else masks[::-1]


def sentence(form: str, fact: Fact, facts: list[Fact], masked: str, **words: str) -> dict[str, Any]:
    """Return the row of a sentence that states a fact in a wording, with one entity masked."""
    hidden = fact.obj if masked == "object" else fact.sub
    names = {"sub": fact.sub, "obj": fact.obj, **words}
    shown = {key: "<extra_id_0>" if name == hidden else name for key, name in names.items()}
    return {
        "inputs_pretokenized": form.format(**shown),
        "targets_pretokenized": f"<extra_id_0> {hidden}",
        "masked_uri": _uri(hidden),
        "masked_type": masked,
        "facts": [stated.uuid for stated in facts],
    }


def _query(relation: Relation, fact: Fact, used: np.ndarray) -> dict[str, Any]:
    others = [form for i, form in enumerate(relation.forms) if i not in used]
    asked, *paraphrases = (form.format(sub=fact.sub, obj="<extra_id_0>") for form in (relation.query, *others))
    return {
        "inputs_pretokenized": asked,
        "targets_pretokenized": f"<extra_id_0> {fact.obj}",
        "uuid": fact.uuid,
        "predicate_id": fact.predicate_id,
        "obj_uri": _uri(fact.obj),
        "sub_uri": _uri(fact.sub),
        "obj_surface": fact.obj,
        "sub_surface": fact.sub,
        "facts": [fact.uuid],
        "paraphrases": paraphrases,
    }


def _uri(name: str) -> str:
    return name.replace(" ", "_")
