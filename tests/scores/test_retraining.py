import numpy as np
import pytest
from experiments.retrainable import digits, hard_and_random, small_digits
from scipy import stats
from sklearn.datasets import load_digits

from hf_forward_inf.scores.retraining import (
    Retrained,
    agreement,
    all_but_one,
    lds,
    lds_by_query,
    random_subsets,
    retrained_outcomes,
    rises_without_best,
    without_best,
)
from tests.helpers import digits as small

SUBSETS = random_subsets(30, 4)


def test_an_interrupted_run_goes_on_with_the_next_models(cache):
    calls = []

    def train(subsets, seeds):
        calls.append(seeds.tolist())
        if len(calls) == 3:
            raise KeyboardInterrupt
        return np.stack([subsets.argmax(axis=1), seeds], axis=1).astype(np.float32)

    with pytest.raises(KeyboardInterrupt):
        retrained_outcomes(train, SUBSETS, key="a", seeds=2, together=3)
    found = retrained_outcomes(train, SUBSETS, key="a", seeds=2, together=3)
    assert calls == [[0, 0, 0], [0, 1, 1], [1, 1], [1, 1]]
    np.testing.assert_array_equal(found[:, :, 0], [SUBSETS.argmax(axis=1)] * 2)
    np.testing.assert_array_equal(found[:, :, 1], [[0] * 4, [1] * 4])


def test_halves_are_halves_and_repeatable():
    assert (SUBSETS.sum(axis=1) == 15).all()
    np.testing.assert_array_equal(SUBSETS, random_subsets(30, 4))


def test_subsets_lack_the_share_that_is_dropped():
    assert (random_subsets(200, 5, drop=0.01).sum(axis=1) == 198).all()
    for drop in (0.001, 0.999):
        with pytest.raises(ValueError, match="give a share that leaves some out"):
            random_subsets(200, 5, drop=drop)


def test_the_lds_without_single_candidates_is_the_correlation_of_scores_and_rises():
    draw = np.random.default_rng(0)
    scores, rises, rows = draw.normal(size=(3, 12)), draw.normal(size=(5, 3)), [1, 4, 6, 7, 11]
    subsets = all_but_one(12, rows)
    assert [np.flatnonzero(~subset).tolist() for subset in subsets] == [[row] for row in rows]
    expected = [stats.spearmanr(scores[i, rows], rises[:, i]).statistic for i in range(3)]
    assert lds(scores, subsets, 7 + rises)["lds"] == pytest.approx(np.mean(expected))


def test_the_best_candidates_of_each_query_are_left_out():
    scores = np.array([[0.1, 0.9, np.nan, 0.5], [3.0, 1.0, 2.0, np.nan]])
    np.testing.assert_array_equal(without_best(scores, 2), [[1, 0, 1, 0], [0, 1, 0, 1]])


def test_the_rise_without_the_best_is_that_of_the_querys_own_training():
    effects = np.array([[5.0, 1, 0, 2], [0, 3, 7, 1]])  # how much each candidate lowers each query's loss

    def trained(subsets):
        return 10 - subsets @ effects.T

    np.testing.assert_allclose(rises_without_best(trained, effects, 2), [7, 10])
    np.testing.assert_allclose(rises_without_best(trained, -effects, 1), [0, 0])


def test_losses_that_fit_no_subsets_are_refused():
    with pytest.raises(ValueError, match=r"4 subsets and 5 queries need \(4, 5\)"):
        Retrained(small.rows(30, 35), SUBSETS, np.zeros((5, 4)))


def test_queries_are_the_hardest_and_random_others_and_never_meet():
    losses = np.array([5.0, 1, 9, 2, 8, 3, 7, 4, 6, 0])
    judged, others = hard_and_random(losses, 4)
    assert judged[:2].tolist() == [2, 4]
    assert others[:2].tolist() == [6, 8]
    assert len({*judged, *others}) == 8


