"""Step 2 of the algorithm: move the model up (or down) the loss of one query, on a copy of its parameters."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal, Protocol, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_forward_inf.adapters.base import Adapter, Batch, Rows
from hf_forward_inf.fingerprints import fingerprint
from hf_forward_inf.lora import RANK, LowRank, added, is_quantised, peft_parameters, slopes
from hf_forward_inf.modules import perturbed_names

Parameters: TypeAlias = dict[str, Tensor | LowRank]
"""Perturbed parameters by name, or changes of them: theta_K, without what it shares with theta."""

Correction: TypeAlias = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""Makes the direction of a step of a gradient, both one tensor a perturbed parameter."""

ITERATIONS = {"cg": 10}
"""Products of conjugate gradients if the user doesn't say."""
DAMPING = dict.fromkeys(("adam", "kfac", "ekfac", "cg"), 0.1)
"""The directions that correct the gradient by curvature, and their damping if the user gives none."""
SAMPLE = {"adam": 1024, "kfac": 1024, "ekfac": 1024, "cg": 128}
"""Training examples whose curvature counts if the user doesn't say: `cg` pays for each at every query."""
OF_DIRECTION = ("damping", "iterations", "sample", "second_moments")
"""Options that mean something to their direction alone."""
OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}


@dataclass(frozen=True)
class AscentConfig:
    """How the model is perturbed for a query (Algorithm 1, the ascent loop).

    The step is a radius by default: the gradient is normalised, so that every query moves the model by the
    same length. A fixed learning rate, as the paper has it, moves it by rate x gradient norm, and the norms
    of two queries' gradients differ by orders of magnitude.

    Args:
        radius (`float`, *optional*): Length of the path from theta to theta_K, in the Euclidean norm of the
            perturbed parameters, shared equally by the steps. Defaults to what the adapter prefers; to 1.0 if a
            direction is named.
        relative (`bool`, defaults to `False`): The radius is told as a share of the norm of the parameters that are
            perturbed, so that one value serves models of any size, and parts of them.
        learning_rate (`float`, *optional*): The paper's alpha, instead of a radius.
        optimizer (`str`, defaults to `"sgd"`): `"sgd"` or `"adam"`, with `learning_rate` only.
        steps (`int`, defaults to 1): The paper's K.
        mode (`str`, defaults to `"ascent"`): `"ascent"`, `"descent"`, or `"symmetric"`: half the difference of the
            losses after a step up and after the same step down, two passes. Always a higher score means a stronger
            proponent.
        modules (`list[str]`, *optional*): Names of modules or parameters to perturb, `*` allowed
            (`decoder.block.*.layer.1`); `["all"]` for everything. Defaults to what the adapter prefers.
        direction (`str`, *optional*): Where the step goes, before it gets its length: along the query's `"gradient"`,
            or along C^-1 g, with C the curvature of the loss over a sample of the candidates, which are taken to be
            the training data ([`directions`]): `"cg"` (conjugate gradients on Gauss-Newton products), `"ekfac"` or
            `"kfac"` (Kronecker factors, fitted once for all queries), `"adam"` (root second moments). The candidates
            are only forwarded, whatever the direction. Defaults to what the adapter prefers, and what it prefers with
            it ([`completed`]); to the gradient with `learning_rate` or `lora_rank`, which allow no other.
        damping (`float`, *optional*): lambda of (C + lambda I)^-1 g, as a multiple of the gradient's Rayleigh quotient
            g.Cg / g.g, that is, relative to the curvature that the gradient meets; for `"adam"`, of the mean second
            moment. Defaults to 0.1.
        iterations (`int`, *optional*): Products of `"cg"` at most, each 2 to 2.5 forward passes over the sample.
            Defaults to 10.
        tolerance (`float`, defaults to 1e-3): `"cg"` stops when the residual has shrunk to this part of the gradient.
        sample (`int`, *optional*): Candidates whose curvature counts. Defaults to 128 for `"cg"`, else to 1024.
        second_moments (`str`, *optional*): For `"adam"`: a Trainer's `optimizer.pt` or its folder. By default second
            moments are estimated on the sample.
        lora_rank (`int`, *optional*): Leave the weights alone, and perturb linear layers through a fresh LoRA of this
            rank at most. Its A is not drawn, but spans what each layer reads of the query, so that up to the query's
            tokens the step is the gradient's own, and beyond that nearest to it. Any weights will do, and a
            perturbed model takes next to no memory. The output layer stays out unless named. Defaults to 64 where
            weights are quantised, else to perturbing the weights.
        seed (`int`, defaults to 0): Seeds whatever is drawn at random.

    Raises:
        ValueError: For values that exclude each other or make no step.
    """

    radius: float | None = field(
        default=None,
        metadata={
            "help": "Length of the step, from theta to theta_K (default: the adapter's, 1.0 along a named direction)."
        },
    )
    relative: bool = field(
        default=False, metadata={"help": "Tell the radius as a share of the norm of the perturbed parameters."}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "The paper's fixed learning rate, instead of a radius."}
    )
    optimizer: Literal["sgd", "adam"] = field(
        default="sgd", metadata={"help": "What applies the learning rate: sgd or adam."}
    )
    steps: int = field(default=1, metadata={"help": "Number of steps, the paper's K."})
    mode: Literal["ascent", "descent", "symmetric"] = field(
        default="ascent", metadata={"help": "Raise the query's loss, lower it, or compare both (two passes)."}
    )
    modules: list[str] | None = field(
        default=None, metadata={"help": "Modules to perturb, * allowed; all for every one (default: the adapter's)."}
    )
    direction: Literal["gradient", "adam", "kfac", "ekfac", "cg"] | None = field(
        default=None,
        metadata={
            "help": "Direction of the step: the query's gradient, or that corrected by curvature "
            "(default: what is best for this kind of model)."
        },
    )
    damping: float | None = field(
        default=None, metadata={"help": "Damping of the correction, relative to the curvature (default: 0.1)."}
    )
    iterations: int | None = field(default=None, metadata={"help": "Products of cg at most (default: 10)."})
    tolerance: float = field(default=1e-3, metadata={"help": "Relative residual at which cg stops."})
    sample: int | None = field(
        default=None, metadata={"help": "Candidates whose curvature counts (default: 128 for cg, else 1024)."}
    )
    second_moments: str | None = field(
        default=None, metadata={"help": "For adam: a Trainer's optimizer.pt or its folder (default: estimated)."}
    )
    lora_rank: int | None = field(
        default=None,
        metadata={"help": "Perturb through a fresh LoRA of this rank (default: 64, where weights are quantised)."},
    )
    seed: int = field(default=0, metadata={"help": "Seeds whatever is drawn at random."})

    def __post_init__(self) -> None:
        if self.direction is None and (self.learning_rate is not None or self.lora_rank is not None):
            object.__setattr__(self, "direction", "gradient")
        if self.radius is not None and self.learning_rate is not None:
            raise ValueError("Give either a radius or a learning_rate: each of them sets the length of the step.")
        if self.relative and (self.learning_rate is not None or self.lora_rank is not None):
            raise ValueError("relative=True tells a radius of the weights: leave out learning_rate and lora_rank.")
        if self.optimizer != "sgd" and self.learning_rate is None:
            raise ValueError(f"optimizer={self.optimizer!r} needs a learning_rate; a radius takes none.")
        choices = {
            "optimizer": tuple(OPTIMIZERS),
            "mode": ("ascent", "descent", "symmetric"),
            "direction": (None, "gradient", *DAMPING),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {allowed}.")
        self._check_direction()
        for name in ("radius", "learning_rate", "steps", "damping", "iterations", "tolerance", "sample", "lora_rank"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                hint = "; mode='descent' goes the other way" if name in ("radius", "learning_rate") else ""
                raise ValueError(f"{name}={value} must be above 0{hint}.")
        if isinstance(self.modules, str):
            object.__setattr__(self, "modules", [self.modules])
        if self.direction is not None:
            self._fill()

    def _check_direction(self) -> None:
        if self.direction == "gradient":
            for name in ("damping", "sample"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(self, name)} is for a correction, and direction='gradient' has none. "
                        "Give direction='cg', 'ekfac', 'kfac' or 'adam', or leave it out."
                    )
        elif self.learning_rate is not None:
            raise ValueError(
                f"direction={self.direction!r} needs a radius: the length of a corrected gradient says nothing, so a "
                "learning_rate can't be applied to it."
            )
        if self.lora_rank is not None and (self.direction != "gradient" or self.optimizer != "sgd"):
            raise ValueError(
                "lora_rank goes along the gradient alone: a correction by curvature, or Adam, needs the weights' own "
                "gradients. Leave out direction and optimizer, or lora_rank."
            )
        if self.second_moments is not None and self.direction != "adam":
            raise ValueError(f"second_moments are read by direction='adam', not by {self.direction!r}.")

    def _fill(self) -> None:
        """Give what a named direction leaves open its defaults."""
        if self.radius is None and self.learning_rate is None:
            object.__setattr__(self, "radius", 1.0)
        defaults: dict[str, dict[str, Any]] = {"damping": DAMPING, "sample": SAMPLE, "iterations": ITERATIONS}
        for name, by_direction in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, by_direction.get(cast(str, self.direction)))

    def along(self, direction: str) -> "AscentConfig":
        """Give the same step along another direction, with that direction's defaults."""
        options: dict[str, Any] = {"direction": direction, **dict.fromkeys(OF_DIRECTION)}
        return replace(self, **options)

    def completed(self, preferred: Mapping[str, Any]) -> "AscentConfig":
        """Fill in all that is open if no direction is named.

        Args:
            preferred (`dict`): Options that an adapter prefers ([`Adapter.default_ascent`]); without a direction
                among them the gradient is preferred.

        Returns:
            `AscentConfig`: With a direction, and all that it needs.
        """
        if self.direction is not None:
            return self
        told = {"radius", "relative"} if self.radius is not None else set()
        open_ = {name: value for name, value in preferred.items() if name not in told and not getattr(self, name)}
        return replace(self, **{"direction": "gradient", **open_})


def lora_rank(adapter: Adapter, config: AscentConfig) -> int | None:
    """Give the rank of the fresh LoRA that ascent goes through; `None` where it changes the weights themselves.

    Raises:
        ValueError: If weights are quantised and the direction needs their gradients.
    """
    if config.lora_rank is not None:
        return config.lora_rank
    if peft_parameters(adapter.model) or not is_quantised(adapter.model):
        return None
    if config.direction != "gradient" or config.optimizer != "sgd" or config.relative:
        raise ValueError(
            "The model's weights are quantised, so that it is perturbed through a fresh LoRA, and that goes along the "
            "gradient alone, by an absolute radius: leave out direction, optimizer and relative, or load the model "
            "unquantised."
        )
    return RANK


def radius_of(config: AscentConfig, parameters: Iterable[Tensor]) -> float:
    """Give the length of the path, which may be told relative to the norm of the perturbed parameters."""
    assert config.radius is not None
    return config.radius * norm([value.detach() for value in parameters]) if config.relative else config.radius


def names_for(adapter: Adapter, config: AscentConfig) -> list[str]:
    """List the parameters that ascent will change, or add a LoRA to ([`modules.perturbed_names`])."""
    return perturbed_names(adapter, config.modules, lora=lora_rank(adapter, config) is not None)


