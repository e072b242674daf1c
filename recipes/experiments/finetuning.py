"""Fine-tuning a language model without some of its rows, and with nothing else changed."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.func import vmap

from experiments.retrainable_facts import losses_and_answers
from hf_forward_inf.adapters import CausalLMAdapter
from hf_forward_inf.ascent.parameters import call
from hf_forward_inf.passes.candidate_pass import batches
from hf_forward_inf.utils.models import device_of, to_device

WARMUP = 0.1
"""Share of the steps in which the learning rate rises."""
STACKED = 2e8
"""Parameters trained at once on an accelerator, where small models take most of their time between operations."""


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

    @property
    def together(self) -> int:
        """Number of models that are trained at once: one on a CPU, on an accelerator as many small ones as fit."""
        if device_of(self.adapter.model).type == "cpu":
            return 1
        return max(1, int(STACKED / sum(weight.numel() for weight in self.adapter.model.parameters())))

    def __call__(self, subsets: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """Train a model on each subset; return the queries' losses and answers, float32 `[models, queries, 2]`."""
        outcomes: dict[int, Tensor] = {}
        for seed in sorted(set(seeds.tolist())):
            own = np.flatnonzero(seeds == seed)
            for one, model in zip(own.tolist(), self.models(seed, subsets[own]), strict=True):
                outcomes[one] = losses_and_answers(self.adapter.with_model(model), self.queries)
        return torch.stack([outcomes[i] for i in range(len(subsets))]).numpy()

    def model(self, seed: int, subset: np.ndarray | None = None) -> nn.Module:
        """Return a model fine-tuned on a subset, booleans `[candidates]`; by default on all rows.

        Raises:
            FloatingPointError: If training diverges.
        """
        return next(self.models(seed, np.ones((1, len(self.rows)), dtype=bool) if subset is None else subset[None]))

    def models(self, seed: int, subsets: np.ndarray) -> Iterator[nn.Module]:
        """Fine-tune a model on each subset, booleans `[models, candidates]`, all with the same batches in one order.

        The models have stacked parameters, and are trained at once; one module takes the weights of one after another.

        Raises:
            FloatingPointError: If training diverges.
        """
        model = copy.deepcopy(self.adapter.model).eval()  # dropout would draw other numbers for other rows
        stacked = {
            name: weight.detach().expand(len(subsets), *weight.shape).clone().requires_grad_()
            for name, weight in model.named_parameters()
        }
        for weight in stacked.values():
            weight.grad = torch.zeros_like(weight)  # an empty batch's
        cuts = self._batches(np.random.default_rng(seed))
        optimizer = torch.optim.AdamW(stacked.values(), lr=self.learning_rate, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate(len(cuts)))
        for rows, tokens in cuts:
            optimizer.zero_grad(set_to_none=False)
            own = rows[subsets[:, rows].any(axis=0)]
            if len(own):
                weights = torch.from_numpy(subsets[:, own]).to(device_of(model))
                (self._losses(model, stacked, own) * weights).sum().div(tokens).backward()
            optimizer.step()
            schedule.step()
        if not all(torch.isfinite(weight).all() for weight in stacked.values()):
            raise FloatingPointError("Training diverged: a weight is not finite. Lower the learning rate.")
        for i in range(len(subsets)):
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    weight.copy_(stacked[name][i])
            yield model

    @cached_property
    def _features(self) -> dict[str, list[list[int]]]:
        return self.adapter.encode(self.rows[:])

    def _batches(self, draw: np.random.Generator) -> list[tuple[np.ndarray, int]]:
        """Return for each step the rows of its batch, and the number of their tokens.

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
        return [(rows, int(terms[rows].sum())) for rows in cuts]

    def _losses(self, model: nn.Module, stacked: dict[str, Tensor], rows: np.ndarray) -> Tensor:
        """Return the rows' losses under each model's parameters, `[models, rows]`."""
        features = {name: [values[row] for row in rows] for name, values in self._features.items()}
        batch = to_device(self.adapter.collate(features), model)

        def losses(theta: dict[str, Tensor]) -> Tensor:
            return self.adapter.loss(partial(call, model, theta), batch)

        with torch.autocast(device_of(model).type, torch.bfloat16, enabled=self.autocast):
            return vmap(losses)(stacked)

    def _rate(self, steps: int) -> Callable[[int], float]:
        """Return the learning rate's multiplier: it rises for a tenth of the steps, then falls to 0."""
        rising = max(1, round(WARMUP * steps))
        return lambda step: min((step + 1) / rising, (steps - step) / (steps - rising + 1))
