import numpy as np
import torch
from torch import nn

from hf_forward_inf.scores.batched_training import BatchedTraining
from hf_forward_inf.scores.retraining import random_subsets
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
