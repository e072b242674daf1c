"""A run judged by retraining: train on random halves of the data, and see who foretold what came out (LDS)."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import concatenate_datasets

from hf_forward_inf.ascent import AscentConfig
from hf_forward_inf.contenders import chosen_directions, contenders
from hf_forward_inf.metrics import lds
from hf_forward_inf.processes import say
from hf_forward_inf.retrainable import NETWORKS, Retrainable, digits
from hf_forward_inf.retraining import Retrained, random_halves, retrained_losses
from hf_forward_inf.run import check_output, environment, write_metrics


@dataclass
class TruthOptions:
    """What to train again and again, and where the results go."""

    output: str = field(default="outputs/truth", metadata={"help": "Folder for metrics.json."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a finished run in the output folder."})
    task: Literal["digits"] = field(default="digits", metadata={"help": "Data and kind of model."})
    network: str = field(default="perceptron", metadata={"help": f"For digits: {' or '.join(NETWORKS)}."})
    candidates: int = field(default=800, metadata={"help": "Training examples."})
    queries: int = field(default=40, metadata={"help": "Queries; as many others serve to choose settings."})
    subsets: int = field(default=120, metadata={"help": "Random halves of the training data that are trained on."})
    seeds: int = field(default=3, metadata={"help": "Trainings of each, whose losses are averaged."})
    dampings: list[float] = field(
        default_factory=lambda: [0.1, 0.03, 0.01, 0.006, 0.003, 0.001],
        metadata={"help": "Dampings tried on the other queries."},
    )
    radii: list[float] = field(default_factory=lambda: [0.3], metadata={"help": "Radii tried on the other queries."})
    sample: int = field(default=1024, metadata={"help": "Training examples whose curvature counts."})
    seed: int = field(default=0, metadata={"help": "Draws the halves, and whatever else is drawn."})

    def __post_init__(self) -> None:
        if self.network not in NETWORKS:
            raise ValueError(f"--network {self.network} is not known: {' or '.join(NETWORKS)}.")
        for name in ("candidates", "queries", "subsets", "seeds", "sample"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}.")
        if self.subsets < 2:
            raise ValueError("--subsets must be at least 2: a correlation takes two.")


def load_task(options: TruthOptions) -> Retrainable:
    """Load what is trained again, and find the queries."""
    return digits(options.network, options.candidates, options.queries)


def retrain_halves(task: Retrainable, options: TruthOptions) -> tuple[Retrained, Retrained]:
    """Train on random halves; tell what came out for the queries, and for the others."""
    say(
        f"{len(task.candidates)} candidates, {len(task.queries)} queries; "
        f"{options.subsets} random halves x {options.seeds} seeds are retrained, or read from the cache."
    )
    subsets = random_halves(len(task.candidates), options.subsets, options.seed)
    everyone = concatenate_datasets([task.queries, task.others])
    train = task.train(everyone)
    losses = retrained_losses(train, subsets, key=task.key, seeds=options.seeds, together=task.together).mean(axis=0)
    count = len(task.queries)
    return Retrained(task.queries, subsets, losses[:, :count]), Retrained(task.others, subsets, losses[:, count:])


def lds_run(options: TruthOptions) -> dict[str, Any]:
    """Run it all and write `metrics.json`: `lds` of the default, `{name}/lds` of everyone else, with intervals.

    Retrained losses and passes are kept as they are computed: a run that was interrupted goes on from there.

    Raises:
        FileExistsError: If the folder holds a finished run and `overwrite` is not set.
        OSError: If the folder can't be written to. Both before anything is computed.
    """
    started = time.perf_counter()
    folder = Path(options.output)
    check_output(folder, options.overwrite)
    task = load_task(options)
    judged, others = retrain_halves(task, options)
    adapters = [task.adapter(seed) for seed in range(options.seeds)]
    directions, best = chosen_directions(
        adapters[0], task.candidates, others,
        dampings=options.dampings, radii=options.radii, sample=options.sample, seed=options.seed,
    )  # fmt: skip
    metrics: dict[str, Any] = {"queries": len(task.queries), "candidates": len(task.candidates)}
    say(f"\n{'':28}  LDS   95% interval   damping  seconds")
    for name, attributor in contenders(adapters, directions).items():
        start = time.perf_counter()
        scores = attributor.trace(task.queries, task.candidates).dense()
        figures = {**lds(scores, judged.subsets, judged.losses), "seconds": time.perf_counter() - start}
        own = getattr(attributor, "ascent", AscentConfig())
        if own.damping is not None:
            figures["damping"] = own.damping
        say(_line(name, figures))
        metrics |= {key if name == "forward_inf" else f"{name}/{key}": value for key, value in figures.items()}
        if name == best:
            metrics |= {f"tuned/{key}": value for key, value in figures.items()}
    metrics |= {"tuned/direction": best, **environment(options), "total_seconds": time.perf_counter() - started}
    say(f"The best direction by the other queries: {best}.")
    write_metrics(folder, metrics)
    return metrics


def _line(name: str, figures: dict[str, float]) -> str:
    damping = f"{figures['damping']:8g}" if "damping" in figures else " " * 8
    interval = f"{figures['lds_low']:.3f} - {figures['lds_high']:.3f}"
    return f"{name:27} {figures['lds']:.3f}  {interval:>13}  {damping} {figures['seconds']:8.1f}"