class Direction(Protocol):
    """What corrects gradients by curvature: known by a fingerprint at once, ready when first used."""

    fingerprint: str

    def ready(self) -> Correction:
        """Give what turns gradients into directions; whatever it holds is let go of with it."""
        ...


class Perturbation:
    """The models theta_K of a block of queries: known by a fingerprint at once, computed when first used.

    Args:
        adapter (`Adapter`): Gives the loss, and knows the model.
        queries (`dict[str, list]`): Encoded queries (`Adapter.encode`), one a row.
        names (`list[str]`): Parameters to perturb ([`modules.perturbed_names`]).
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
        correct = None if self.direction is None else self.direction.ready()
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
    model = adapter.model
    batch = to_device(adapter.collate(query), model)
    if not adapter.prefix_parameters() & set(names):
        with torch.no_grad():
            batch = adapter.prefix(batch)

    def loss(theta: Parameters) -> Tensor:
        mean = adapter.loss(partial(call, model, theta), batch).sum() / sum(query["terms"])
        if config.radius is None or mean.item() == 0:
            return mean
        # Only the direction counts: in units of the loss itself, the gradient of a memorised query has an ordinary
        # length, where its own would vanish in float32.
        return mean / mean.detach().abs()

    rank = lora_rank(adapter, config)
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


def norm(vector: Sequence[Tensor]) -> float:
    """Give a vector's Euclidean norm, in float32 tensor by tensor: a half-precision sum of squares overflows."""
    return torch.stack([part.float().norm() for part in vector]).norm().item()


def call(model: nn.Module, theta: Mapping[str, Tensor | LowRank], **inputs: Any) -> Any:
    """Run the model with the parameters theta in place of its own; without any, the model as it is."""
    whole = {name: value for name, value in theta.items() if isinstance(value, Tensor)}
    with added(model, {name: value for name, value in theta.items() if isinstance(value, LowRank)}):
        return functional_call(model, whole, (), inputs) if whole else model(**inputs)


def to_device(batch: Batch, model: nn.Module) -> Batch:
    """Move a batch's tensors to the device of the model's first parameter.

    Raises:
        ValueError: If the model's weights are on the meta device, that is, not loaded.
    """
    device = next(model.parameters()).device
    if device.type == "meta":
        raise ValueError("The model's weights are not loaded (they are on the meta device).")
    return {key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()}
