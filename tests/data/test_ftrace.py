import json

import pytest
from datasets import Dataset, DatasetDict

from hf_forward_inf.data import load_rows, proponents
from hf_forward_inf.data.ftrace import fact_lists, word_overlap
from hf_forward_inf.evaluation.candidate_sets import candidate_pool, own_candidates
from hf_forward_inf.utils.rows import sample_rows


@pytest.fixture
def hub_layout(tmp_path, corpus):
    """A dataset's folder as the hub holds it: a card with two configurations, parquet files."""
    folder = tmp_path / "ftrace"
    for role in ("abstracts", "queries"):
        (folder / role).mkdir(parents=True)
        corpus[role].to_parquet(folder / role / "train-00000-of-00001.parquet")
    configs = [
        f"- config_name: {role}\n  data_files:\n  - split: train\n    path: {role}/train-*\n"
        for role in ("abstracts", "queries")
    ]
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(configs) + "---\n# FTRACE\n")
    return folder


def test_a_hub_layout_gives_the_configuration_of_the_role(hub_layout, corpus):
    assert load_rows(str(hub_layout), "abstracts").to_list() == corpus["abstracts"].to_list()
    assert load_rows(str(hub_layout), "queries").to_list() == corpus["queries"].to_list()


def test_a_configuration_can_be_named(hub_layout, corpus):
    assert len(load_rows(f"{hub_layout}:queries", "abstracts")) == len(corpus["queries"])


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv"])
def test_single_files_are_read(tmp_path, candidates, ending):
    path = tmp_path / f"rows.{ending}"
    write = {"parquet": candidates.to_parquet, "jsonl": candidates.to_json, "csv": candidates.to_csv}[ending]
    write(path)
    assert load_rows(str(path), "abstracts")["inputs_pretokenized"][:] == candidates["inputs_pretokenized"][:]


def test_saved_folders_are_read(tmp_path, corpus, candidates):
    candidates.save_to_disk(tmp_path / "one")
    DatasetDict(train=candidates, test=candidates.select([0])).save_to_disk(tmp_path / "splits")
    corpus.save_to_disk(tmp_path / "unclear")
    assert len(load_rows(str(tmp_path / "one"), "abstracts")) == len(candidates)
    assert len(load_rows(str(tmp_path / "splits"), "abstracts")) == len(candidates)
    with pytest.raises(ValueError, match="has the splits abstracts, queries, and none is called train"):
        load_rows(str(tmp_path / "unclear"), "abstracts")


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        load_rows(str(tmp_path / "nothing.parquet"), "queries")
    (tmp_path / "rows.xlsx").write_text("")
    with pytest.raises(ValueError, match="has an unknown ending"):
        load_rows(str(tmp_path / "rows.xlsx"), "queries")


ROWS = Dataset.from_list(
    [
        {"facts": "P1,o,s;P2,p,s", "masked_uri": "o", "targets_pretokenized": "o", "inputs_pretokenized": "s P1"},
        {"facts": "P1,o,s", "masked_uri": "s", "targets_pretokenized": "s", "inputs_pretokenized": "P1 o"},
        {"facts": "P1,o,t", "masked_uri": "o", "targets_pretokenized": "o", "inputs_pretokenized": "t P1"},
        {"facts": "", "masked_uri": "x", "targets_pretokenized": "x", "inputs_pretokenized": "nothing of it"},
    ]
)
QUERIES = Dataset.from_list(
    [
        {
            "predicate_id": "P1",
            "obj_uri": "o",
            "sub_uri": "s",
            "targets_pretokenized": "o",
            "inputs_pretokenized": "s",
        },
        {
            "predicate_id": "P9",
            "obj_uri": "o",
            "sub_uri": "s",
            "targets_pretokenized": "o",
            "inputs_pretokenized": "s",
        },
    ]
)


def test_proponents_state_the_fact_whichever_entity_is_masked():
    assert proponents(QUERIES, ROWS) == [[0, 1], []]


def test_strict_proponents_have_the_object_masked():
    assert proponents(QUERIES, ROWS, strict=True) == [[0], []]


def test_facts_may_be_lists_as_well_as_text():
    lists = ROWS.remove_columns("facts").add_column("facts", [text.split(";") for text in ROWS["facts"]])
    assert fact_lists(lists) == fact_lists(ROWS)
    assert proponents(QUERIES, lists) == [[0, 1], []]


def test_missing_columns_are_named():
    with pytest.raises(ValueError, match="have no column `facts`"):
        proponents(QUERIES, ROWS.remove_columns("facts"))
    with pytest.raises(ValueError, match="no column `obj_uri`"):
        proponents(QUERIES.remove_columns("obj_uri"), ROWS)


def test_a_pool_holds_all_proponents_and_the_nearest_distractors(corpus):
    queries = corpus["queries"].select(range(5))
    pool, counts = candidate_pool(queries, corpus["abstracts"], 200)
    assert len(pool) == 200 == sum(counts.values())
    everywhere = proponents(queries, corpus["abstracts"])
    ids = [[corpus["abstracts"][row]["id"] for row in rows] for rows in everywhere]
    assert [[pool[row]["id"] for row in rows] for rows in proponents(queries, pool)] == ids
    assert counts["proponents"] == len({i for rows in ids for i in rows})
    room = 200 - counts["proponents"]
    assert counts["bm25"] == round(200 - room + room * 250 / 450) - counts["proponents"]
    assert counts["same_target"] <= room * 100 / 450
    assert counts["random"] >= room * 100 / 450  # it takes the room that rows with the same target leave


def test_a_pool_is_filled_with_random_rows_at_last(corpus):
    _, counts = candidate_pool(corpus["queries"].select([0]), corpus["abstracts"], 2500)
    assert counts["bm25"] <= 250
    assert counts["random"] > 0


def test_a_pool_too_small_for_the_proponents_is_refused(corpus):
    with pytest.raises(ValueError, match="294 proponents, more than num_candidates=10"):
        candidate_pool(corpus["queries"], corpus["abstracts"], 10)


def test_samples_keep_their_order(corpus):
    ids = [int(i[1:]) for i in sample_rows(corpus["queries"], 20)["id"]]
    assert len(ids) == 20
    assert ids == sorted(ids)
    assert json.dumps(ids) == json.dumps([int(i[1:]) for i in sample_rows(corpus["queries"], 20)["id"]])
    assert len(sample_rows(corpus["queries"], 10**6)) == len(corpus["queries"])


def test_every_query_has_candidates_of_its_own(corpus):
    queries, abstracts = corpus["queries"].select(range(0, 60, 20)), corpus["abstracts"]
    union, own = own_candidates(queries, abstracts, size=20)
    truth = proponents(queries, union)
    for i, rows in enumerate(own):
        assert rows == sorted(set(rows))
        assert set(truth[i]) <= set(rows)
        assert 20 < len(rows) <= 60 + len(truth[i])
        texts = [union[row]["inputs_pretokenized"] + union[row]["targets_pretokenized"] for row in rows]
        assert len(set(texts)) == len(texts)
    assert sorted(set().union(*own)) == list(range(len(union)))


def test_word_overlap_is_the_share_of_the_querys_words():
    assert word_overlap("The capital of France is Paris.", "Paris is a capital city.") == 0.5
    assert word_overlap("", "Paris") == 0
