import pytest
from datasets import Dataset

from hf_forward_inf.data import load_rows, proponents, template_facts


@pytest.fixture
def folder(tmp_path):
    towns = [("P19", f"Person {i}", f"Town{i % 4}") for i in range(20)] + [("P1", "Nobody", "No")]
    columns = ("predicate_id", "sub_surface", "obj_surface")
    Dataset.from_list([dict(zip(columns, fact, strict=True)) for fact in towns]).to_parquet(tmp_path / "facts.parquet")
    templates = [
        ("P19", "[X] comes from [Y].", "pararel"),
        ("P19", "[X] was born in [Y] .", "lama"),
        ("P19", "[Y] is where [X] was born.", "pararel"),
        ("P19", "[X] is a native of [Y].", "pararel"),
        ("P1", "[X] is [Y].", "lama"),
    ]
    columns = ("predicate_id", "template", "source")
    Dataset.from_list([dict(zip(columns, row, strict=True)) for row in templates]).to_parquet(
        tmp_path / "templates.parquet"
    )
    return tmp_path


def test_queries_ask_in_lamas_words_and_sentences_use_the_others(folder):
    corpus = template_facts(folder)
    assert len(corpus["queries"]) == 6  # 30% of the facts are not told in the query's words
    for query in corpus["queries"]:
        assert query["inputs_pretokenized"] == f"{query['sub_surface']} was born in <extra_id_0>."
        told = [row["inputs_pretokenized"] for row in corpus["abstracts"] if row["facts"] == [query["uuid"]]]
        assert len(told) == 2
        assert not set(told) & set(query["paraphrases"])
        assert len(query["paraphrases"]) == 1  # one wording is left in which it is not told
    assert all(proponents(corpus["queries"], corpus["abstracts"]))
    assert all("P1," not in row["facts"][0] for row in corpus["abstracts"])  # a relation with a single template


def test_a_folder_of_templates_is_loaded_by_its_name(folder):
    assert load_rows(str(folder), "queries")[:] == template_facts(folder)["queries"][:]


def test_missing_files_and_unfit_templates_are_named(folder):
    Dataset.from_list([{"predicate_id": "P2", "template": "[X] [Y]", "source": "lama"}]).to_parquet(
        folder / "templates.parquet"
    )
    with pytest.raises(ValueError, match=r"No relation in .* has both facts and two templates"):
        template_facts(folder)
    (folder / "facts.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"facts\.parquet: a folder of templates"):
        template_facts(folder)


def test_real_templates_make_a_corpus(shared):
    corpus = template_facts(shared / "trex_facts")
    assert len(corpus["abstracts"]) > 40_000
    assert len(corpus["queries"]) > 400
