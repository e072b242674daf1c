"""How far the model is moved for a query, and in which direction: the options of the ascent."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch

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