def test_the_digits_are_scikit_learns_pixel_for_pixel_and_look_like_their_pictures():
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    rows = small_digits()
    np.testing.assert_array_equal(rows["x"][:], pixels[order] / 16)
    np.testing.assert_array_equal(rows["label"][:], labels[order])
    seen = np.stack([np.asarray(image, dtype=float).ravel() / 255 for image in rows["image"]])
    np.testing.assert_allclose(seen, rows["x"][:], atol=1 / 255)


@pytest.mark.parametrize(("network", "size"), [("perceptron", 1810), ("conv", 1898)])
def test_the_networks_of_the_digits(network, size):
    task = digits(network, candidates=40, queries=4, steps=2)
    assert sum(p.numel() for p in task.adapter(0).model.parameters()) == size
    assert (len(task.candidates), len(task.queries), len(task.others)) == (40, 4, 4)
    assert task.key != digits(network, candidates=40, queries=4, steps=3).key
    with pytest.raises(ValueError, match="don't fit into 1797 digits"):
        digits(network, candidates=1797)


def test_lds_by_hand():
    # Four subsets of two of four candidates; sums 3, 2, 1, 0 by the first query's scores, 2, 1, 3, 0 by the second's.
    subsets = np.array([[1, 1, 0, 0], [1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 1, 1]], dtype=bool)
    scores = np.array([[2.0, 1.0, 0.0, 0.0], [0.0, 2.0, 1.0, -1.0]])
    losses = np.array([[0.1, 0.1], [0.2, 0.2], [0.3, 0.3], [0.9, 0.9]])
    # The first foretells the order fully. Ranks of the second's sums 2, 1, 3, 0 against 1, 2, 3, 4 of the losses:
    # 2, 3, 1, 4, squared differences 1 + 1 + 4 + 0 = 6, rho = 1 - 6 x 6 / (4 x 15) = .4
    np.testing.assert_allclose(lds_by_query(scores, subsets, losses), [1.0, 0.4])
    figures = lds(scores, subsets, losses)
    assert figures["lds"] == pytest.approx(0.7)
    assert figures["lds_se"] == pytest.approx(0.3)
    assert (figures["lds_low"], figures["lds_high"]) == (pytest.approx(0.4), pytest.approx(1.0))


def test_lds_asks_for_ranks_only_and_a_missing_score_counts_nothing():
    draw = np.random.default_rng(0)
    subsets = np.stack([draw.permutation(20) < 10 for _ in range(30)])
    scores, losses = draw.normal(size=(3, 20)), draw.normal(size=(30, 3))
    expected = lds_by_query(scores, subsets, losses)
    np.testing.assert_allclose(lds_by_query(5 * scores + 7, subsets, np.exp(losses)), expected)
    np.testing.assert_allclose(
        expected, [stats.spearmanr(subsets @ row, -loss).statistic for row, loss in zip(scores, losses.T, strict=True)]
    )
    scores[1] = np.nan
    assert lds_by_query(scores, subsets, losses)[1] == 0


def test_lds_of_shapes_that_do_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(3, 5\).*don't match"):
        lds(np.zeros((2, 4)), np.zeros((3, 5), dtype=bool), np.zeros((3, 2)))


def test_a_loss_that_is_not_finite_has_no_rank():
    with pytest.raises(ValueError, match="NaN has no rank"):
        lds(np.ones((1, 2)), np.eye(2, dtype=bool), np.array([[0.5], [np.nan]]))


def test_seeds_agree_as_far_as_their_losses_rank_the_subsets_alike():
    losses = np.random.default_rng(0).normal(size=(3, 9, 2))
    expected = [
        stats.spearmanr(losses[a, :, query], losses[b, :, query]).statistic
        for a, b in [(0, 1), (0, 2), (1, 2)]
        for query in range(2)
    ]
    assert agreement(losses) == pytest.approx(np.mean(expected))
    assert agreement(np.stack([losses[0], 3 * losses[0] + 1])) == pytest.approx(1)
