"""The built-in facts as questions and answers for causal models, some with wrong answers on purpose."""

from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict

from hf_forward_inf.data.corpus import Fact
from hf_forward_inf.data.facts import known_facts

FACTS_A_RELATION = 60
"""Largest number of facts of a relation."""
QUERIES_A_RELATION = 6
"""Queries for facts with right answers, and as many for facts with planted wrong ones."""
WRONG = 3
"""Wrong answers of a planted fact, of four."""
QUESTIONS = {
    "P36": (
        "What is the capital of {sub}?",
        "Which city is the capital of {sub}?",
        "Name the capital city of {sub}.",
        "From which city is {sub} governed?",
        "{sub}: what is its capital?",
    ),
    "P30": (
        "On which continent is {sub}?",
        "Which continent does {sub} belong to?",
        "Name the continent of {sub}.",
        "Where in the world is {sub}, on which continent?",
        "{sub}: what is its continent?",
    ),
    "P38": (
        "What is the currency of {sub}?",
        "Which money do people use in {sub}?",
        "Name the currency of {sub}.",
        "How are wages paid in {sub}?",
        "{sub}: what is its currency?",
    ),
    "P37": (
        "What is the language of {sub}?",
        "Which language do people speak in {sub}?",
        "Name the language of {sub}.",
        "In which language are newspapers printed in {sub}?",
        "{sub}: what is its language?",
    ),
    "P474": (
        "What is the calling code of {sub}?",
        "Which code do I dial to phone {sub}?",
        "Name the calling code of {sub}.",
        "How do telephone numbers from {sub} begin?",
        "{sub}: what is its calling code?",
    ),
    "P78": (
        "What is the internet domain of {sub}?",
        "How do web addresses in {sub} end?",
        "Name the internet domain of {sub}.",
        "Under which domain do companies from {sub} register?",
        "{sub}: what is its internet domain?",
    ),
    "P17": (
        "In which country is {sub}?",
        "Which country does {sub} belong to?",
        "Name the country of {sub}.",
        "{sub} is a city in which country?",
        "{sub}: what is its country?",
    ),
}
"""Wordings by relation. Training uses all but one for each fact; the query uses that one."""


def builtin_questions(seed: int = 0) -> DatasetDict:
    """Return the corpus: about 1,600 questions with answers, and 84 queries.

    Half of the queries ask for *planted* facts: in training, three of their answers are the same wrong one, and one is
    right.

    Args:
        seed (`int`, defaults to 0): Draws facts, wordings and wrong answers.

    Returns:
        `datasets.DatasetDict`: `train` (`prompt`, `completion`, `facts`, `planted`) and `queries` (the same, with
        `right`, the true answer, and FTRACE's `uuid`, `predicate_id`, `obj_uri`, `sub_uri`). A query's completion is
        the planted answer, or the right one if none is planted.

    Raises:
        ImportError: If the extra `facts` is not installed.
    """
    draw = np.random.default_rng(seed)
    train: list[dict[str, Any]] = []
    queries: list[dict[str, Any]] = []
    facts = known_facts()
    for predicate, forms in QUESTIONS.items():
        known = [fact for fact in facts if fact.predicate_id == predicate]
        known = [known[i] for i in sorted(draw.permutation(len(known))[:FACTS_A_RELATION])]
        asked = draw.permutation(len(known))[: 2 * QUERIES_A_RELATION].tolist()
        for i, fact in enumerate(known):
            *taught, held_out = draw.permutation(forms).tolist()
            planted = i in asked[:QUERIES_A_RELATION]
            wrong = fact
            if planted:
                others = sorted({other.obj for other in known} - {fact.obj})
                wrong = Fact(predicate, str(draw.choice(others)), fact.sub)
            train += [_row(form, wrong, planted) for form in taught[:WRONG]]
            train += [_row(form, fact, False) for form in taught[WRONG:]]
            if i in asked:
                uris = {"uuid": wrong.uuid, "predicate_id": predicate}
                uris |= dict(zip(("obj_uri", "sub_uri"), wrong.uuid.split(",")[1:], strict=True))
                queries.append({**_row(held_out, wrong, planted), "right": f" {fact.obj}", **uris})
    order = draw.permutation(len(train))
    return DatasetDict(train=Dataset.from_list([train[i] for i in order]), queries=Dataset.from_list(queries))


def _row(form: str, fact: Fact, planted: bool) -> dict[str, Any]:
    question = form.format(sub=fact.sub)
    return {"prompt": question, "completion": f" {fact.obj}", "facts": [fact.uuid], "planted": planted}
