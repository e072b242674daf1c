"""The tasks of the recipes that train again, `recipes/lds.py` and `recipes/loo.py`, for this library and its peers."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from peer_tasks import POSITIONS, Training, Truth, write_task
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from hf_forward_inf.data import builtin_facts, proponents
from hf_forward_inf.scores.retraining import Retrained
from hf_forward_inf.utils.rows import fill_in

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))
from experiments.lds import LdsOptions, load_task, retrain_subsets
from experiments.loo import LooOptions, leave_out, load_blocks
from experiments.retrainable import Retrainable
from experiments.retrainable_texts import TUNING

ASKED = 200
"""Queries of the task of sentences: those that are judged, those by which settings are chosen, and more, by which the
cost is measured."""
CHECKPOINTS = 6
"""Models of the training that are saved, evenly spaced, the last one among them."""
QUERIES = 50
"""Queries of the texts that are judged."""
EPOCHS: int = TUNING["epochs"]
"""Passes of the texts' fine-tuning, unless others are asked for."""

Pair = tuple[Retrained, Retrained]
"""What training on subsets did to the judged queries, and to the others."""


def sentences_task(folder: Path) -> None:
    """Write the task of `recipes/lds.py --task sentences`: 600 sentences, a tiny Llama, 60 halves x 2 seeds.

    The others, by which our defaults were chosen, choose settings here too (`benchmarks/defaults.py`).
    """
    options = LdsOptions(task="sentences")
    task = load_task(options)
    truths = {"halves": retrain_subsets(task, options)}
    columns = {"text": [*task.queries["text"], *task.others["text"]]}
    used = {*columns["text"], *task.candidates["text"]}
    for row in builtin_facts()["abstracts"].shuffle(seed=0):
        text = fill_in(row["inputs_pretokenized"], row["targets_pretokenized"])
        if len(columns["text"]) < ASKED and text not in used:
            columns["text"].append(text)
    known = proponents(task.queries, task.candidates)
    write_truths(folder, task, truths, lambda: task.adapter(0).model, Dataset.from_dict(columns), known=known)


def texts_task(folder: Path, data: str | None, seeds: int, epochs: int) -> None:
    """Write the task of `recipes/lds.py --task texts`: sentences without 50%, and without 1%.

    Args:
        folder (`Path`): Where to.
        data (`str`, *optional*): Sentences, as of the recipe.
        seeds (`int`): Trainings of each subset.
        epochs (`int`): Passes of the fine-tuning, as of the recipe.
    """
    options = LdsOptions(task="texts", data=data, num_queries=QUERIES, seeds=seeds, epochs=epochs)
    few = replace(options, drop=0.01)
    task = load_task(few)
    truths = {"halves": retrain_subsets(load_task(options), options), "hundredths": retrain_subsets(task, few)}
    write_truths(folder, task, truths, partial(_fine_tuned, task))


def loo_task(folder: Path, data: str | None, seeds: int) -> None:
    """Write the task of `recipes/loo.py`: blocks that are left out, one at a time.

    Args:
        folder (`Path`): Where to.
        data (`str`, *optional*): Sentences, as of the recipe.
        seeds (`int`): Trainings of each subset.
    """
    options = LooOptions(data=data, seeds=seeds)
    task = load_blocks(options)
    write_truths(folder, task, {"left_out": leave_out(task, options)}, partial(_fine_tuned, task))


def _fine_tuned(task: Retrainable) -> nn.Module:
    tuning: Any = task.train(task.queries)
    return tuning.model(0)


