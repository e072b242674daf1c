"""dattri: TRAK and EK-FAC at one checkpoint. Nothing is stored between runs."""

import numpy as np
import torch
from dattri.algorithm.influence_function import IFAttributorEKFAC
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

    def logits(self, parameters: Parameters, batch: dict[str, Tensor]) -> Tensor:
        """Return the logits under given parameters."""
        return logits_of(lambda **read: torch.func.functional_call(self.task.model, parameters, (), read), batch)

    def loss(self, parameters: Parameters, row: tuple[Tensor, ...]) -> Tensor:
        """Return the summed cross-entropy of one row."""
        batch = {name: values[None] for name, values in zip(self.names, row, strict=True)}
        return losses(self.logits(parameters, batch), batch["labels"])[0]

    def of_batch(self, parameters: Parameters, rows: tuple[Tensor, ...]) -> Tensor:
        """Return the mean over rows of their summed cross-entropy."""
        batch = dict(zip(self.names, rows, strict=True))
        return losses(self.logits(parameters, batch), batch["labels"]).mean()

    def probability(self, parameters: Parameters, row: tuple[Tensor, ...]) -> Tensor:
        """Return the probability of all target tokens of one row."""
        return torch.exp(-self.loss(parameters, row))

    def rows(self, rows: Rows, batch: int = BATCH) -> DataLoader:
        """Return a loader of rows in batches, padded to one length."""
        padded = self.task.collate(rows, like=[*self.task.candidates, *rows])
        return DataLoader(TensorDataset(*(padded[name] for name in self.names)), batch_size=batch)


def trak(task: Task) -> np.ndarray:
    own = Functional(task)
    method = TRAKAttributor(own.attribution, own.probability)
    method.cache(own.rows(task.candidates))
    return method.attribute(own.rows(task.queries)).detach().T.numpy()


def ekfac(task: Task, damping: float = 0.0) -> np.ndarray:
    """Influence through EK-FAC; without damping by default, as in the library."""
    own = Functional(task)
    names = [name for name, layer in task.model.named_modules() if isinstance(layer, torch.nn.Linear)]
    fitted = AttributionTask(own.of_batch, task.model, task.model.state_dict())
    method = IFAttributorEKFAC(fitted, module_name=names, damping=damping)
    method.cache(own.rows(task.candidates, 32))
    scoring = IFAttributorEKFAC(own.attribution, module_name=names, damping=damping)
    scoring.cached_q, scoring.cached_lambdas = method.cached_q, method.cached_lambdas
    scoring.full_train_dataloader = method.full_train_dataloader
    return scoring.attribute(own.rows(task.candidates), own.rows(task.queries)).detach().T.numpy()


if __name__ == "__main__":
    main({"ekfac": ekfac, "trak": trak})
