"""Step 2 of the algorithm: move the model up (or down) the loss of one query, on a copy of its parameters."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import cached_property, partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hf_forward_inf.adapters.base import Adapter, Batch, Rows
from hf_forward_inf.fingerprints import fingerprint

Parameters: TypeAlias = dict[str, Tensor]
"""Perturbed parameters by name: theta_K, without what it shares with theta."""

OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}


@dataclass(frozen=True)
class AscentConfig:
    """How the model is perturbed for a query (Algorithm 1, the ascent loop).

    The step is a radius by default: the gradient is normalised, so that every query moves the model by the
    same length. A fixed learning rate, as the paper has it, moves it by rate x gradient norm, and the norms
    of two queries' gradients differ by orders of magnitude.

    Args:
        radius (`float`, *optional*): Length of the path from theta to theta_K, in the Euclidean norm of the
            perturbed parameters, shared equally by the steps. Defaults to 1.0 if no learning rate is given.
        learning_rate (`float`, *optional*): The paper's alpha, instead of a radius.
        optimizer (`str`, defaults to `"sgd"`): `"sgd"` or `"adam"`, with `learning_rate` only.
        steps (`int`, defaults to 1): The paper's K.
        mode (`str`, defaults to `"ascent"`): `"ascent"` or `"descent"`. Either way a higher score means a
            stronger proponent.
        modules (`list[str]`, *optional*): Names of modules or parameters to perturb, `*` allowed
            (`decoder.block.*.layer.1`); `["all"]` for everything. Defaults to what the adapter prefers.
        seed (`int`, defaults to 0): Seeds whatever is drawn at random.

    Raises:
        ValueError: For values that exclude each other or make no step.
    """

    radius: float | None = field(
        default=None, metadata={"help": "Length of the step, from theta to theta_K (default: 1.0)."}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "The paper's fixed learning rate, instead of a radius."}
    )
    optimizer: Literal["sgd", "adam"] = field(
        default="sgd", metadata={"help": "What applies the learning rate: sgd or adam."}
    )
    steps: int = field(default=1, metadata={"help": "Number of steps, the paper's K."})
    mode: Literal["ascent", "descent"] = field(
        default="ascent", metadata={"help": "Raise the query's loss, or lower it."}
    )
    modules: list[str] | None = field(
        default=None, metadata={"help": "Modules to perturb, * allowed; all for every one (default: the adapter's)."}
    )
    seed: int = field(default=0, metadata={"help": "Seeds whatever is drawn at random."})

    def __post_init__(self) -> None:
        if self.radius is None and self.learning_rate is None:
            object.__setattr__(self, "radius", 1.0)
        if self.radius is not None and self.learning_rate is not None:
            raise ValueError("Give either a radius or a learning_rate: each of them sets the length of the step.")
        if self.optimizer != "sgd" and self.learning_rate is None:
            raise ValueError(f"optimizer={self.optimizer!r} needs a learning_rate; a radius takes none.")
        for name, allowed in (("optimizer", ("sgd", "adam")), ("mode", ("ascent", "descent"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {allowed}.")
        for name in ("radius", "learning_rate", "steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be above 0; mode='descent' goes the other way.")
        if isinstance(self.modules, str):
            object.__setattr__(self, "modules", [self.modules])


def perturbed_names(adapter: Adapter, modules: list[str] | None) -> list[str]:
    """List the parameters that ascent will change.

    Args:
        adapter (`Adapter`): Knows the model and its preferred modules.
        modules (`list[str]`, *optional*): As in [`AscentConfig`].

    Raises:
        ValueError: If a pattern names nothing, or only parameters that go by another module's name.
    """
    trainable = {name: p for name, p in adapter.model.named_parameters() if p.is_floating_point()}
    if modules is None:
        # What the adapter names it knows to be there; parameters tied to the prefix stay out.
        prefix = adapter.prefix_parameters()
        chosen = _matching(trainable, adapter.default_modules())
        return [name for name in chosen if name not in prefix] or chosen
    for pattern in modules:
        if not _matching(trainable, [pattern]):
            raise ValueError(_nothing_matches(adapter.model, pattern, trainable))
    return _matching(trainable, modules)


def _matching(names: Iterable[str], patterns: list[str]) -> list[str]:
    def named_by(name: str, pattern: str) -> bool:
        return pattern == "all" or fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")

    return [name for name in names if any(named_by(name, pattern) for pattern in patterns)]


def _nothing_matches(model: nn.Module, pattern: str, names: Iterable[str]) -> str:
    tied = _matching([n for n, _ in model.named_parameters(remove_duplicate=False)], [pattern])
    if tied:
        holder = dict(model.named_parameters(remove_duplicate=False))[tied[0]]
        owner = next(n for n, p in model.named_parameters() if p is holder)
        return f"{tied[0]} is tied to {owner}: perturbing it changes both. Name {owner} if that is wanted."
    known = [name for name, _ in model.named_modules() if name] + list(names)
    close = get_close_matches(pattern, known, n=3)
    tops = sorted({name.split(".")[0] for name in names})
    hint = f" Close: {', '.join(close)}." if close else ""
    return f"No parameter is named by modules={pattern!r}.{hint} The model's top-level modules: {', '.join(tops)}."


class Perturbation:
    """The models theta_K of a block of queries: known by a fingerprint at once, computed when first used.

    Args:
        adapter (`Adapter`): Gives the loss, and knows the model.
        queries (`dict[str, list]`): Encoded queries (`Adapter.encode`), one a row.
        names (`list[str]`): Parameters to perturb ([`perturbed_names`]).
        config (`AscentConfig`): Steps and their length.
    """

    def __init__(self, adapter: Adapter, queries: Rows, names: list[str], config: AscentConfig):
        self.adapter, self.queries, self.names, self.config = adapter, queries, names, config
        self.fingerprint = fingerprint(queries, names, asdict(config))

    def __len__(self) -> int:
        return len(self.queries["terms"])

    @cached_property
    def thetas(self) -> list[Parameters | None]:
        """theta_K of each query, `None` for one that cannot move the model."""
        rows = [{key: [values[i]] for key, values in self.queries.items()} for i in range(len(self))]
        return [ascend(self.adapter, row, self.names, self.config) for row in rows]


def ascend(adapter: Adapter, query: Rows, names: list[str], config: AscentConfig) -> Parameters | None:
    """Take K steps up (or down) the loss of one query (Algorithm 1).

    The model itself is never written to: the steps are taken on copies of the named parameters, which
    `torch.func.functional_call` puts in their place for the length of a call.

    Args:
        adapter (`Adapter`): Gives the loss, and knows the model.
        query (`dict[str, list]`): The encoded query.
        names (`list[str]`): Parameters to perturb.
        config (`AscentConfig`): Steps and their length.

    Returns:
        `dict[str, Tensor]`: theta_K of the named parameters, or `None` where a gradient is zero or not
        finite: such a query cannot move the model.
    """
    model = adapter.model
    own = dict(model.named_parameters())
    theta = {name: own[name].detach().clone().requires_grad_() for name in names}
    optimizer = OPTIMIZERS[config.optimizer](
        theta.values(), lr=config.learning_rate or 0.0, maximize=config.mode == "ascent"
    )
    batch = to_device(adapter.collate(query), model)
    if not adapter.prefix_parameters() & set(names):
        with torch.no_grad():
            batch = adapter.prefix(batch)
    with torch.enable_grad(), torch.random.fork_rng():
        torch.manual_seed(config.seed)
        for _ in range(config.steps):
            loss = adapter.loss(partial(call, model, theta), batch).sum() / sum(query["terms"])
            gradient = torch.autograd.grad(loss, list(theta.values()), allow_unused=True, materialize_grads=True)
            # In float32, tensor by tensor: a half-precision sum of squares overflows.
            norm = torch.stack([g.float().norm() for g in gradient]).norm().item()
            if norm == 0 or not math.isfinite(norm):
                return None
            if config.radius is not None:
                optimizer.param_groups[0]["lr"] = config.radius / config.steps / norm
            for value, g in zip(theta.values(), gradient, strict=True):
                value.grad = g
            optimizer.step()
    return {name: value.detach() for name, value in theta.items()}


def call(model: nn.Module, theta: Parameters, **inputs: Any) -> Any:
    """Run the model with the parameters theta in place of its own; without any, the model as it is."""
    return functional_call(model, theta, (), inputs) if theta else model(**inputs)


def to_device(batch: Batch, model: nn.Module) -> Batch:
    """Move a batch's tensors to the device of the model's first parameter.

    Raises:
        ValueError: If the model's weights are on the meta device, that is, not loaded.
    """
    device = next(model.parameters()).device
    if device.type == "meta":
        raise ValueError("The model's weights are not loaded (they are on the meta device).")
    return {key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and give every module its own mode back afterwards, whatever happens."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode
