"""captum: TracIn at one checkpoint, in all parameters or in the last layer.

The last layer's variant needs one vector and one label per row, so that its rows are tokens here. The score of two
sentences is the sum over pairs of their tokens: the exact product of the layer's gradients. Nothing is stored between
runs.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from captum.influence import TracInCP, TracInCPFast
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from peer_runs.measure import main
from peer_runs.task import IGNORED, Rows, Task, logits_of, losses

ROWS, TOKENS = 128, 1024
"""Number of candidates, or of their tokens, whose gradients are in memory at a time."""

INPUTS = ("input_ids", "attention_mask", "decoder_input_ids")


class Logits(nn.Module):
    """Calls the model with positional tensors instead of named ones."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the logits of every position."""
        return logits_of(self.model, dict(zip(INPUTS, inputs, strict=False)))


def all_parameters(task: Task) -> np.ndarray:
    candidates = TensorDataset(*_tensors(task, task.candidates))
    method = tracin(TracInCP, Logits(task.model), candidates, losses, ROWS)
    return method.influence(_tensors(task, task.queries)).numpy()


def last_layer(task: Task) -> np.ndarray:
    head = nn.Sequential(task.model.get_output_embeddings())
    (states, labels, candidate), (asked, answers, query) = _tokens(task, task.candidates), _tokens(task, task.queries)
    method = tracin(TracInCPFast, head, TensorDataset(states, labels), _token_loss, TOKENS, final_fc_layer=head[0])
    pairs = method.influence((asked, answers))
    by_query = torch.zeros(len(task.queries), pairs.shape[1]).index_add_(0, query, pairs)
    return torch.zeros(len(task.queries), len(task.candidates)).index_add_(1, candidate, by_query).numpy()


def tracin(
    kind: Any, model: nn.Module, candidates: TensorDataset, loss: Callable[..., Tensor], batch: int, **options: Any
) -> Any:
    """Return TracIn with the model as its only checkpoint, and learning rate 1."""
    return kind(
        model=model,
        train_dataset=candidates,
        checkpoints=["the model as it is"],
        checkpoints_load_func=lambda model, checkpoint: 1.0,
        loss_fn=loss,
        batch_size=batch,
        **options,
    )


def _tensors(task: Task, rows: Rows) -> tuple[Tensor, ...]:
    batch = task.collate(rows)
    return tuple(batch[name] for name in (*INPUTS, "labels") if name in batch)


def _token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="sum")


@torch.no_grad()
def _tokens(task: Task, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Return the last layer's input wherever there is a label, the label, and its row."""
    read: list[Tensor] = []
    handle = task.model.get_output_embeddings().register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    labels, owners = [], []
    for start in range(0, len(rows), ROWS):
        batch = task.collate(rows[start : start + ROWS])
        logits_of(task.model, batch)
        taken = batch["labels"] != IGNORED
        read[-1] = read[-1][taken]
        labels.append(batch["labels"][taken])
        owners.append(torch.nonzero(taken)[:, 0] + start)
    handle.remove()
    return torch.cat(read), torch.cat(labels), torch.cat(owners)


if __name__ == "__main__":
    main({"all_parameters": all_parameters, "last_layer": last_layer})
