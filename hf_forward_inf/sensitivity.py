"""How much candidates are shaken by steps that know nothing: the measure of their scores."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from datasets import Dataset

from hf_forward_inf.adapters.base import Adapter
from hf_forward_inf.ascent import AscentConfig, Parameters, Perturbation, lora_rank, names_for, norm, radius_of
from hf_forward_inf.fingerprints import fingerprint
from hf_forward_inf.modes import evaluating

DRAWS = 16
"""Random steps: with 4 of them, one of five exemplars that a denoiser was taught alone was not found, with 16 all."""

if TYPE_CHECKING:
    from hf_forward_inf.forward_inf import ForwardInf


def is_known(tracer: "ForwardInf") -> bool:
    """Whether random steps can be as long as the ascent's: those of a learning rate, or of a LoRA, have no length."""
    return tracer.ascent.radius is not None and lora_rank(tracer.adapter, tracer.ascent) is None


def sensitivity(
    tracer: "ForwardInf", rows: Dataset, draws: int, scratch: Path | None = None, first_row: int = 0
) -> np.ndarray:
    """Shake the model at random, and see how much each row's loss varies; see [`ForwardInf.sensitivity`].

    What is computed is cached in `scratch`, by default where everything is; in messages rows are numbered from
    `first_row`.
    """
    if draws < 1:
        raise ValueError(f"draws={draws} must be at least 1.")
    if not is_known(tracer):
        raise ValueError(
            "Random steps are as long as the ascent's, in the weights: sensitivity needs a radius, and no LoRA."
        )
    names = names_for(tracer.adapter, tracer.ascent)
    rises = np.empty((draws, len(rows)), dtype=np.float32)
    with evaluating(tracer.adapter.model), np.errstate(invalid="ignore"):
        loss = tracer.candidate_pass(rows, scratch, first_row)
        base, block = loss.base(), loss.queries_a_pass(names)
        for start in range(0, draws, block):
            some = range(start, min(start + block, draws))
            steps = RandomSteps(tracer.adapter, names, tracer.ascent, some)
            rises[some.start : some.stop] = loss(steps, f"random steps {start + 1}-{some.stop} of {draws}") - base
        found = np.sqrt(np.square(rises).mean(axis=0))
    return np.where(np.isfinite(found), found, np.nan).astype(np.float32)


class RandomSteps(Perturbation):
    """Models moved as far as a query moves them, each in a direction drawn from all alike.

    Args:
        adapter (`Adapter`): Knows the model.
        names (`list[str]`): Parameters to perturb.
        config (`AscentConfig`): The length of a step, and the seed.
        draws (`range`): Numbers of the draws: each is the same whatever others are beside it.
    """

    def __init__(self, adapter: Adapter, names: list[str], config: AscentConfig, draws: range):
        self.adapter, self.names, self.config, self.draws = adapter, names, config, draws
        length = (config.radius, config.relative, config.seed)
        self.fingerprint = fingerprint("random", names, length, list(draws))

    def __len__(self) -> int:
        return len(self.draws)

    @cached_property
    def thetas(self) -> list[Parameters | None]:
        """The moved parameters of each draw."""
        own = dict(self.adapter.model.named_parameters())
        theta = {name: own[name].detach() for name in self.names}
        radius = radius_of(self.config, theta.values())
        return [self._moved(theta, radius, draw) for draw in self.draws]

    def _moved(self, theta: dict[str, torch.Tensor], radius: float, draw: int) -> Parameters:
        generator = torch.Generator().manual_seed(self.config.seed * 10_007 + draw)
        step = {name: torch.randn(value.shape, generator=generator).to(value.device) for name, value in theta.items()}
        rate = radius / norm(list(step.values()))
        return {name: (value + rate * step[name]).to(value.dtype) for name, value in theta.items()}
