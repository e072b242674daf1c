import numpy as np
import pytest

from hf_forward_inf.tracing.audit import Scored, audit_of, failed


def queries(finds, seed=0, count=60, candidates=1000, keep=60, drawn=30):
    """A screen that keeps each of the best candidates with a probability, by random scores; and its true recall."""
    generator = np.random.default_rng(seed)
    found, recalls = [], []
    for _ in range(count):
        scores = generator.standard_normal(candidates)
        order = np.argsort(-scores)
        chosen = order[:200][generator.random(200) < finds]
        rest = np.setdiff1d(order, chosen)
        kept = np.concatenate([chosen, generator.permutation(rest)])[:keep]
        others = np.setdiff1d(np.arange(candidates), kept)
        some = generator.choice(others, drawn, replace=False)
        found.append(Scored(kept, scores[kept], some, scores[some], len(others)))
        recalls.append(np.isin(order[:10], kept).mean())
    return found, np.mean(recalls)


@pytest.mark.parametrize("finds", [0.05, 0.5, 0.8, 1.0])
def test_the_estimate_is_near_the_true_recall(finds):
    differences = []
    for seed in range(8):
        found, recall = queries(finds, seed)
        differences.append(audit_of("screen", found).recall - recall)
    assert np.abs(differences).mean() < 0.15


def test_a_random_screen_fails_and_a_good_one_does_not():
    assert failed(audit_of("random", queries(0.0, count=8)[0]))
    assert not failed(audit_of("good", queries(0.9, count=8)[0]))


def test_a_single_query_says_little():
    one = queries(0.9, count=1)[0]
    assert audit_of("screen", one).error > 0.1
    assert not failed(audit_of("screen", one))


def test_nothing_is_said_where_nothing_was_drawn_or_a_query_has_no_scores():
    kept, scores = np.arange(3), np.array([3.0, np.nan, 1.0])
    nothing = np.array([], dtype=int)
    assert audit_of("screen", [Scored(kept, scores, nothing, np.array([]), 5)]) is None
    lost = Scored(kept, np.full(3, np.nan), np.array([4]), np.array([np.nan]), 5)
    assert audit_of("screen", [lost]) is None
    few = Scored(kept, scores, np.array([4, 5]), np.array([2.0, np.nan]), 2)  # fewer than 10 are kept
    assert few.above.tolist() == [0] + [1] * 9
    assert audit_of("screen", [few, lost]).drawn == 2
