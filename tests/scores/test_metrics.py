import itertools

import numpy as np
import pytest
from scipy import stats

from hf_forward_inf.scores.metrics import (
    average_precision,
    collapse,
    detection,
    distinct,
    evaluate,
    hits_at_k,
    precision_at_k,
    random_figures,
    random_reciprocal_rank,
    recall_at_k,
    reciprocal_rank,
    spearman,
    worst_hub,
)

SCORES = np.array([0.9, 0.1, 0.5, 0.5, 0.5, np.nan], dtype=np.float32)


def by_enumeration(scores, measure):
    """Average over all orders that the scores allow."""
    orders = [
        order
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]
    return np.mean([measure(order) for order in orders])


def test_reciprocal_rank_without_ties():
    assert reciprocal_rank(SCORES, [0]) == 1
    assert reciprocal_rank(SCORES, [1]) == pytest.approx(1 / 5)
    assert reciprocal_rank(SCORES, [1, 0]) == 1


def test_a_tied_proponent_stands_at_its_expected_rank():
    # One above; three share ranks 2 to 4: expected rank 3 for one proponent, 2 + 2/3 for the first of two.
    assert reciprocal_rank(SCORES, [2]) == pytest.approx(1 / 3)
    assert reciprocal_rank(SCORES, [2, 4]) == pytest.approx(1 / (1 + 4 / 3))


def test_no_proponent_or_none_with_a_score_gives_zero():
    assert reciprocal_rank(SCORES, []) == 0
    assert reciprocal_rank(SCORES, [5]) == 0
    assert hits_at_k(SCORES, [5], 6) == 0


@pytest.mark.parametrize("proponents", [[0], [2], [0, 3], [2, 4], [1, 2, 3], [5, 0], [5], [1, 5], [0, 1, 2, 3, 4, 5]])
def test_average_precision_is_the_expectation_over_ties(proponents):
    def precision(order):
        ranks = [rank for rank, row in enumerate(order, 1) if row in proponents]
        return np.mean([found / rank for found, rank in enumerate(ranks, 1)])

    last = np.nan_to_num(SCORES, nan=-1.0)  # no score: the last rank
    assert average_precision(SCORES, proponents) == pytest.approx(by_enumeration(last, precision))


def test_average_precision_without_ties_is_scikit_learns():
    ranking = pytest.importorskip("sklearn.metrics")
    scores = np.random.default_rng(0).standard_normal(200)
    proponents = [3, 50, 51, 120]
    expected = ranking.average_precision_score(np.isin(np.arange(200), proponents), scores)
    assert average_precision(scores, proponents) == pytest.approx(expected)
    assert average_precision(scores, []) == 0


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("proponents", [[2], [0, 3], [2, 4], [1, 2, 3]])
def test_hits_are_the_expectation_over_ties(k, proponents):
    scores = SCORES[:5]
    expected = by_enumeration(scores, lambda order: len(set(order[:k]) & set(proponents)))
    assert hits_at_k(scores, proponents, k) == pytest.approx(expected)
    assert precision_at_k(scores, proponents, k) == pytest.approx(expected / k)
    assert recall_at_k(scores, proponents, k) == pytest.approx(expected / len(proponents))


def test_recall_of_nothing_is_zero():
    assert recall_at_k(SCORES, [], 3) == 0


@pytest.mark.parametrize(("candidates", "proponents"), [(5, 1), (6, 2), (4, 4)])
def test_a_random_order_is_the_average_of_all_orders(candidates, proponents):
    ranks = [min(places) for places in itertools.combinations(range(1, candidates + 1), proponents)]
    assert random_reciprocal_rank(candidates, proponents) == pytest.approx(np.mean([1 / rank for rank in ranks]))


def test_random_figures():
    figures = random_figures(100, [2, 4])
    assert figures["precision@5"] == pytest.approx(0.03)
    assert figures["recall@25"] == pytest.approx(0.25)


def test_equal_sentences_are_merged_with_their_highest_score():
    merged, truth = collapse(SCORES[None], [[2, 3]], ["a", "b", "b", "c", "c", "d"])
    np.testing.assert_array_equal(merged, np.array([[0.9, 0.5, 0.5, np.nan]], dtype=np.float32))
    assert truth == [[1, 2]]


def test_evaluate_averages_over_queries():
    scores = np.array([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    figures = evaluate(scores, [[0], [1, 2]])
    assert figures["mrr"] == pytest.approx(0.75)
    assert figures["mrr_se"] == pytest.approx(0.25)
    assert figures["precision@1"] == pytest.approx(0.5)
    assert figures["recall@3"] == 1
    assert figures["mrr_low"] <= 0.75 <= figures["mrr_high"]
    assert "recall@5" not in figures  # there are only 3 candidates
    assert figures["tied"] == 0


def test_the_share_of_ties_is_told():
    assert evaluate(np.array([[1.0, 1.0, 0.0], [1.0, 0.5, 0.0]]), [[0], [0]])["tied"] == 0.5


def test_proponents_must_fit_the_queries():
    with pytest.raises(ValueError, match="2 lists of proponents for 1 queries"):
        evaluate(np.zeros((1, 3)), [[0], [1]])


def test_distinct_is_the_share_of_different_candidates_among_the_best():
    scores = np.array([[3.0, 2.0, 1.0, 0.0], [0.0, 3.0, 2.0, 1.0], [3.0, 2.0, 1.0, 0.0]])
    assert distinct(scores, k=1) == pytest.approx(2 / 3)
    assert distinct(scores, k=2) == pytest.approx(3 / 6)


def test_the_worst_hub_is_the_candidate_in_most_top_lists():
    scores = np.array([[3.0, 2.0, 1.0], [3.0, 1.0, 2.0], [1.0, 3.0, np.nan]])
    assert worst_hub(scores, k=1) == pytest.approx(2 / 3)
    assert worst_hub(scores, k=2) == pytest.approx(1.0)


def test_ties_share_their_mean_rank():
    a, b = np.array([3.0, 1.0, 1.0, 2.0, 1.0]), np.array([1.0, 0.0, 2.0, 2.0, 5.0])
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)


def test_detection_counts_what_is_found_among_the_first():
    scores, wrong = np.array([9.0, 8, 7, np.nan, 5, 4, 3, 2, 1, 0]), np.zeros(10, dtype=bool)
    wrong[[0, 2, 3]] = True
    found = detection(scores, wrong, share=0.2)
    assert found["detected_at_20_percent"] == pytest.approx(1 / 3)
    assert found["ceiling_at_20_percent"] == pytest.approx(2 / 3)
    assert found["precision_at_20_percent"] == 0.5
    pairs = [(a > b) + (a == b) / 2 for a in (9, 7, -1) for b in (8, 5, 4, 3, 2, 1, 0)]
    assert found["auc"] == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("row", [-1, 3])
def test_a_proponent_that_is_no_candidate_is_refused(row):
    with pytest.raises(ValueError, match=f"Query 1 has proponent {row}, which is not a row of the 3 candidates"):
        evaluate(np.zeros((2, 3)), [[0], [2, row]])


def test_nan_has_no_rank():
    with pytest.raises(ValueError, match="NaN has no rank"):
        spearman(np.array([1.0, np.nan]), np.array([1.0, 2.0]))


def test_queries_without_proponents_are_left_out():
    scores = np.array([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0]])
    assert evaluate(scores, [[1], []]) == evaluate(scores[:1], [[1]])
    with pytest.raises(ValueError, match="No query has a proponent"):
        evaluate(scores, [[], []])
