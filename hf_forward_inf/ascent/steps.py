"""Step 2 of the algorithm: move the model up (or down) the loss of one query, on a copy of its parameters."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from hf_forward_inf.adapters.base import Adapter, Rows
from hf_forward_inf.adapters.contrast import encoded_adapter
from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.ascent.lora import LowRank, slopes
from hf_forward_inf.ascent.parameters import Parameters, call, norm, radius_of, rank_of_ascent
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.models import to_device

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}

Correction: TypeAlias = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Makes the direction of a step of a gradient, both one tensor a perturbed parameter."""


class Direction(Protocol):
    """What corrects gradients by curvature: known by a fingerprint at once, ready when first used."""

    fingerprint: str

    def correction(self) -> Correction:
        """Give what turns gradients into directions; whatever it holds is let go of with it."""
        ...


class Perturbation:
    """The models theta_K of a block of queries: known by a fingerprint at once, computed when first used.

    Args:
        adapter (`Adapter`): Gives the loss, and knows the model.
        queries (`dict[str, list]`): Encoded queries (`Adapter.encode`), one a row.
        names (`list[str]`): Parameters to perturb ([`parameters.perturbed_names`]).
        config (`AscentConfig`): Steps and their length; with a direction ([`AscentConfig.completed`]).
        direction (`Direction`, *optional*): Corrects the gradients ([`directions.direction_for`]).
    """

    def __init__(
        self,
        adapter: Adapter,
        queries: Rows,
        names: list[str],
        config: AscentConfig,
        direction: Direction | None = None,
    ):
        self.adapter, self.queries, self.names, self.config, self.direction = (
            adapter,
            queries,
            names,
            config,
            direction,
        )
        self.fingerprint = fingerprint(queries, names, asdict(config), direction and direction.fingerprint)

    def __len__(self) -> int:
        return len(self.queries["terms"])

    @cached_property
    def thetas(self) -> list[Parameters | None]:
        """theta_K of each query, `None` for one that cannot move the model."""
        rows = [{key: [values[i]] for key, values in self.queries.items()} for i in range(len(self))]
        correct = None if self.direction is None else self.direction.correction()
        return [ascend(self.adapter, row, self.names, self.config, correct) for row in rows]


class Mirrored(Perturbation):
    """The same steps to the other side: 2 theta - theta_K."""

    def __init__(self, other: Perturbation):
        self.other, self.queries = other, other.queries
        self.fingerprint = fingerprint(other.fingerprint, "mirrored")

    @cached_property
    def thetas(self) -> list[Parameters | None]:
        """The mirror image of each query's theta_K."""
        own = dict(self.other.adapter.model.named_parameters())
        return [
            theta and {name: _mirrored(own, name, value) for name, value in theta.items()}
            for theta in self.other.thetas
        ]


def _mirrored(own: Mapping[str, Tensor], name: str, value: Tensor | LowRank) -> Tensor | LowRank:
    return value * -1.0 if isinstance(value, LowRank) else 2 * own[name].detach() - value


def ascend(
    adapter: Adapter, query: Rows, names: list[str], config: AscentConfig, correct: Correction | None = None
) -> Parameters | None:
    """Take K steps up (or down) the loss of one query (Algorithm 1).

    The model itself is never written to: the steps are taken on copies of the named parameters, which
    `torch.func.functional_call` puts in their place for the length of a call, or on changes of low rank that are added
    to what linear layers give.

    Args:
        adapter (`Adapter`): Gives the loss, and knows the model.
        query (`dict[str, list]`): The encoded query.
        names (`list[str]`): Parameters to perturb.
        config (`AscentConfig`): Steps and their length; with a direction ([`AscentConfig.completed`]).
        correct (`Callable`, *optional*): Makes the direction of a step of the gradient; the gradient by default.

    Returns:
        `dict[str, Tensor | LowRank]`: theta_K of the named parameters, or `None` where a gradient is zero or not
        finite: such a query cannot move the model.
    """
    adapter, model = encoded_adapter(adapter, query), adapter.model
    batch = to_device(adapter.collate(query), model)
    if not adapter.shared_parameters() & set(names):
        with torch.no_grad():
            batch = adapter.run_shared(batch)

    def loss(theta: Parameters) -> Tensor:
        terms = adapter.term_losses(partial(call, model, theta), batch)
        size = terms.detach().abs().sum()
        if config.radius is None or size == 0:
            return terms.sum() / sum(query["terms"])
        # Only the direction counts: in units of the loss itself, the gradient of a memorised query has an ordinary
        # length, where its own would vanish in float32. Of the terms: a contrast's cancel.
        return terms.sum() / size

    rank = rank_of_ascent(adapter, config)
    with torch.enable_grad(), torch.random.fork_rng():
        torch.manual_seed(config.seed)
        if rank is not None:
            return _ascend_lora(model, loss, names, config, rank)
        return _ascend_weights(model, loss, names, config, correct)


def _ascend_weights(
    model: nn.Module,
    loss: Callable[[Parameters], Tensor],
    names: list[str],
    config: AscentConfig,
    correct: Correction | None,
) -> Parameters | None:
    own = dict(model.named_parameters())
    theta = {name: own[name].detach().clone().requires_grad_() for name in names}
    radius = None if config.radius is None else radius_of(config, theta.values())
    optimizer = OPTIMIZERS[config.optimizer](
        theta.values(), lr=config.learning_rate or 0.0, maximize=config.mode != "descent"
    )
    for _ in range(config.steps):
        step: Sequence[Tensor] = torch.autograd.grad(
            loss({**theta}), list(theta.values()), allow_unused=True, materialize_grads=True
        )
        length = norm(step)
        if correct is not None and 0 < length < math.inf:
            step = correct(step)
            length = norm(step)
        if not 0 < length < math.inf:
            return None
        if radius is not None:
            optimizer.param_groups[0]["lr"] = radius / config.steps / length
        for value, s in zip(theta.values(), step, strict=True):
            value.grad = s.to(value.dtype)
        optimizer.step()
    return {name: value.detach() for name, value in theta.items()}


def _ascend_lora(
    model: nn.Module, loss: Callable[[Parameters], Tensor], names: list[str], config: AscentConfig, rank: int
) -> Parameters | None:
    """Go along changes of low rank, whose A is what layers read of the query: a drawn one would see a part of it."""
    sign = -1.0 if config.mode == "descent" else 1.0
    theta: dict[str, LowRank] = {}
    for _ in range(config.steps):
        step = {
            name: slope.truncated(rank)[0] for name, slope in slopes(model, names, partial(loss, {**theta})).items()
        }
        length = math.hypot(*(change.norm() for change in step.values()))
        if not 0 < length < math.inf:
            return None
        rate = sign * (config.learning_rate or (config.radius or 0.0) / config.steps / length)
        for name, change in step.items():
            theta[name] = (theta[name] + change * rate).truncated(rank)[0] if name in theta else change * rate
    return {**theta}


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