def write_truths(
    folder: Path,
    task: Retrainable,
    truths: Mapping[str, Pair],
    train: Callable[[], nn.Module],
    queries: Dataset | None = None,
    known: Sequence[Sequence[int]] | None = None,
) -> None:
    """Write a task of the recipes, with the models on the way to the one that is explained.

    Args:
        folder (`Path`): Where to.
        task (`Retrainable`): The task.
        truths (`dict`): What training on subsets did, by the names of their kinds.
        train (`Callable`): Trains the explained model.
        queries (`datasets.Dataset`, *optional*): Queries: those that are judged, the others and more. Defaults to
            the first two.
        known (`list[list[int]]`, *optional*): The proponents of the first queries.
    """
    explained: Any = task.adapter(0)
    tokenizer = explained.tokenizer
    model, training = trained_again(train, tokenizer, folder / "checkpoints")
    _check_same(model, explained.model)
    write_task(
        folder,
        "causal",
        (model, tokenizer),
        concatenate_datasets([task.queries, task.others]) if queries is None else queries,
        task.candidates,
        truths={
            name: Truth(judged.subsets, np.concatenate([judged.losses, others.losses], axis=1))
            for name, (judged, others) in truths.items()
        },
        judged=len(task.queries),
        known=known,
        training=training,
    )


def trained_again(train: Callable[[], nn.Module], tokenizer: Any, folder: Path) -> tuple[Any, Training]:
    """Train a model, and once more to save models on the way.

    Args:
        train (`Callable`): Trains it, with one optimizer of all parameters.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer, which is saved with each model.
        folder (`Path`): Where to.

    Raises:
        ValueError: If it is not the same model again.
    """
    steps: list[Any] = []
    with after_each_step(steps.append):
        model: Any = train()
    model.config.max_position_embeddings = tokenizer.model_max_length = POSITIONS
    training = Training(folder)
    saving = Saving(training, deepcopy(model), len(steps))
    with after_each_step(saving):
        train()
    _check_same(model, saving.model)
    for i in range(len(training.steps)):
        tokenizer.save_pretrained(folder / str(i))
    return model.eval(), training


def _check_same(model: nn.Module, other: nn.Module) -> None:
    if any(not torch.equal(*pair) for pair in zip(model.parameters(), other.parameters(), strict=True)):
        raise ValueError("The training was not repeated: the models on the way are those of another model.")


@contextmanager
def after_each_step(call: Callable[[torch.optim.Optimizer], None]) -> Iterator[None]:
    """Call a function after each step of any optimizer."""
    handle = register_optimizer_step_post_hook(lambda optimizer, *_: call(optimizer))
    try:
        yield
    finally:
        handle.remove()


class Saving:
    """Saves the model that is trained and its optimizer's state, evenly over a number of steps.

    Args:
        training (`Training`): Where to, and what is saved.
        model (`PreTrainedModel`): A model of the same kind, which takes over the weights.
        total (`int`): Number of steps.
    """

    def __init__(self, training: Training, model: Any, total: int):
        self.training, self.model = training, model
        self.stops = np.linspace(0, total, CHECKPOINTS + 1).round().astype(int).tolist()[1:]
        self.rates: list[float] = []
        self.step = 0

    def __call__(self, optimizer: torch.optim.Optimizer) -> None:
        """Note the learning rate, and save at the planned steps."""
        self.step += 1
        self.rates.append(optimizer.param_groups[0]["lr"])
        if self.step in self.stops:
            self._save(optimizer)

    @torch.no_grad()
    def _save(self, optimizer: torch.optim.Optimizer) -> None:
        folder = self.training.folder / str(len(self.training.steps))
        state = optimizer.state_dict()
        # Models that are trained at once are stacked: this one has an axis of its own.
        for i, own in enumerate(self.model.parameters()):
            own.copy_(optimizer.param_groups[0]["params"][i].view_as(own))
            moments = state["state"].get(i, {}).items()
            state["state"][i] = {name: one.view_as(own) if one.ndim > own.ndim else one for name, one in moments}
        self.model.save_pretrained(folder)
        torch.save(state, folder / "optimizer.pt")
        self.training.steps.append(len(self.rates))
        self.training.rates.append(float(np.mean(self.rates)))
        self.rates.clear()
