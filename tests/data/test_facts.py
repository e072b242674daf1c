import sys

import pytest

from hf_forward_inf.data import builtin_facts, proponents
from hf_forward_inf.data.facts import RELATIONS
from hf_forward_inf.utils.rows import fill_in


def test_the_corpus_is_the_same_every_time(corpus):
    again = builtin_facts()
    assert again["abstracts"].to_list() == corpus["abstracts"].to_list()
    assert again["queries"].to_list() == corpus["queries"].to_list()


def test_facts_are_true(corpus):
    facts = {fact for facts in corpus["abstracts"]["facts"] for fact in facts}
    known = {
        "P36,Paris,France", "P30,Africa,Kenya", "P38,Yen,Japan", "P37,Polish,Poland", "P474,+55,Brazil",
        "P78,.de,Germany", "P17,China,Shanghai",
    }  # fmt: skip
    assert known <= facts


def test_there_is_enough_of_it(corpus):
    assert len(corpus["abstracts"]) > 2000
    assert len(corpus["queries"]) >= 100
    assert set(corpus["queries"]["predicate_id"]) == {relation.predicate_id for relation in RELATIONS}


def test_every_query_has_proponents_that_use_other_words(corpus):
    truth = proponents(corpus["queries"], corpus["abstracts"])
    filled = [fill_in(row["inputs_pretokenized"], row["targets_pretokenized"]) for row in corpus["abstracts"]]
    for query, rows in zip(corpus["queries"], truth, strict=True):
        assert len(rows) >= 2
        assert fill_in(query["inputs_pretokenized"], query["targets_pretokenized"]) not in [
            filled[row] for row in rows
        ]


def test_one_entity_of_a_stated_fact_is_masked(corpus):
    for row in corpus["abstracts"]:
        assert row["inputs_pretokenized"].count("<extra_id_0>") == 1
        place = 1 if row["masked_type"] == "object" else 2
        assert row["masked_uri"] in [fact.split(",")[place] for fact in row["facts"]]
        assert row["targets_pretokenized"] == f"<extra_id_0> {row['masked_uri'].replace('_', ' ')}"


def test_distractors_are_hard(corpus):
    """For each query: the same subject elsewhere, the query's own words with another subject, the same object."""
    truth = proponents(corpus["queries"], corpus["abstracts"])
    rows = corpus["abstracts"].to_list()
    relations = {relation.predicate_id: relation for relation in RELATIONS}
    for query, known in zip(corpus["queries"], truth, strict=True):
        others = [row for i, row in enumerate(rows) if i not in known]
        if query["predicate_id"] != "P17":
            assert any(f",{query['sub_uri']}" in fact for row in others for fact in row["facts"])
        head = relations[query["predicate_id"]].query.split("{sub}")[0]
        assert sum(row["inputs_pretokenized"].startswith(head) for row in others) > 20


def test_without_the_packages_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycountry", None)
    with pytest.raises(ImportError, match=r"pip install 'hf-forward-inf\[facts\]'"):
        builtin_facts()
