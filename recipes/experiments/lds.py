"""A run judged by retraining: train on random halves of the data, and see who foretold what came out (LDS)."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from datasets import Dataset, concatenate_datasets

from experiments.attributor_sets import DIRECTIONS, chosen_directions, contenders
from experiments.retrainable import NETWORKS, Retrainable, digits
from experiments.retrainable_facts import facts
from hf_forward_inf.adapters import Adapter
from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.attribution import Attribution, Attributor
from hf_forward_inf.baselines import Ensemble
from hf_forward_inf.commands.image_task import captioned
from hf_forward_inf.commands.outputs import about, check_output, plotted, write_outputs
from hf_forward_inf.evaluation.tables import REFERENCE, Table, flat
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.report.plots import interval_plot
from hf_forward_inf.scores.metrics import lds
from hf_forward_inf.scores.retraining import Retrained, random_halves
from hf_forward_inf.utils.processes import say

DEFAULTS: dict[str, dict[str, Any]] = {
    "digits": {
        "candidates": 800, "subsets": 120, "seeds": 3, "sample": 1024, "directions": list(DIRECTIONS), "without": [],
        "dampings": [0.1, 0.03, 0.01, 0.006, 0.003, 0.001], "radii": [0.3],
    },
    "facts": {
        "candidates": 400, "subsets": 60, "seeds": 2, "sample": 128,
        "without": ["influence_functions_lissa", "self_retrieval"],
        "directions": ["gradient", "adam", "kfac", "ekfac", "cg_5"],
        "dampings": [0.1, 0.01], "radii": [0.3, 1.0],
    },
}  # fmt: skip
"""What a task takes if the user doesn't say: what two CPU cores do in about twenty minutes."""
SELF_RETRIEVAL_RADII = (0.1, 0.3, 1.0)
"""Radii tried where settings are chosen by self-retrieval."""
CAPTION = (
    "LDS: the rank correlation of what scores foretell and what training on random halves of the candidates did, the "
    "mean over queries and its 95% interval. Settings of the directions were chosen by other queries."
)


