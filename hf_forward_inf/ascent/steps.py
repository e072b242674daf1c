"""Step 2 of the algorithm: gradient ascent (or descent) on the loss of a query, on a copy of the parameters."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from hf_forward_inf.adapters.base import Adapter, Rows
from hf_forward_inf.adapters.contrast import encoded_adapter
from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.ascent.layers import sites
from hf_forward_inf.ascent.low_rank import LowRank
from hf_forward_inf.ascent.parameters import Parameters, is_low_rank, materialised, norm, placed, radius_of
from hf_forward_inf.ascent.slopes import Changes, added_up, length_of, slopes
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.models import to_device

Step = TypeVar("Step")
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}

Correction: TypeAlias = Callable[[Any], Any]
"""Maps a gradient to the direction of a step: both with one tensor for each perturbed parameter or, for a step of low
rank, as [`slopes.Changes`]."""


class Direction(Protocol):
    """A correction of gradients by curvature: its fingerprint is known at once, the rest is computed when needed."""

    fingerprint: str

    def correction(self, gradients: Iterable[Sequence[Tensor]] = ()) -> Correction:
        """Return what maps gradients to directions; the memory that it needs is freed with it.

        Args:
            gradients (`Iterable`, *optional*): The gradients of a block of queries, for directions that share work
                among them; others never iterate over it.
        """
        ...


class Length(Protocol):
    """A rule for the length of a query's change, other than a fixed radius."""

    fingerprint: str

    def scaled(self, theta: Parameters) -> tuple[Parameters, float]:
        """Return theta with its change scaled, and the factor."""
        ...


class PerturbedModels(Protocol):
    """Some perturbed models: their fingerprint is known at once, their parameters are computed when first used."""

    fingerprint: str
    adapter: Adapter

    def __len__(self) -> int:
        """Number of models."""
        ...

    @property
    def thetas(self) -> list[Parameters | None]:
        """Perturbed parameters of each model, `None` where there is no model."""
        ...


class Perturbation:
    """The models theta_K of a block of queries ([`PerturbedModels`]).

    Args:
        adapter (`Adapter`): Gives the loss, and knows the model.
        queries (`dict[str, list]`): Encoded queries (`Adapter.encode`), one a row.
        names (`list[str]`): Parameters to perturb ([`parameters.perturbed_names`]).
        config (`AscentConfig`): Steps and their length; completed ([`AscentConfig.completed`]).
        direction (`Direction`, *optional*): Corrects the gradients ([`directions.direction_for`]).
        length (`Length`, *optional*): Sets the length of each query's change ([`trust.TrustRegion`]). Defaults to that
            of `config`.
    """

    def __init__(
        self,
        adapter: Adapter,
        queries: Rows,
        names: list[str],
        config: AscentConfig,
        direction: Direction | None = None,
        length: Length | None = None,
    ):
        self.adapter, self.queries, self.names = adapter, queries, names
        self.config, self.direction, self.length = config, direction, length
        parts = [None if part is None else part.fingerprint for part in (direction, length)]
        self.fingerprint = fingerprint(queries, names, asdict(config), parts)

    def __len__(self) -> int:
        return len(self.queries["terms"])

    @cached_property
    def thetas(self) -> list[Parameters | None]:
        """theta_K of each query, `None` where the gradient is zero or not finite."""
        model = self.adapter.model
        return [None if theta is None else materialised(model, theta) for theta in self.changes]

    @cached_property
    def changes(self) -> list[Parameters | None]:
        """The same, with low-rank changes for weights that [`parameters.materialised`] would copy."""
        rows = [{key: [values[i]] for key, values in self.queries.items()} for i in range(len(self))]
        correct = None if self.direction is None else self.direction.correction(self._gradients(rows))
        return [self._theta(row, correct) for row in rows]

    def _gradients(self, rows: Sequence[Rows]) -> Iterator[Sequence[Tensor]]:
        """Yield the gradient of each query."""
        own = dict(self.adapter.model.named_parameters())
        for row in rows:
            theta = {name: own[name].detach().clone().requires_grad_() for name in self.names}
            with torch.enable_grad(), torch.random.fork_rng():
                torch.manual_seed(self.config.seed)
                yield gradient_of(self.adapter.model, query_loss(self.adapter, row, self.names, self.config), theta)

    def _theta(self, query: Rows, correct: Correction | None) -> Parameters | None:
        """Take the steps of one query; with a rule for the length, one step first, to find that of the path."""
        config = self.config
        if self.length is not None and config.steps > 1:
            first = ascend(self.adapter, query, self.names, replace(config, steps=1), correct)
            if first is None:
                return None
            assert config.radius is not None
            config = replace(config, radius=config.radius * self.length.scaled(first)[1])
        theta = ascend(self.adapter, query, self.names, config, correct)
        return theta if theta is None or self.length is None else self.length.scaled(theta)[0]


class Mirrored:
    """The models after the same steps to the other side, 2 theta - theta_K ([`PerturbedModels`])."""

    def __init__(self, other: PerturbedModels):
        self.other, self.adapter = other, other.adapter
        self.fingerprint = fingerprint(other.fingerprint, "mirrored")

    def __len__(self) -> int:
        return len(self.other)

    @cached_property
    def thetas(self) -> list[Parameters | None]:
        """The mirror image of each query's theta_K."""
        own = dict(self.adapter.model.named_parameters())
        return [None if theta is None else _mirrored(own, theta) for theta in self.other.thetas]


