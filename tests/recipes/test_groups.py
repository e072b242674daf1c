from dataclasses import replace

import numpy as np
import pytest
import torch
from experiments.groups import GroupTask, mislabelled
from torch import nn

from hf_forward_inf import AscentConfig
from hf_forward_inf.scores.batched_training import BatchedTraining
from hf_forward_inf.toys.networks import ConvNet
from tests.helpers import digits


@pytest.fixture(scope="module")
def task():
    rows = digits.rows(0, 70)
    data = torch.tensor(rows["x"][:]).view(-1, 1, 8, 8), torch.tensor(rows["label"][:])
    training = BatchedTraining(
        lambda: ConvNet(1, (8, 8), width=4), data, data, steps=20, learning_rate=0.05, momentum=0.9, batch_size=16
    )
    return GroupTask(training, np.repeat(np.arange(5), 10))


def test_groups_get_more_and_more_wrong_labels():
    labels = np.arange(43) % 10
    of, noisy = mislabelled(labels, 5, 10)
    assert len(of) == len(noisy) == 40
    assert [(noisy != labels[:40])[of == g].sum() for g in range(5)] == [0, 2, 4, 6, 8]
    assert noisy.min() >= 0
    assert noisy.max() < 10


def test_twice_the_share_of_wrong_labels_is_in_the_last_group():
    labels = np.arange(100) % 10
    of, noisy = mislabelled(labels, 5, 10, ratio=0.25)
    assert [(noisy != labels)[of == g].sum() for g in range(5)] == [0, 2, 5, 8, 10]


def test_fewer_queries_are_the_first_ones(task):
    data = tuple(part[:55] for part in task.training.data)
    alone = GroupTask(replace(task.training, data=data, queries=data), task.of)
    few, expected = (one.influences(seeds=1) for one in (replace(task, queries=5), alone))
    np.testing.assert_allclose(few.to_query, expected.to_query, atol=1e-5)
    np.testing.assert_allclose(few.from_query, expected.from_query, atol=1e-5)


def test_influences_are_what_training_without_and_with_comes_to(task):
    found = task.influences(seeds=1)

    def losses(rows):
        logits = task.training.model(0, np.isin(np.arange(70), rows))(task.training.data[0])
        return nn.functional.cross_entropy(logits, task.training.data[1], reduction="none").detach().numpy()

    base, added = losses(range(50)), losses(range(70))
    without = losses([*range(20), *range(30, 50)])
    assert found.to_query[0, 2] == pytest.approx(without[50:].mean() - base[50:].mean(), abs=1e-4)
    assert found.from_query[0, 2] == pytest.approx(base[20:30].mean() - added[20:30].mean(), abs=1e-4)


def test_a_small_step_raises_groups_as_the_product_of_gradients_says(task):
    model, radius = task.model(0), 1e-3
    found = task.forward_inf(model, AscentConfig(radius=radius, direction="gradient"))

    def slope(rows):
        loss = nn.functional.cross_entropy(model(task.training.data[0][rows]), task.training.data[1][rows])
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    query = slope(slice(50, 70))
    expected = [(radius * query / query.norm() @ slope(slice(10 * g, 10 * g + 10))).item() for g in range(5)]
    np.testing.assert_allclose(found, expected, rtol=0.02, atol=1e-5)