@dataclass
class LdsOptions:
    """What to train again and again, and where the results go."""

    output: str = field(default="outputs/lds", metadata={"help": "Folder for metrics, attribution and report."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a finished run in the output folder."})
    task: Literal["digits", "facts"] = field(
        default="digits", metadata={"help": "Images and a small classifier, or sentences and a small mT5."}
    )
    network: str = field(default="perceptron", metadata={"help": f"For digits: {' or '.join(NETWORKS)}."})
    candidates: int | None = field(default=None, metadata={"help": "Training examples (800; facts: 400)."})
    queries: int = field(default=40, metadata={"help": "Queries; as many others serve to choose settings."})
    subsets: int | None = field(default=None, metadata={"help": "Random halves that are trained on (120; facts: 60)."})
    seeds: int | None = field(default=None, metadata={"help": "Trainings of each, averaged (3; facts: 2)."})
    directions: list[str] | None = field(default=None, metadata={"help": f"Of {', '.join(DIRECTIONS)}."})
    dampings: list[float] | None = field(default=None, metadata={"help": "Dampings tried on the other queries."})
    radii: list[float] | None = field(default=None, metadata={"help": "Radii tried on the other queries."})
    sample: int | None = field(default=None, metadata={"help": "Training examples whose curvature counts."})
    without: list[str] | None = field(
        default=None, metadata={"help": "Attributors to leave out (facts: those that take long)."}
    )
    top_k: int = field(default=100, metadata={"help": "Candidates of each query kept in the attribution."})
    seed: int = field(default=0, metadata={"help": "Draws the halves, and whatever else is drawn."})

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise ValueError(f"--network {self.network} is not known: {' or '.join(NETWORKS)}.")
        for name, value in self.defaults().items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        least_of = {"candidates": 2, "queries": 1, "subsets": 2, "seeds": 1, "sample": 1, "top_k": 1}
        for name, least in least_of.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, not {getattr(self, name)}.")
        for name in self.directions or ():
            if name not in DIRECTIONS:
                raise ValueError(f"--directions {name} is not known: {', '.join(DIRECTIONS)}.")
        if REFERENCE in (self.without or ()):
            raise ValueError(f"--without {REFERENCE} leaves nothing to compare with, and nothing to show.")

    def defaults(self) -> dict[str, Any]:
        """Give what the task takes where the user doesn't say."""
        return DEFAULTS[self.task]


def load_task(options: LdsOptions) -> Retrainable:
    """Load what is trained again, and find the queries."""
    assert options.candidates is not None
    if options.task == "facts":
        return facts(options.candidates, options.queries)
    return digits(options.network, options.candidates, options.queries)


@dataclass(frozen=True)
class Trial:
    """A task, and what is known of it before anyone is judged.

    Args:
        task (`Retrainable`): What is trained.
        adapters (`list[Adapter]`): Of models trained on all candidates, one a seed; the first is explained.
        judged (`Retrained`): What training on random halves did to the queries.
        directions (`dict[str, AscentConfig]`): Settings of every direction, chosen by the other queries.
        best (`str`): The best direction by them.
    """

    task: Retrainable
    adapters: list[Adapter]
    judged: Retrained
    directions: dict[str, AscentConfig]
    best: str


def prepare(options: LdsOptions) -> Trial:
    """Load what is trained, train it on random halves, and choose settings by the queries that are not judged."""
    assert options.seeds and options.directions and options.dampings and options.radii
    task = load_task(options)
    judged, others = retrain_halves(task, options)
    adapters = [task.adapter(seed) for seed in range(options.seeds)]
    directions, best = chosen_directions(
        adapters[0], task.candidates, others, names=options.directions, dampings=options.dampings,
        radii=options.radii, sample=options.sample, seed=options.seed,
    )  # fmt: skip
    say(f"The best direction by the LDS of the other queries: {best}.")
    return Trial(task, adapters, judged, directions, best)


def retrain_halves(task: Retrainable, options: LdsOptions) -> tuple[Retrained, Retrained]:
    """Train on random halves; tell what came out for the queries, and for the others."""
    say(
        f"{len(task.candidates)} candidates, {len(task.queries)} queries; "
        f"{options.subsets} random halves x {options.seeds} seeds are retrained, or read from the cache."
    )
    assert options.subsets is not None and options.seeds is not None
    subsets = random_halves(len(task.candidates), options.subsets, options.seed)
    everyone = concatenate_datasets([task.queries, task.others])
    losses = task.retrained(everyone, subsets, options.seeds)[..., 0].mean(axis=0)
    count = len(task.queries)
    return Retrained(task.queries, subsets, losses[:, :count]), Retrained(task.others, subsets, losses[:, count:])


def chosen_by_self_retrieval(
    adapter: Adapter, candidates: Dataset, directions: dict[str, AscentConfig], options: LdsOptions
) -> ForwardInf:
    """Choose direction, damping, radius and hub correction without any retraining ([`tuning.tune`])."""
    tracer = ForwardInf(adapter=adapter, ascent=AscentConfig(modules=["all"], seed=options.seed))
    kinds = list(dict.fromkeys(ascent.direction for ascent in directions.values()))
    tuned = tracer.tune(candidates, directions=kinds, dampings=options.dampings, radii=SELF_RETRIEVAL_RADII)
    say(f"\nBy self-retrieval (* is used):\n{tuned.tuning}")
    return tuned


def lds_run(options: LdsOptions) -> dict[str, Any]:
    """Run it all and write `metrics.json`, `attribution/` and `report.html` into the output folder.

    `lds` of the default and `{name}/lds` of everyone else, with intervals; the report shows what the default found.
    Retrained losses and passes are kept as they are computed: a run that was interrupted goes on from there.

    Raises:
        FileExistsError: If the folder holds a finished run and `overwrite` is not set.
        OSError: If the folder can't be written to. Both before anything is computed.
    """
    started = time.perf_counter()
    folder = check_output(options.output, options.overwrite)
    trial = prepare(options)
    task, judged = trial.task, trial.judged
    everyone = contenders(trial.adapters, trial.directions)
    if "self_retrieval" not in (options.without or ()):
        tuned = chosen_by_self_retrieval(trial.adapters[0], task.candidates, trial.directions, options)
        everyone["self_retrieval"] = tuned
    say(f"\n{'':28}  LDS   95% interval   damping  radius  seconds")
    table: Table = {}
    for name, attributor in everyone.items():
        if name in (options.without or ()):
            continue
        start = time.perf_counter()
        found = attributor.trace(task.queries, task.candidates)
        figures = {**lds(found.dense(), judged.subsets, judged.losses), "seconds": time.perf_counter() - start}
        table[name] = figures | _settings(attributor)
        say(_line(name, table[name]))
        if name == REFERENCE:
            shown = found
    metrics: dict[str, Any] = {"queries": len(task.queries), "candidates": len(task.candidates), **flat(table)}
    metrics |= {f"tuned/{key}": value for key, value in table.get(trial.best, {}).items()}
    metrics |= {"tuned/direction": trial.best, **about(options, ForwardInf(adapter=trial.adapters[0]))}
    metrics["total_seconds"] = time.perf_counter() - started
    plot = plotted(partial(interval_plot, "lds"), table)
    write_outputs(
        folder, presented(shown, {}, options.top_k), metrics, table, None, plot,
        columns=("lds", "lds_low", "lds_high"), plot_caption=CAPTION, title="Who foretold what retraining did?",
    )  # fmt: skip
    say(f"Written: {folder}")
    return metrics


def presented(found: Attribution, notes: Mapping[int, str], top_k: int) -> Attribution:
    """Make an attribution ready for the report: the best candidates, pictures with words."""
    kept = found.keep(min(top_k, len(found.candidates)))
    return captioned(kept, notes) if "image" in found.candidates.column_names else kept


def _settings(attributor: Attributor) -> dict[str, float]:
    """Damping and radius, where it has them."""
    one = attributor.attributors[0] if isinstance(attributor, Ensemble) else attributor
    ascent = getattr(one, "ascent", None)
    own = {"damping": ascent and ascent.damping, "radius": ascent and ascent.radius}
    return {name: value for name, value in own.items() if value is not None}


def _line(name: str, figures: dict[str, float]) -> str:
    settings = "".join(f"{figures[key]:8g}" if key in figures else " " * 8 for key in ("damping", "radius"))
    interval = f"{figures['lds_low']:.3f} - {figures['lds_high']:.3f}"
    return f"{name:27} {figures['lds']:.3f}  {interval:>13}  {settings} {figures['seconds']:8.1f}"
