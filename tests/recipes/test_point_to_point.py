import numpy as np
import torch
from experiments.point_to_point import LogisticRegression, point_to_point
from sklearn.linear_model import LogisticRegression as Oracle

from tests.helpers import digits

COUNT = 80


def data():
    rows = digits.rows(0, COUNT + 40)
    inputs = torch.tensor(rows["x"][:], dtype=torch.float64)
    return inputs, torch.tensor(rows["label"][:])


def oracles_losses(inputs, labels, training, l2):
    """scikit-learn's objective is C x the sum of losses + half the squared norm."""
    fitted = Oracle(C=1 / (l2 * len(training)), fit_intercept=False, tol=1e-12, max_iter=10000)
    fitted.fit(inputs[training], labels[training])
    return -fitted.predict_log_proba(inputs)[np.arange(len(labels)), labels]


def test_both_influences_are_those_of_scikit_learns_retraining():
    inputs, labels = data()
    queries, found = point_to_point(LogisticRegression(inputs, labels, 10, l2=1e-2), COUNT, 3)
    everyone = np.arange(COUNT)
    base = oracles_losses(inputs, labels, everyone, 1e-2)
    assert queries.tolist() == (COUNT + np.argsort(-base[COUNT:])[:3]).tolist()
    for left in (0, 7):
        without = oracles_losses(inputs, labels, np.delete(everyone, left), 1e-2)
        np.testing.assert_allclose(found.to_query[:, left], (without - base)[queries], atol=1e-5)
    for i, query in enumerate(queries):
        added = oracles_losses(inputs, labels, np.append(everyone, query), 1e-2)
        np.testing.assert_allclose(found.from_query[i], (base - added)[:COUNT], atol=1e-5)


def test_more_features_than_rows_change_nothing():
    inputs, labels = data()
    wide = torch.cat([inputs, torch.zeros(len(inputs), 60, dtype=torch.float64)], dim=1)
    turned = torch.linalg.qr(torch.randn(124, 124, dtype=torch.float64)).Q
    one, other = (
        point_to_point(LogisticRegression(x, labels, 10, l2=1e-2), COUNT, 2)[1] for x in (inputs, wide @ turned)
    )
    np.testing.assert_allclose(one.to_query, other.to_query, atol=1e-6)
