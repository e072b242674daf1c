import numpy as np
import pytest
from datasets import Dataset

from hf_forward_inf import Attribution
from hf_forward_inf.evaluation.cost import Pace
from hf_forward_inf.evaluation.tables import as_text, average, compare, mrr_after
from hf_forward_inf.evaluation.task import MAIN, Task


def rows(*texts):
    return Dataset.from_dict({"inputs_pretokenized": list(texts), "targets_pretokenized": [""] * len(texts)})


@pytest.fixture
def task():
    queries = rows("a b c d", "e f g h")
    candidates = rows("a b c d", "a x y z", "e f g z", "u v w x")
    return Task(queries, candidates, [[0, 1], [2]], {MAIN: [0, 1], "unanswered": [1]})


def found(task, scores):
    return Attribution(np.array(scores, dtype=np.float32), task.queries, task.candidates)


def test_figures_stand_under_their_methods_and_groups(task):
    table = compare({"forward_inf": found(task, [[4, 3, 2, 1], [4, 3, 2, 1]])}, task)
    ours = table["forward_inf"]
    assert ours["mrr"] == pytest.approx((1 + 1 / 3) / 2)
    assert ours["unanswered/mrr"] == pytest.approx(1 / 3)
    assert ours["worst_hub"] == 1.0
    assert table["random"]["mrr"] == pytest.approx((13 / 18 + 25 / 48) / 2)


def test_proponents_with_little_overlap_are_judged_without_the_others(task):
    table = compare({"forward_inf": found(task, [[4, 1, 2, 3], [1, 1, 9, 1]])}, task)
    # Query 0: row 1 shares one word of four and stands last once row 0, which shares all, is gone.
    assert table["forward_inf"]["low_overlap/queries"] == 1
    assert table["forward_inf"]["low_overlap/mrr"] == pytest.approx(1 / 3)


def test_others_are_paired_with_forward_inf_query_by_query(task):
    both = {"forward_inf": found(task, [[4, 3, 2, 1]] * 2), "other": found(task, [[1, 2, 3, 4]] * 2)}
    other = compare(both, task)["other"]
    behind = np.array([1 - 1 / 3, 1 / 3 - 1 / 2])
    assert other["mrr_behind"] == pytest.approx(behind.mean())
    assert other["mrr_behind_se"] == pytest.approx(behind.std(ddof=1) / 2**0.5)
    assert "mrr_behind" not in compare(both, task)["forward_inf"]


def test_a_query_can_have_candidates_of_its_own(task):
    task.own = [[0, 3], [2, 3]]
    task.proponents = [[0], [2]]
    table = compare({"forward_inf": found(task, [[2, 9, 9, 1], [9, 9, 2, 1]])}, task)
    assert table["forward_inf"]["mrr"] == 1.0
    assert table["random"]["mrr"] == pytest.approx(0.75)


def test_without_the_truth_there_is_no_table(task):
    task.proponents = None
    assert compare({"forward_inf": found(task, [[4, 3, 2, 1]] * 2)}, task) == {}


def test_tables_of_samples_are_averaged():
    tables = [{"bm25": {"mrr": 0.2, "mrr_se": 9.0, "tied": 0.0}}, {"bm25": {"mrr": 0.4, "mrr_se": 9.0, "tied": 1.0}}]
    assert average(tables)["bm25"] == pytest.approx({"mrr": 0.3, "mrr_se": 0.1, "tied": 0.5})
    assert average(tables[:1]) == tables[0:1][0]


def test_candidates_that_time_has_not_reached_rank_last():
    scores, order = np.array([[1.0, 2.0, 3.0, 4.0]]), np.array([[2, 0, 1, 3]])
    pace = Pace(setup=1.0, seconds=5.0)  # a candidate a second, from the second 1 on
    found = mrr_after(np.array([0.5, 2.5, 3.5, 4.5, 5.0]), scores, [[1]], order, pace)
    # Row 1 is inspected at second 4, and then stands behind row 2; at the end row 3 comes before both.
    np.testing.assert_allclose(found, [0, 0, 0, 1 / 2, 1 / 3])


def test_the_table_for_a_terminal_shows_groups_and_costs(task):
    table = compare({"forward_inf": found(task, [[4, 3, 2, 1]] * 2)}, task)
    text = as_text(table, {"forward_inf/forward_passes_alone": 1.5})
    assert "one query" in text
    assert "1.5" in text
    assert "unanswered:" in text
