"""The linear datamodeling score: what is trained on random halves, and how settings are chosen."""

from dataclasses import dataclass, field
from typing import Any, Literal

from datasets import Dataset, concatenate_datasets

from experiments.attributor_sets import DIRECTIONS, chosen_directions, grid
from experiments.retrainable import NETWORKS, Retrainable, digits
from experiments.retrainable_facts import facts
from experiments.retrainable_sentences import sentences
from hf_forward_inf.adapters import Adapter
from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.attribution import Attributor
from hf_forward_inf.baselines import Ensemble
from hf_forward_inf.evaluation.tables import REFERENCE
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.scores.retraining import Retrained, random_halves
from hf_forward_inf.utils.options import RunOptions
from hf_forward_inf.utils.processes import say
from hf_forward_inf.utils.text_tables import aligned, number

DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {
        "num_candidates": 800, "subsets": 120, "seeds": 3, "sample": 1024, "without": [],
        "directions": list(DIRECTIONS), "dampings": [0.1, 0.03, 0.01, 0.006, 0.003, 0.001], "radii": [0.3],
    },
    "facts": {
        "num_candidates": 400, "subsets": 60, "seeds": 2, "sample": 128,
        "without": ["influence_functions_lissa", "self_retrieval"],
        "directions": ["gradient", "kfac", "ekfac", "cg_5"],
        "dampings": [0.1, 0.01], "radii": [0.3, 1.0],
    },
    "sentences": {
        "num_candidates": 600, "subsets": 60, "seeds": 2, "sample": 128,
        "without": ["influence_functions_lissa", "self_retrieval"],
        "directions": ["gradient", "kfac", "ekfac", "cg_5"], "dampings": [0.1, 0.01], "radii": [0.3, 1.0],
    },
}  # fmt: skip
"""Values of options that are unset, by task: about twenty minutes on two CPU cores."""
SELF_RETRIEVAL_RADII = (0.1, 0.3, 1.0)
"""Radii tried where settings are chosen by self-retrieval."""
WIDTHS = (27, 6, 14, 7, 6, 7)
"""Widths of the columns that are printed."""
HEAD = aligned(("", "LDS", "95% interval", "damping", "radius", "seconds"), WIDTHS)
CAPTION = (
    "LDS: the rank correlation between the losses that scores predict and those after training on random halves of "
    "the candidates; mean over queries, with its 95% interval. Settings of the directions were chosen by other "
    "queries."
)


@dataclass
class LdsOptions(RunOptions):
    """What to train again and again, and where the results go.

    Args:
        task (`str`, defaults to `"digits"`): Images and a small classifier (digits), masked sentences and a small mT5
            (facts), or whole sentences and a small Llama (sentences).
        network (`str`, defaults to `"perceptron"`): For digits: perceptron or conv.
        num_candidates (`int`, *optional*): Training examples. Defaults to 800; facts: 400; sentences: 600.
        num_queries (`int`, defaults to 40): Queries; as many others serve to choose settings.
        subsets (`int`, *optional*): Random halves that are trained on. Defaults to 120; of language models 60.
        seeds (`int`, *optional*): Trainings of each half, averaged. Defaults to 3; of language
            models 2.
        directions (`list[str]`, *optional*): Directions of the ascent to compare.
        dampings (`list[float]`, *optional*): Dampings tried on the other queries.
        radii (`list[float]`, *optional*): Radii tried on the other queries.
        sample (`int`, *optional*): Training examples whose curvature counts.
        without (`list[str]`, *optional*): Attributors to leave out. Defaults to none; of language models the
            slow ones.
    """

    output: str = "outputs/lds"
    task: Literal["digits", "facts", "sentences"] = "digits"
    network: str = field(default="perceptron", metadata={"choices": tuple(NETWORKS)})
    num_candidates: int | None = field(default=None, metadata={"min": 2})
    num_queries: int = field(default=40, metadata={"min": 1})
    subsets: int | None = field(default=None, metadata={"min": 2})
    seeds: int | None = field(default=None, metadata={"min": 1})
    directions: list[str] | None = field(default=None, metadata={"choices": tuple(DIRECTIONS)})
    dampings: list[float] | None = field(default=None, metadata={"above": 0})
    radii: list[float] | None = field(default=None, metadata={"above": 0})
    sample: int | None = field(default=None, metadata={"min": 1})
    without: list[str] | None = None

    def __post_init__(self) -> None:
        for name, value in self.defaults().items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__()
        if REFERENCE in (self.without or ()):
            raise ValueError(f"--without {REFERENCE} leaves nothing to compare with, and nothing to show.")

    def defaults(self) -> dict[str, Any]:
        """Return the task's values of options that are unset."""
        return DEFAULTS[self.task]


