"""Fine-tuning a language model without some of its rows, and with nothing else changed."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from experiments.retrainable_facts import losses_and_answers
from hf_forward_inf.adapters import CausalLMAdapter
from hf_forward_inf.passes.candidate_pass import batches
from hf_forward_inf.utils.models import device_of, to_device

WARMUP = 0.1
"""Share of the steps in which the learning rate rises."""


@dataclass(frozen=True)
class FineTuning:
    """Fine-tunes a causal language model on subsets of its rows, as trajectory-specific leave-one-out asks.

    A seed draws the batches and their order. A row that is left out has weight 0 in its batches: a batch's loss is the
    sum over the tokens of its remaining rows, divided by the number of tokens of all its rows. Steps, order and
    learning rates don't depend on the subset, and there is no dropout, so that the loss of a query differs by what was
    left out alone.

    Args:
        adapter (`CausalLMAdapter`): Adapter of the model before fine-tuning, which is not changed.
        rows (`datasets.Dataset`): All candidates.
        queries (`datasets.Dataset`): Rows whose losses are the outcomes.
        epochs (`int`, defaults to 2): Passes over the rows.
        learning_rate (`float`, defaults to 1e-3): Peak of AdamW's learning rate, which falls to 0 linearly.
        batch_length (`int`, defaults to 1024): Padded tokens in a batch.
        autocast (`bool`, defaults to `False`): Train in bfloat16 with float32 weights; losses are computed in float32.
    """

    adapter: CausalLMAdapter
    rows: Dataset
    queries: Dataset
    epochs: int = 2
    learning_rate: float = 1e-3
    batch_length: int = 1024
    autocast: bool = False

    @property
    def settings(self) -> tuple[float, ...]:
        """Everything that training depends on except model, rows and seed."""
        return self.epochs, self.learning_rate, self.batch_length, self.autocast

    def __call__(self, subsets: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """Train one model after another; return the queries' losses and answers, float32 `[models, queries, 2]`."""
        pairs = zip(subsets, seeds.tolist(), strict=True)
        models = (self.model(seed, subset) for subset, seed in pairs)
        return np.stack([losses_and_answers(self.adapter.with_model(one), self.queries).numpy() for one in models])

    def model(self, seed: int, subset: np.ndarray | None = None) -> nn.Module:
        """Return a model fine-tuned on a subset, booleans `[candidates]`; by default on all rows.

        Raises:
            FloatingPointError: If training diverges.
        """
        model = copy.deepcopy(self.adapter.model).eval()  # dropout would draw other numbers for other rows
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)  # an empty batch's
        cuts = self._batches(np.random.default_rng(seed), subset)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.learning_rate, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate(len(cuts)))
        for rows, tokens in cuts:
            optimizer.zero_grad(set_to_none=False)
            if len(rows):
                self._loss(model, rows, tokens).backward()
            optimizer.step()
            schedule.step()
        if not all(torch.isfinite(weight).all() for weight in model.parameters()):
            raise FloatingPointError("Training diverged: a weight is not finite. Lower the learning rate.")
        model.zero_grad()
        return model

    @cached_property
    def _features(self) -> dict[str, list[list[int]]]:
        return self.adapter.encode(self.rows[:])

    def _batches(self, draw: np.random.Generator, subset: np.ndarray | None) -> list[tuple[np.ndarray, int]]:
        """Return for each step the rows of the subset in its batch, and the number of tokens of the whole batch.

        Rows of similar length are in a batch, so that there is little padding.
        """
        features = self._features
        lengths = self.adapter.lengths(features)
        terms = np.array(features["terms"])
        cuts: list[np.ndarray] = []
        for _ in range(self.epochs):
            order = np.lexsort([draw.random(len(lengths)), lengths[:, 0]])
            epoch = [order[rows] for rows in batches(lengths[order], self.batch_length)]
            cuts += [epoch[i] for i in draw.permutation(len(epoch))]
        return [(rows if subset is None else rows[subset[rows]], int(terms[rows].sum())) for rows in cuts]

    def _loss(self, model: nn.Module, rows: np.ndarray, tokens: int) -> Tensor:
        features = {name: [values[row] for row in rows] for name, values in self._features.items()}
        batch = to_device(self.adapter.collate(features), model)
        with torch.autocast(device_of(model).type, torch.bfloat16, enabled=self.autocast):
            return self.adapter.loss(model, batch).sum() / tokens

    def _rate(self, steps: int) -> Callable[[int], float]:
        """Return the learning rate's multiplier: it rises for a tenth of the steps, then falls to 0."""
        rising = max(1, round(WARMUP * steps))
        return lambda step: min((step + 1) / rising, (steps - step) / (steps - rising + 1))
