import numpy as np
import pytest
import torch
from experiments.retrainable import digits, hard_and_random, small_digits
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import nn

from hf_forward_inf.scores.metrics import lds
from hf_forward_inf.scores.retraining import (
    BatchedTraining,
    Retrained,
    all_but_one,
    random_subsets,
    retrained_outcomes,
    rises_without_best,
    without_best,
)
from tests.helpers import digits as small

SUBSETS = random_subsets(30, 4)


def training(steps=20):
    data, queries = (small.rows(*cut).with_format("torch")[:] for cut in ((0, 30), (30, 35)))
    pairs = [(rows["x"], rows["label"]) for rows in (data, queries)]
    return BatchedTraining(lambda: nn.Linear(64, 10), *pairs, steps=steps)


def test_networks_trained_together_are_those_trained_alone():
    train = training()
    found = train(SUBSETS, np.array([0, 0, 1, 1]))
    for subset, seed, losses in zip(SUBSETS, (0, 0, 1, 1), found, strict=True):
        model = train.model(seed, subset)
        with torch.no_grad():
            alone = nn.functional.cross_entropy(model(train.queries[0]), train.queries[1], reduction="none")
        np.testing.assert_allclose(losses, alone, rtol=1e-3)


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
    expected = [spearmanr(scores[i, rows], rises[:, i]).statistic for i in range(3)]
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


def test_steps_over_batches_are_those_of_plain_sgd():
    rows = small.rows(0, 30)
    data = torch.tensor(rows["x"][:]), torch.tensor(rows["label"][:])
    training = BatchedTraining(
        lambda: nn.Linear(64, 10), data, data, steps=5, learning_rate=0.1, momentum=0.9, batch_size=8
    )
    subset = np.arange(30) % 5 > 0
    found = training.model(3, subset)
    torch.manual_seed(3)
    plain, own, draw = nn.Linear(64, 10), np.flatnonzero(subset), np.random.default_rng(3)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    order = []
    for _ in range(5):
        if not order:
            order = own[draw.permutation(24)].reshape(3, 8).tolist()
        batch = order.pop(0)
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(data[0][batch]), data[1][batch]).backward()
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(found.weight, plain.weight)