def _mirrored(own: Mapping[str, Tensor], theta: Parameters) -> Parameters:
    return {
        name: value * -1.0 if isinstance(value, LowRank) else 2 * own[name].detach() - value
        for name, value in theta.items()
    }


def ascend(
    adapter: Adapter, query: Rows, names: list[str], config: AscentConfig, correct: Correction | None = None
) -> Parameters | None:
    """Take K steps up (or down) the loss of one query (Algorithm 1).

    The model is as before afterwards: the steps are taken on copies of the named parameters, which are in their place
    while the model runs ([`parameters.placed`]), or on low-rank changes that are added to the outputs of layers.

    Args:
        adapter (`Adapter`): Gives the loss, and knows the model.
        query (`dict[str, list]`): The encoded query.
        names (`list[str]`): Parameters to perturb.
        config (`AscentConfig`): Steps and their length; completed ([`AscentConfig.completed`]).
        correct (`Callable`, *optional*): Maps the gradient to the direction of the step. Defaults to the identity.

    Returns:
        `dict[str, Tensor | LowRank]`: theta_K of the named parameters, or `None` where a gradient is zero or not
        finite.
    """
    if config.radius is None and config.learning_rate is None:
        raise ValueError("The ascent has no length: complete its options with AscentConfig.completed().")
    loss, model = query_loss(adapter, query, names, config), adapter.model
    with torch.enable_grad(), torch.random.fork_rng():
        torch.manual_seed(config.seed)
        if is_low_rank(adapter, config):
            return _ascend_low_rank(model, loss, names, config, correct)
        return _ascend_weights(model, loss, names, config, correct)


def query_loss(adapter: Adapter, query: Rows, names: list[str], config: AscentConfig) -> Callable[[], Tensor]:
    """Return a function that computes what is raised for a query: its loss, in units of itself for a radius."""
    adapter, model = encoded_adapter(adapter, query), adapter.model
    batch = to_device(adapter.collate(query), model)
    batch = adapter.with_shared(batch, set(names))

    def loss() -> Tensor:
        terms = adapter.term_losses(model, batch)
        mean, size = (part.sum(dim=1).sum() / sum(query["terms"]) for part in (terms, terms.detach().abs()))
        if config.radius is None or size == 0:
            return mean
        # Only the direction matters. Divided by the loss, the gradient of a memorised query has an ordinary norm, and
        # does not underflow in float32. By the sum of absolute terms, since those of a contrast cancel.
        return mean / size

    return loss


def gradient_of(model: nn.Module, loss: Callable[[], Tensor], theta: Parameters) -> Sequence[Tensor]:
    """Return the gradient of a loss by parameters theta, one tensor for each."""
    with placed(model, theta):  # until after the backward pass, in which checkpointed blocks run again
        return torch.autograd.grad(loss(), list(theta.values()), allow_unused=True, materialize_grads=True)  # type: ignore[arg-type]


def _ascend_weights(
    model: nn.Module,
    loss: Callable[[], Tensor],
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
        step, length = _directed(gradient_of(model, loss, {**theta}), norm, correct)
        if not 0 < length < math.inf:
            return None
        if radius is not None:
            optimizer.param_groups[0]["lr"] = radius / config.steps / length
        for value, s in zip(theta.values(), step, strict=True):
            value.grad = s.to(value.dtype)
        optimizer.step()
    if all(torch.equal(value, own[name]) for name, value in theta.items()):
        _refuse_rounding(radius or config.learning_rate or 0.0, next(iter(theta.values())).dtype)
    return {name: value.detach() for name, value in theta.items()}


def _directed(gradient: Step, measure: Callable[[Step], float], correct: Correction | None) -> tuple[Step, float]:
    """Return a gradient, corrected unless it is zero or not finite, and its length."""
    length = measure(gradient)
    if correct is None or not 0 < length < math.inf:
        return gradient, length
    step: Step = correct(gradient)
    return step, measure(step)


def _ascend_low_rank(
    model: nn.Module,
    loss: Callable[[], Tensor],
    names: list[str],
    config: AscentConfig,
    correct: Correction | None,
) -> Parameters | None:
    """Take the same steps without a copy of a weight matrix, or a gradient of one."""
    own = dict(model.named_parameters())
    sign = -1.0 if config.mode == "descent" else 1.0
    radius = None if config.radius is None else radius_of(config, (own[name] for name in names))
    layers = sites(model, names)
    moved: Changes = {}
    for _ in range(config.steps):
        step, length = _directed(slopes(model, names, layers, loss, _at(own, moved)), length_of, correct)
        if not 0 < length < math.inf:
            return None
        rate = sign * (config.learning_rate or 0.0) if radius is None else sign * radius / config.steps / length
        for name, change in step.items():
            moved[name] = added_up(moved[name], change * rate) if name in moved else change * rate
    theta = _at(own, moved)
    if not any(isinstance(value, LowRank) or not torch.equal(value, own[name]) for name, value in theta.items()):
        _refuse_rounding(radius or config.learning_rate or 0.0, own[names[0]].dtype)
    return theta


def _at(own: Mapping[str, Tensor], moved: Changes) -> Parameters:
    """Return theta, given by how much parameters have moved."""
    return {
        name: change if isinstance(change, LowRank) else (own[name].detach() + change).to(own[name].dtype)
        for name, change in moved.items()
    }


def _refuse_rounding(length: float, precision: torch.dtype) -> None:
    raise ValueError(
        f"A step of length {length:g} is lost in the rounding of the weights ({precision}): take a longer one."
    )
