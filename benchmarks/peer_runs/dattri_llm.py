"""dattri-llm: gradients as pairs of activations and output gradients, and EK-FAC, whose fit it stores."""

from functools import partial
from typing import Any

import numpy as np
import torch
from dattri_llm import (
    AttributionArguments,
    AttributionTask,
    EKFACAttributor,
    KFACAttributor,
    TracInAttributor,
)
from torch import Tensor

from peer_runs.measure import main
from peer_runs.task import Rows, Task, logits_of, losses

BATCH = 32


class Named(torch.utils.data.Dataset):
    """Rows as dictionaries, padded to one length."""

    def __init__(self, task: Task, rows: Rows):
        self.batch = task.collate(rows, like=[*task.candidates, *rows])
        # Rows are told apart by their content: equal ones would share a score.
        self.batch["number"] = torch.arange(len(rows))

    def __len__(self) -> int:
        return len(self.batch["number"])

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {name: values[i] for name, values in self.batch.items()}


def loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Return the summed cross-entropy of a batch."""
    return losses(
        logits_of(model, {name: value for name, value in batch.items() if name != "number"}), batch["labels"]
    ).sum()


def attribute(kind: Any, task: Task, **options: Any) -> np.ndarray:
    arguments = AttributionArguments(
        output_dir="scores", per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH, use_cpu=True,
        dataloader_pin_memory=False, max_grad_norm=None,
    )  # fmt: skip
    attributor = kind(arguments, task=AttributionTask(loss_func=loss, model=task.model))
    found = attributor.attribute(Named(task, task.candidates), Named(task, task.queries), **options)
    return found.agnostic_matrix()[1].T.float().numpy()


def factored(kind: Any, task: Task, **options: Any) -> np.ndarray:
    """Return influence through Kronecker factors, which are fitted once."""
    return attribute(kind, task, fisher_dir=f"fisher-{kind.__name__}", **options)


if __name__ == "__main__":
    main(
        {
            "dot": partial(attribute, TracInAttributor),
            "cosine": partial(attribute, TracInAttributor, normalized_grad=True),
            "kfac": partial(factored, KFACAttributor),
            "ekfac": partial(factored, EKFACAttributor),
        }
    )
