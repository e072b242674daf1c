"""dattri: cosines of projected gradients, and TRAK, at one checkpoint."""

import numpy as np
import torch
from dattri.algorithm.tracin import TracInAttributor
from dattri.algorithm.trak import TRAKAttributor
from dattri.task import AttributionTask
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from peer_runs.measure import main
from peer_runs.task import Rows, Task, logits_of, losses

BATCH = 256
"""Rows whose gradients are in memory at a time: each batch samples the projection again, so few are cheaper."""

Parameters = dict[str, Tensor]


class Functional:
    """Losses as functions of parameters and one row, which the library differentiates."""

    def __init__(self, task: Task):
        self.task = task
        self.names = list(task.collate(task.queries[:1]))
        self.attribution = AttributionTask(self.loss, task.model, task.model.state_dict())

    def loss(self, parameters: Parameters, row: tuple[Tensor, ...]) -> Tensor:
        """Return the summed cross-entropy of one row."""
        batch = {name: values[None] for name, values in zip(self.names, row, strict=True)}
        logits = logits_of(lambda **read: torch.func.functional_call(self.task.model, parameters, (), read), batch)
        return losses(logits, batch["labels"])[0]

    def probability(self, parameters: Parameters, row: tuple[Tensor, ...]) -> Tensor:
        """Return the probability of all target tokens of one row."""
        return torch.exp(-self.loss(parameters, row))

    def rows(self, rows: Rows) -> DataLoader:
        """Return a loader of rows in batches, padded to one length."""
        batch = self.task.collate(rows)
        return DataLoader(TensorDataset(*(batch[name] for name in self.names)), batch_size=BATCH)


def tracin(task: Task) -> np.ndarray:
    own = Functional(task)
    method = TracInAttributor(own.attribution, weight_list=torch.ones(1), normalized_grad=True)
    return method.attribute(own.rows(task.candidates), own.rows(task.queries)).T.numpy()


def trak(task: Task) -> np.ndarray:
    own = Functional(task)
    method = TRAKAttributor(own.attribution, own.probability)
    method.cache(own.rows(task.candidates))
    return method.attribute(own.rows(task.queries)).detach().T.numpy()


if __name__ == "__main__":
    main({"tracin": tracin, "trak": trak})
