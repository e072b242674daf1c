"""How far the model is moved for a query, and in which direction: the options of the ascent."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hf_forward_inf.utils.options import check_fields

OF_DIRECTION: dict[str, dict[str, Any]] = {
    "gradient": {},
    "kfac": {"damping": 0.1, "sample": 1024},
    "ekfac": {"damping": 0.1, "sample": 1024},
    "cg": {"damping": 0.1, "sample": 128, "iterations": 10},
    "pcg": {"damping": 0.01, "sample": 1024, "iterations": 3},
}
"""Options that only some directions have, with their defaults; `cg` uses every row of its sample at every query."""
RADIUS = {False: 1.0, True: 1e-3}
"""Default radius: absolute, and relative to the norm of the perturbed parameters."""
OPTIMIZERS = ("sgd", "adam")
MODES = ("ascent", "descent", "symmetric")
STEPS = ("low_rank", "full")
LOW_RANK = (None, "gradient", "kfac")
"""Directions that a step of low rank can have; `None` is one to be chosen."""
POSITIVE = {"above": 0}


def no_defaults(direction: str | None) -> Mapping[str, Any]:
    """Return no defaults: those of [`AscentConfig`] apply."""
    return {}


@dataclass(frozen=True)
class AscentConfig:
    """How the model is perturbed for a query (Algorithm 1, the ascent loop).

    The length of the step is a radius by default: the gradient is normalised, so that every query moves the model by
    the same length. A fixed learning rate, as in the paper, moves it by rate x gradient norm, and the gradient norms
    of two queries differ by orders of magnitude.

    `None` means unset. Unset options take the adapter's defaults for the direction ([`Adapter.default_ascent`]), then
    the defaults below: naming a default changes nothing.

    Args:
        radius (`float`, *optional*): Length of the path from theta to theta_K, in the Euclidean norm of the perturbed
            parameters, divided equally among the steps. Defaults to the adapter's, else to 1.0 (1e-3 if relative).
        relative (`bool`, *optional*): Whether the radius is a share of the norm of the perturbed parameters, so that
            one value suits models of any size. Defaults to False if a radius is given, else to the adapter's.
        trust (`float`, *optional*): Length of the path as its effect: the change of the model's predictions on some
            training examples, the mean KL divergence in nats for each prediction, the same for every query
            ([`trust.TrustRegion`]). The radius is then only where the search for the length begins.
        learning_rate (`float`, *optional*): The paper's alpha, instead of a radius.
        optimizer (`str`, defaults to `"sgd"`): `"sgd"` or `"adam"`, with `learning_rate` only.
        steps (`int`, defaults to 1): The paper's K.
        mode (`str`, defaults to `"ascent"`): `"ascent"`, `"descent"`, or `"symmetric"`: half the difference between
            the losses after a step up and after the same step down, which takes two passes. In every mode a higher
            score means a stronger proponent.
        modules (`list[str]`, *optional*): Names of modules or parameters to perturb, `*` allowed
            (`decoder.block.*.layer.1`); `all` for every parameter. Defaults to the adapter's.
        direction (`str`, *optional*): Direction of the step: the query's `"gradient"` g, or C^-1 g, with C the
            curvature of the training loss on a sample ([`directions`]): `"cg"` (conjugate gradients on Gauss-Newton
            products), `"ekfac"` or `"kfac"` (Kronecker factors, fitted once for all queries), `"pcg"` (products
            preconditioned by `"kfac"`, and shared by the queries traced together). Candidates are only forwarded,
            whatever the direction. Defaults to the adapter's; to the gradient with `learning_rate`,
            which allows no other.
        damping (`float`, *optional*): lambda in (C + lambda I)^-1 g, as a multiple of the gradient's Rayleigh quotient
            g.Cg / g.g, that is, relative to the curvature along the gradient; for `"pcg"`, of the median
            quotient of the queries traced together. Defaults to the adapter's, else to 0.1; for `"pcg"` to 0.01.
        iterations (`int`, *optional*): Maximum number of products a query for `"cg"` and `"pcg"`, each 2 to 2.5
            forward passes over the sample. Defaults to 10 and 3.
        tolerance (`float`, defaults to 1e-3): `"cg"` stops at this residual, relative to the gradient's norm.
        sample (`int`, *optional*): Number of training examples on which the curvature is estimated. Defaults to the
            adapter's, else to 128 for `"cg"` and 1024 for the others.
        memory (`float`, *optional*): Memory for the factors of `"kfac"`, `"ekfac"` and `"pcg"`, as a share of the
            model's weights. It decides how many eigenpairs of each are stored ([`kronecker.KroneckerFit`]). Defaults
            to 0.25, and 64 MB at least.
        step (`str`, *optional*): `"low_rank"`: weight matrices change by sums of outer products, at most as many as
            the query has tokens, times steps, and the rows of embeddings that it reads; no gradient and no copy of a
            matrix is made, so that weights may be quantised. `"full"`: all weights change. Along the gradient both are
            the same step; for `"kfac"`, the damping of a step of low rank is divided among both factors
            ([`inverse.factored_inverse`]). Other directions have full steps only. Defaults to low rank where it can be
            had.
        seed (`int`, defaults to 0): Seed of the sample, of drawn targets and of dropout.

    Raises:
        ValueError: If options exclude each other, or are out of range.
    """

    radius: float | None = field(default=None, metadata=POSITIVE)
    relative: bool | None = None
    trust: float | None = field(default=None, metadata=POSITIVE)
    learning_rate: float | None = field(default=None, metadata=POSITIVE)
    optimizer: Literal["sgd", "adam"] = field(default="sgd", metadata={"choices": tuple(OPTIMIZERS)})
    steps: int = field(default=1, metadata=POSITIVE)
    mode: Literal["ascent", "descent", "symmetric"] = field(default="ascent", metadata={"choices": MODES})
    modules: list[str] | None = None
    direction: Literal["gradient", "kfac", "ekfac", "cg", "pcg"] | None = field(
        default=None, metadata={"choices": tuple(OF_DIRECTION)}
    )
    damping: float | None = field(default=None, metadata=POSITIVE)
    iterations: int | None = field(default=None, metadata=POSITIVE)
    tolerance: float = field(default=1e-3, metadata=POSITIVE)
    sample: int | None = field(default=None, metadata=POSITIVE)
    memory: float | None = field(default=None, metadata=POSITIVE)
    step: Literal["low_rank", "full"] | None = field(default=None, metadata={"choices": STEPS})
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.modules, str):
            object.__setattr__(self, "modules", [self.modules])
        check_fields(self)
        self._check_length()
        self._check_direction()

    def _check_length(self) -> None:
        for name in ("radius", "trust"):
            if getattr(self, name) is not None and self.learning_rate is not None:
                raise ValueError(f"Give either a {name} or a learning_rate: each of them sets the length of the step.")
        if self.relative and self.learning_rate is not None:
            raise ValueError("relative=True is for a radius: leave it out with learning_rate.")
        if self.optimizer != "sgd" and self.learning_rate is None:
            raise ValueError(f"optimizer={self.optimizer!r} needs a learning_rate, not a radius.")

    def _check_direction(self) -> None:
        direction = self.direction or self._only_direction
        if direction == "gradient":
            for name in ("damping", "sample", "iterations", "memory"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(self, name)} is for a correction, and direction='gradient' has none. "
                        "Give direction='cg', 'pcg', 'ekfac' or 'kfac', or leave it out."
                    )
        if direction not in (None, "gradient") and self.learning_rate is not None:
            raise ValueError(
                f"direction={direction!r} needs a radius: the length of a corrected gradient has no meaning, so a "
                "learning_rate can't be applied to it."
            )
        if self.step == "low_rank" and (direction not in LOW_RANK or self.optimizer != "sgd"):
            raise ValueError(
                f"step='low_rank' can't follow direction={direction!r} with optimizer={self.optimizer!r}: weights "
                "would change one by one. Take direction='kfac' or 'gradient', or step='full'."
            )

    @property
    def _only_direction(self) -> str | None:
        """The only direction that other options allow, if they do."""
        return "gradient" if self.learning_rate is not None else None

    def along(self, direction: str) -> "AscentConfig":
        """Return the same step in another direction, whose own options are unset."""
        unset = dict.fromkeys(("damping", "sample", "iterations", "memory", "step"))
        return replace(self, direction=direction, **unset)  # type: ignore[arg-type]

    def completed(self, defaults: Callable[[str | None], Mapping[str, Any]] = no_defaults) -> "AscentConfig":
        """Set every unset option.

        Args:
            defaults (`Callable`, *optional*): An adapter's [`Adapter.default_ascent`]: given a direction, or `None`
                for the preferred one, returns options. Without a direction among them the gradient is preferred.

        Returns:
            `AscentConfig`: With a direction and all that it needs, and a radius or a learning rate.

        Raises:
            ValueError: If an option is set that the preferred direction does not have.
        """
        direction = self.direction or self._only_direction
        preferred = dict(defaults(direction))
        direction = direction or preferred.get("direction", "gradient")
        chosen = OF_DIRECTION[direction] | preferred | {"direction": direction} | self._length(preferred)
        chosen |= {"step": self._default_step(direction, preferred)}
        return replace(self, **{name: value for name, value in chosen.items() if getattr(self, name) is None})

    def _default_step(self, direction: str, preferred: Mapping[str, Any]) -> str:
        if direction not in LOW_RANK or self.optimizer != "sgd":
            return "full"
        return preferred.get("step", "low_rank")

    def _length(self, preferred: Mapping[str, Any]) -> dict[str, Any]:
        """Return radius and relative, which only make sense together."""
        if self.learning_rate is not None:
            return {"radius": None, "relative": False}
        relative = bool(preferred.get("relative")) and self.radius is None
        if self.relative is not None:
            relative = self.relative
        if relative == bool(preferred.get("relative")):
            return {"radius": preferred.get("radius", RADIUS[relative]), "relative": relative}
        return {"radius": RADIUS[relative], "relative": relative}
