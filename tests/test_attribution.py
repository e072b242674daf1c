from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from datasets import Dataset

from hf_forward_inf import Attribution
from hf_forward_inf.plan import Audit, Part, Plan

QUERIES = Dataset.from_dict({"text": ["q0", "q1"]})
CANDIDATES = Dataset.from_dict({"text": list("abcd"), "score": [0, 0, 0, 0]})
SCORES = np.array([[0.5, 2.0, 0.5, -1.0], [np.nan, 1.0, 3.0, np.nan]], dtype=np.float32)


@pytest.fixture
def found():
    return Attribution(SCORES, QUERIES, CANDIDATES, config={"radius": 1.0})


def test_ties_go_by_row_number_and_rows_without_a_score_stand_last(found):
    assert found.ranking(0).tolist() == [1, 0, 2, 3]
    assert found.ranking(1).tolist() == [2, 1, 0, 3]


def test_top_gives_rows_with_rank_score_and_row_number(found):
    rows = found.top(0, 2).to_list()
    assert rows == [
        {"text": "b", "rank": 1, "score": 2.0, "candidate": 1},
        {"text": "a", "rank": 2, "score": 0.5, "candidate": 0},
    ]


def test_top_leaves_out_rows_without_a_score(found):
    assert found.top(1)["text"][:] == ["c", "b"]


@pytest.mark.parametrize("top_k", [None, 3])
def test_which_scores_were_computed_goes_with_the_candidates_and_comes_back_from_disk(found, tmp_path, top_k):
    stage = np.array([[False, True, False, True], [True, True, True, False]])
    audit = Audit("bm25", drawn=4, above=1, recall=0.7, error=0.1)
    plan = Plan("screen", "asked for", 2, 4, "bm25", 2, 1, (Part("base losses", 1.0, stored=32),), 7, (audit,))
    screened = replace(found, stage=stage, plan=plan)
    screened.keep(top_k).save_to_disk(tmp_path / "saved")
    again = Attribution.load_from_disk(tmp_path / "saved")
    assert again.plan == plan and "base losses: 1 pass" in str(plan) and "1 of 4 random others" in str(plan)
    kept = again.keep(3)
    assert kept.indices.tolist() == [[1, 0, 2], [2, 1, 0]]
    assert kept.stage.tolist() == [[True, False, False], [True, True, True]]
    assert kept.top(0, 2)["stage"][:] == [True, False] and kept.select([1]).stage.tolist() == [[True] * 3]
    assert "stage" not in found.top(0).column_names
    with pytest.raises(ValueError, match="strategy='full'"):
        screened.standardised()
    with pytest.raises(ValueError, match=r"stage has shape \(1, 4\)"):
        replace(found, stage=stage[:1])


def test_a_query_that_is_not_there_is_refused(found):
    with pytest.raises(IndexError, match="no query 2: rows are numbered from 0 to 1"):
        found.top(2)


def test_to_dataset_is_one_table(found):
    table = found.to_dataset(2)
    assert table["query"][:] == [0, 0, 1, 1]
    assert table["candidate"][:] == [1, 0, 2, 1]
    assert table["rank"][:] == [1, 2, 1, 2]


@pytest.mark.parametrize("top_k", [None, 2])
def test_it_comes_back_from_disk(found, tmp_path, top_k):
    kept = found.keep(top_k)
    kept.save_to_disk(tmp_path / "saved")
    again = Attribution.load_from_disk(tmp_path / "saved")
    np.testing.assert_array_equal(again.scores, kept.scores)
    assert (again.indices is None) == (top_k is None)
    used = CANDIDATES if top_k is None else CANDIDATES.select([0, 1, 2])
    assert again.candidates.to_list() == used.to_list()
    assert again.top(0, 2).to_list() == kept.top(0, 2).to_list()
    assert (again.method, again.config) == (kept.method, kept.config)
    assert not list(tmp_path.rglob("*.pkl")) and not list(tmp_path.rglob("*.pt"))


def test_some_queries_can_be_kept(found):
    details = Dataset.from_list([{"query": 0, "candidate": 1}, {"query": 1, "candidate": 2}])
    kept = replace(found.keep(2), details=details).select([1])
    assert kept.queries.to_list() == [{"text": "q1"}] and len(kept) == 1
    assert kept.ranking(0).tolist() == [2, 1] and kept.scores.tolist() == [[3.0, 1.0]]
    assert kept.details.to_list() == [{"query": 0, "candidate": 2}]
    assert found.select([1, 0]).top(1)[:] == found.top(0)[:]


def test_a_folder_of_a_newer_version_is_refused(found, tmp_path):
    found.save_to_disk(tmp_path)
    about = tmp_path / "attribution.json"
    about.write_text(about.read_text().replace('"format": 2', '"format": 99'))
    with pytest.raises(ValueError, match="newer hf_forward_inf"):
        Attribution.load_from_disk(tmp_path)


def test_kept_scores_are_evaluated_as_all_are_where_they_were_kept(found):
    assert found.keep(2).evaluate([[0], [2]], ks=(1,))["mrr"] == pytest.approx((1 / 2 + 1) / 2)
    assert found.evaluate([[0], [2]], ks=(1,))["mrr"] == pytest.approx((1 / 2.5 + 1) / 2)  # tied with row 2


def test_wrong_numbers_are_refused(found):
    with pytest.raises(ValueError, match="top_k=0 must be at least 1"):
        found.keep(0)
    with pytest.raises(ValueError, match="Only the best 2 candidates were kept"):
        found.keep(2).keep(3)
    with pytest.raises(ValueError, match="proponents has 1 entries for 2 queries"):
        found.evaluate([[0]])
    with pytest.raises(ValueError, match=r"scores have shape \(1, 4\)"):
        Attribution(SCORES[:1], QUERIES, CANDIDATES)


def test_it_shows_its_best_rows_and_a_verdict(found):
    lines = repr(found.keep(3)).splitlines()
    assert lines[0] == "Attribution(forward_inf: 2 queries x 4 candidates, top 3)"
    assert lines[1].startswith("0. q0") and "Only 4 training rows have a score" in lines[2]
    assert lines[3].split() == ["1.", "2", "row", "1:", "b"]


def test_one_query_or_some_are_taken_out_and_iterated_over(found):
    assert found[1].queries["text"][:] == ["q1"] and found[-1].top(0)["text"][:] == ["c", "b"]
    assert len(found[:1]) == 1 and [one.queries[0]["text"] for one in found] == ["q0", "q1"]
    with pytest.raises(IndexError, match="no query 2"):
        found[2]


def test_a_data_frame_begins_with_rank_and_score(found):
    frame = found.to_pandas(2)
    assert frame.columns.tolist() == ["rank", "score", "level", "query", "candidate", "text"]
    assert frame["text"].tolist() == ["b", "a", "c", "b"] and frame["query"].tolist() == [0, 0, 1, 1]


def test_rows_to_remove_are_those_of_all_queries_once(found):
    assert found.rows_to_remove(2) == [0, 1, 2]
    assert found.rows_to_remove(1) == [1, 2]


def test_only_rows_that_are_referred_to_are_saved_and_keep_their_numbers(tmp_path):
    rows = Dataset.from_dict({"text": [f"row {i}" for i in range(300)]})
    scores = np.zeros((2, 300), np.float32)
    scores[0, [250, 7]], scores[1, [299, 7]] = [5, 4], [3, 2]
    found = Attribution(scores, QUERIES, rows).keep(2)
    found.save_to_disk(tmp_path)
    again = Attribution.load_from_disk(tmp_path)
    assert again.candidates["text"][:] == ["row 7", "row 250", "row 299"] and again.total == 300
    assert again.top(0)["candidate"][:] == [250, 7] and again.top(1)["text"][:] == ["row 299", "row 7"]
    assert again.rows_to_remove() == [7, 250, 299]
    assert again.evaluate([[250], [7]], ks=(1,))["mrr"] == 0.75
    assert again.verdict(0) == found.verdict(0) and again.backgrounds == found.backgrounds


def test_fewer_than_one_candidate_is_refused(found):
    with pytest.raises(ValueError, match="k=-1 must be at least 1"):
        found.top(0, -1)


def test_kept_candidates_are_not_standardised_over_queries(found):
    # Column j holds the j-th best of each query: other candidates for other queries.
    with pytest.raises(ValueError, match="standardise before keeping them"):
        found.keep(2).standardised()


def test_saving_over_another_attribution_leaves_none_of_its_details(found, tmp_path):
    details = Dataset.from_dict({"query": [0], "candidate": [1], "terms": [["b"]], "term_scores": [[2.0]]})
    replace(found, details=details).save_to_disk(tmp_path)
    assert Attribution.load_from_disk(tmp_path).details is not None
    found.save_to_disk(tmp_path)
    assert Attribution.load_from_disk(tmp_path).details is None


def test_a_complete_run_that_a_kill_left_unplaced_is_loaded(found, tmp_path):
    found.save_to_disk(tmp_path / ".complete" / "attribution")
    again = Attribution.load_from_disk(tmp_path / "attribution")
    np.testing.assert_array_equal(again.scores, found.scores)
    assert [path.name for path in tmp_path.iterdir()] == ["attribution"]


def test_it_can_be_loaded_while_another_process_saves_it(found, tmp_path):
    found.save_to_disk(tmp_path / "saved")
    with ThreadPoolExecutor() as pool:
        saving = pool.submit(lambda: [found.save_to_disk(tmp_path / "saved") for _ in range(8)])
        for _ in range(8):
            np.testing.assert_array_equal(Attribution.load_from_disk(tmp_path / "saved").scores, found.scores)
        saving.result()
