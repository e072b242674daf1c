"""What is compared: every method, its title, and the settings that other queries may choose."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

DAMPINGS = (0.001, 0.1, 0.01, 1.0, 10.0)
"""Multiples of a mean eigenvalue that are tried where a method is relative to it; 0.1 is the usual default."""


@dataclass(frozen=True, eq=False)
class Method:
    """A method of a library.

    Args:
        library (`str`): A module of `peer_runs`.
        name (`str`): The method's name there.
        title (`str`): What it is.
        options (`dict`, defaults to none): Options that make it this method.
        grid (`dict`, defaults to none): Values of the options that the choosing queries may choose, the most promising
            ones first. Without it the method runs with its library's defaults only.
        costly (`bool`, defaults to `False`): Whether its cost is measured for 1 query only, and its settings are
            chosen by fewer queries.
        priced (`bool`, defaults to `False`): Whether its cost is measured.
        training (`bool`, defaults to `False`): Whether it reads models of the training, which some tasks have.
    """

    library: str
    name: str
    title: str
    options: Mapping[str, Any] = field(default_factory=dict)
    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    costly: bool = False
    priced: bool = False
    training: bool = False

    @property
    def key(self) -> str:
        """Its name in files."""
        return f"{self.library}-{self.name}" + "".join(f"-{value}" for value in self.options.values())

    def choices(self) -> list[dict[str, Any]]:
        """Return every combination of the grid's values."""
        return [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]


METHODS = (
    Method("ours", "forward_inf", "**Forward-INF**", priced=True),
    Method("ours", "forward_inf", "Forward-INF, all candidates scored", {"strategy": "full"}),
    Method("ours", "forward_inf", "Forward-INF, all parameters, symmetric", {"modules": "all", "mode": "symmetric"}),
    Method("ours", "forward_inf_gradient", "Forward-INF, along the gradient"),
    Method("ours", "first_order", "first order along K-FAC's step, all parameters"),
    Method("ours", "tracin", "TracIn, dot product"),
    Method("ours", "tracin_cosine", "TracIn, cosine", priced=True),
    Method("ours", "trackstar", "TrackStar", priced=True),
    Method("ours", "influence", "influence functions, EK-FAC", {"direction": "ekfac"}),
    Method("ours", "influence_functions", "influence functions, 10 CG steps", costly=True, priced=True),
    Method("ours", "representation", "hidden states"),
    Method("ours", "bm25", "BM25, no model", priced=True),
    Method("bergson", "ekfac_cg", "EK-FAC + CG, 10 steps", {"num_steps": 10, "tokens": 4096},
           {"damping": (10.0, 1.0, 0.1)}, costly=True, priced=True),
    Method("bergson", "ekfac", "EK-FAC", grid={"damping": DAMPINGS}, priced=True),
    Method("bergson", "cosine", "gradients, cosine", priced=True),
    Method("bergson", "dot", "gradients, dot product"),
    Method("bergson", "shampoo", "Shampoo, corrected eigenvalues"),
    Method("bergson", "source_adam", "SOURCE, for Adam", training=True),
    Method("bergson", "source", "SOURCE", training=True),
    Method("bergson", "trackstar", "TrackStar"),
    Method("bergson", "ekfac_stored", "EK-FAC, gradients stored", priced=True),
    Method("bergson", "trak", "TRAK, one model"),
    Method("bergson", "astra", "ASTRA, 50 steps", {"num_steps": 50, "tokens": 512},
           {"lr": (1e-5, 1e-4)}, costly=True, priced=True),
    Method("bergson", "ekfac_output", "EK-FAC, forward mode", costly=True),
    Method("kronfluence", "ekfac", "EK-FAC",
           grid={"head": (True, False), "damping": (None, 0.01, 0.1, 1.0, 0.001)}, priced=True),
    Method("dattri_llm", "ekfac", "EK-FAC",
           grid={"damping": (1e-5, 0.1, 1e-3, 1e-4, 0.01, 1.0, 10.0), "relative_damping": (True,)}, priced=True),
    Method("dattri_llm", "kfac", "K-FAC"),
    Method("dattri_llm", "cosine", "gradients, cosine"),
    Method("dattri", "ekfac", "EK-FAC"),
    Method("dattri", "trak", "TRAK, one model"),
    Method("captum", "last_layer", "TracInCPFast, last layer", priced=True),
)  # fmt: skip
"""All methods, in the order of the tables."""