def load_task(options: LdsOptions) -> Retrainable:
    """Load what is trained again, and find the queries."""
    assert options.num_candidates is not None
    if options.task == "digits":
        return digits(options.network, options.num_candidates, options.num_queries)
    make = {"facts": facts, "sentences": sentences}[options.task]
    return make(options.num_candidates, options.num_queries)


def retrain_halves(task: Retrainable, options: LdsOptions) -> tuple[Retrained, Retrained]:
    """Train on random halves, or read the cached losses: those of the queries, and those of the others."""
    assert options.subsets is not None and options.seeds is not None
    say(
        f"{len(task.candidates)} candidates, {len(task.queries)} queries; "
        f"{options.subsets} random halves x {options.seeds} seeds are trained on, or read from the cache."
    )
    subsets = random_halves(len(task.candidates), options.subsets, options.seed)
    everyone = concatenate_datasets([task.queries, task.others])
    losses = task.retrained(everyone, subsets, options.seeds)[..., 0].mean(axis=0)
    count = len(task.queries)
    return Retrained(task.queries, subsets, losses[:, :count]), Retrained(task.others, subsets, losses[:, count:])


def choose_directions(
    adapter: Adapter, task: Retrainable, others: Retrained, options: LdsOptions
) -> tuple[dict[str, AscentConfig], str]:
    """Choose settings of every direction, and the best direction, by the LDS of queries that are not evaluated."""
    assert options.directions and options.dampings and options.radii
    directions, best = chosen_directions(
        adapter, task.candidates, others, names=options.directions, dampings=options.dampings, radii=options.radii,
        sample=options.sample, seed=options.seed,
    )  # fmt: skip
    say(f"The best direction by the LDS of the other queries: {best}.")
    return directions, best


def tune_without_labels(
    adapter: Adapter, candidates: Dataset, directions: dict[str, AscentConfig], options: LdsOptions
) -> ForwardInf:
    """Choose direction, damping and radius by self-retrieval, without retraining ([`tuning.tune`])."""
    assert options.dampings
    kinds = {ascent.direction: ascent for ascent in directions.values()}
    settings = [one for ascent in kinds.values() for one in grid(ascent, options.dampings, SELF_RETRIEVAL_RADII)]
    tuned = ForwardInf(adapter=adapter).tune(candidates, settings, seed=options.seed)
    say(f"\nBy self-retrieval (* is used):\n{tuned.tuning}")
    return tuned


def step_of(attributor: Attributor) -> dict[str, float]:
    """Return damping and radius of an attributor that has them."""
    one = attributor.attributors[0] if isinstance(attributor, Ensemble) else attributor
    ascent = getattr(one, "ascent", None)
    if ascent is None:
        return {}
    own = {"damping": ascent.damping, "radius": ascent.radius}
    return {name: value for name, value in own.items() if value is not None}


def line(name: str, figures: dict[str, float]) -> str:
    """Return figures as a line of a table."""
    interval = f"{figures['lds_low']:.3f} - {figures['lds_high']:.3f}"
    settings = [number(figures.get(key), "g") for key in ("damping", "radius")]
    cells = (name, number(figures["lds"]), interval, *settings, number(figures["trace_seconds"], ".1f"))
    return aligned(cells, WIDTHS)
