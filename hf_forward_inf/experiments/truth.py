"""A run judged by retraining: train on random halves of the data, and see who foretold what came out (LDS)."""

import time
from dataclasses import dataclass, field
from typing import Any, Literal

from datasets import Dataset, concatenate_datasets

from hf_forward_inf.adapters import Adapter
from hf_forward_inf.ascent import AscentConfig
from hf_forward_inf.attribution import Attributor
from hf_forward_inf.baselines import Ensemble
from hf_forward_inf.experiments.contenders import DIRECTIONS, chosen_directions, contenders
from hf_forward_inf.experiments.evaluation import flat
from hf_forward_inf.experiments.retrainable import NETWORKS, Retrainable, digits
from hf_forward_inf.experiments.retrainable_facts import facts
from hf_forward_inf.experiments.run import check_output, environment, write_metrics
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.metrics import lds
from hf_forward_inf.processes import say
from hf_forward_inf.retraining import Retrained, random_halves, retrained_losses

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


@dataclass
class TruthOptions:
    """What to train again and again, and where the results go."""

    output: str = field(default="outputs/lds", metadata={"help": "Folder for metrics.json."})
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
    seed: int = field(default=0, metadata={"help": "Draws the halves, and whatever else is drawn."})

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise ValueError(f"--network {self.network} is not known: {' or '.join(NETWORKS)}.")
        for name, value in DEFAULTS[self.task].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        for name, least in {"candidates": 2, "queries": 1, "subsets": 2, "seeds": 1, "sample": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, not {getattr(self, name)}.")
        for name in self.directions or ():
            if name not in DIRECTIONS:
                raise ValueError(f"--directions {name} is not known: {', '.join(DIRECTIONS)}.")


def load_task(options: TruthOptions) -> Retrainable:
    """Load what is trained again, and find the queries."""
    assert options.candidates is not None
    if options.task == "facts":
        return facts(options.candidates, options.queries)
    return digits(options.network, options.candidates, options.queries)


def choose(
    task: Retrainable, adapter: Adapter, others: Retrained, options: TruthOptions
) -> tuple[dict[str, AscentConfig], str]:
    """Choose the settings of every direction by the other queries, and the best direction."""
    assert options.directions and options.dampings and options.radii
    return chosen_directions(
        adapter, task.candidates, others, names=options.directions, dampings=options.dampings, radii=options.radii,
        sample=options.sample, seed=options.seed,
    )  # fmt: skip


def retrain_halves(task: Retrainable, options: TruthOptions) -> tuple[Retrained, Retrained]:
    """Train on random halves; tell what came out for the queries, and for the others."""
    say(
        f"{len(task.candidates)} candidates, {len(task.queries)} queries; "
        f"{options.subsets} random halves x {options.seeds} seeds are retrained, or read from the cache."
    )
    assert options.subsets is not None and options.seeds is not None
    subsets = random_halves(len(task.candidates), options.subsets, options.seed)
    everyone = concatenate_datasets([task.queries, task.others])
    train = task.train(everyone)
    losses = retrained_losses(train, subsets, key=task.key, seeds=options.seeds, together=task.together).mean(axis=0)
    count = len(task.queries)
    return Retrained(task.queries, subsets, losses[:, :count]), Retrained(task.others, subsets, losses[:, count:])


def chosen_by_self_retrieval(
    adapter: Adapter, candidates: Dataset, directions: dict[str, AscentConfig], options: TruthOptions
) -> ForwardInf:
    """Choose direction, damping, radius and hub correction without any retraining ([`tuning.tune`])."""
    tracer = ForwardInf(adapter=adapter, ascent=AscentConfig(modules=["all"], seed=options.seed))
    kinds = list(dict.fromkeys(ascent.direction for ascent in directions.values()))
    tuned = tracer.tune(candidates, directions=kinds, dampings=options.dampings, radii=SELF_RETRIEVAL_RADII)
    say(f"\nBy self-retrieval (* is used):\n{tuned.tuning}")
    return tuned


def lds_run(options: TruthOptions) -> dict[str, Any]:
    """Run it all and write `metrics.json`: `lds` of the default, `{name}/lds` of everyone else, with intervals.

    Retrained losses and passes are kept as they are computed: a run that was interrupted goes on from there.

    Raises:
        FileExistsError: If the folder holds a finished run and `overwrite` is not set.
        OSError: If the folder can't be written to. Both before anything is computed.
    """
    started = time.perf_counter()
    folder = check_output(options.output, options.overwrite)
    task = load_task(options)
    judged, others = retrain_halves(task, options)
    adapters = [task.adapter(seed) for seed in range(options.seeds or 1)]
    directions, best = choose(task, adapters[0], others, options)
    metrics: dict[str, Any] = {"queries": len(task.queries), "candidates": len(task.candidates)}
    everyone = contenders(adapters, directions)
    if "self_retrieval" not in (options.without or ()):
        everyone["self_retrieval"] = chosen_by_self_retrieval(adapters[0], task.candidates, directions, options)
    say(f"\n{'':28}  LDS   95% interval   damping  radius  seconds")
    for name, attributor in everyone.items():
        if name in (options.without or ()):
            continue
        start = time.perf_counter()
        scores = attributor.trace(task.queries, task.candidates).dense()
        figures = {**lds(scores, judged.subsets, judged.losses), "seconds": time.perf_counter() - start}
        figures |= _settings(attributor)
        say(_line(name, figures))
        metrics |= flat({name: figures})
        if name == best:
            metrics |= {f"tuned/{key}": value for key, value in figures.items()}
    metrics |= {"tuned/direction": best, **environment(options), "total_seconds": time.perf_counter() - started}
    say(f"The best direction by the other queries: {best}.")
    write_metrics(folder, metrics)
    return metrics


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
