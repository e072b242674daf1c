"""Take the found examples away, train again, and see what becomes of the query."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from hf_forward_inf.adapters import Adapter
from hf_forward_inf.attribution import Attribution, Attributor
from hf_forward_inf.baselines import Ensemble, Random
from hf_forward_inf.experiments.contenders import baselines
from hf_forward_inf.experiments.evaluation import flat
from hf_forward_inf.experiments.retrainable import Retrainable
from hf_forward_inf.experiments.run import check_output, environment, write_metrics
from hf_forward_inf.experiments.truth import TruthOptions, choose, load_task, retrain_halves
from hf_forward_inf.fingerprints import fingerprint
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.metrics import bootstrap_interval
from hf_forward_inf.processes import say
from hf_forward_inf.retraining import retrained_losses


@dataclass
class CounterfactualOptions(TruthOptions):
    """What to take away and train again, and where the results go.

    Settings of Forward-INF are chosen as in the run of the linear datamodeling score, whose retraining is shared.
    """

    output: str = field(default="outputs/counterfactual", metadata={"help": "Folder for metrics.json."})
    share: float = field(default=0.02, metadata={"help": "Share of the candidates that is taken away for a query."})

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.candidates is not None
        if not 1 <= self.share * self.candidates < self.candidates:
            raise ValueError(f"--share {self.share} of {self.candidates} candidates takes away none or all.")


@dataclass(frozen=True)
class Removal:
    """What taking each query's best candidates away did.

    Args:
        rises (`np.ndarray`): How much the loss of the query rose, the mean over seeds, `[queries]`.
        gone (`np.ndarray`, *optional*): Share of the retrained models that no longer give the explained answer, among
            the seeds whose model trained on everything gives it; `[queries]`, NaN where none does.
    """

    rises: np.ndarray
    gone: np.ndarray | None


class Counterfactual:
    """Trains again without some candidates, and compares with training on all of them by the same seeds.

    Args:
        task (`Retrainable`): What is trained.
        queries (`datasets.Dataset`): What is explained; where answers are classes, the label is the model's answer.
        seeds (`int`): Trainings of each set.
    """

    def __init__(self, task: Retrainable, queries: Dataset, seeds: int):
        self.task, self.queries, self.seeds = task, queries, seeds
        self.answers = np.arange(len(queries))
        asked = queries
        if task.classes is not None:
            self.answers = np.array(queries["label"][:]) + task.classes * np.arange(len(queries))
            asked = with_every_answer(queries, task.classes)
        self.train = task.train(asked)
        self.key = fingerprint(task.key, "counterfactual", self.answers.tolist())
        self.whole = self._losses(np.ones((1, len(task.candidates)), dtype=bool))

    def without(self, kept: np.ndarray) -> Removal:
        """Train on each query's own set, booleans `[queries, candidates]`, all of one size."""
        losses = self._losses(kept)
        rows = np.arange(len(self.queries))
        mine = losses[:, rows, :].reshape(self.seeds, len(rows), -1)
        rises = mine[:, rows, self.answers] - self.whole[:, 0, self.answers]
        gone = None
        if self.task.classes is not None:
            given = self._given(self.whole[:, 0])
            lost = ~np.stack([self._given(mine[:, i])[:, i] for i in rows], axis=1)
            with np.errstate(invalid="ignore"):
                gone = (lost & given).sum(axis=0) / given.sum(axis=0)
        return Removal(rises.mean(axis=0), gone)

    def _given(self, losses: np.ndarray) -> np.ndarray:
        """Whether the explained answers are the likeliest: `[seeds, queries]`, of losses `[seeds, all answers]`."""
        assert self.task.classes is not None
        likeliest = losses.reshape(self.seeds, len(self.queries), self.task.classes).argmin(axis=2)
        return likeliest == self.answers % self.task.classes

    def _losses(self, kept: np.ndarray) -> np.ndarray:
        return retrained_losses(self.train, kept, key=self.key, seeds=self.seeds, together=self.task.together)


def without_best(found: Attribution, count: int) -> np.ndarray:
    """Leave out each query's best candidates: who is left, booleans `[queries, candidates]`."""
    kept = np.ones((len(found), len(found.candidates)), dtype=bool)
    for i in range(len(found)):
        kept[i, found.ranking(i)[:count]] = False
    return kept


def with_every_answer(queries: Dataset, classes: int) -> Dataset:
    """Give every query with every label, `[queries x classes]` rows."""
    rows = queries.select(np.repeat(np.arange(len(queries)), classes)).remove_columns("label")
    return rows.add_column("label", np.tile(np.arange(classes), len(queries)).tolist())


def answered_by(adapter: Adapter, queries: Dataset, classes: int | None) -> tuple[Dataset, np.ndarray]:
    """Put the model's answers in the queries' labels, and tell which were wrong; without classes, nothing changes."""
    if classes is None:
        return queries, np.zeros(len(queries), dtype=bool)
    asked = with_every_answer(queries, classes)
    with torch.no_grad():
        losses = adapter.loss(adapter.model, adapter.collate(adapter.encode(asked[:]))).view(-1, classes)
    answers = losses.argmin(dim=1).numpy()
    wrong = answers != np.array(queries["label"][:])
    return queries.remove_columns("label").add_column("label", answers.tolist()), wrong


def counterfactual_run(options: CounterfactualOptions) -> dict[str, Any]:
    """Run it all and write `metrics.json`: `rise` of the default, `{name}/rise` of everyone else, with intervals.

    `rise` is how much the loss of the query's answer rises, on average, if its best candidates are taken away, and
    `rise_over_random` how much more than without as many random ones; `answer_gone` the share of answers that the
    retrained models no longer give, `wrong_answer_gone` that of wrong answers.

    Raises:
        FileExistsError: If the folder holds a finished run and `overwrite` is not set.
        OSError: If the folder can't be written to. Both before anything is computed.
    """
    started = time.perf_counter()
    folder = check_output(options.output, options.overwrite)
    task = load_task(options)
    adapters = [task.adapter(seed) for seed in range(options.seeds or 1)]
    methods = _methods(task, adapters, options)
    queries, wrong = answered_by(adapters[0], task.queries, task.classes)
    count = round(options.share * len(task.candidates))
    counterfactual = Counterfactual(task, queries, options.seeds or 1)
    say(f"\n{count} of {len(task.candidates)} candidates are taken away; {wrong.sum()} answers are wrong.")
    chance = counterfactual.without(without_best(Random().trace(queries, task.candidates), count))
    metrics: dict[str, Any] = {"queries": len(queries), "candidates": len(task.candidates), "removed": count}
    say(f"{'':26}  rise   95% interval   over random  answer gone  wrong answer gone")
    for name, trace in methods.items():
        removal = counterfactual.without(without_best(trace(queries, task.candidates), count))
        figures = _figures(removal, chance, wrong)
        say(_line(name, figures))
        metrics |= flat({name: figures})
    metrics |= {**environment(options), "total_seconds": time.perf_counter() - started}
    write_metrics(folder, metrics)
    return metrics


def _methods(
    task: Retrainable, adapters: list[Adapter], options: CounterfactualOptions
) -> dict[str, Callable[[Dataset, Dataset], Attribution]]:
    """The default, the best direction by the other queries, alone and over seeds, every direction and baseline."""
    _, others = retrain_halves(task, options)
    directions, best = choose(task, adapters[0], others, options)
    say(f"The best direction by the LDS of other queries: {best}.")
    found: dict[str, Attributor] = {
        "forward_inf": ForwardInf(adapter=adapters[0]),
        "tuned": ForwardInf(adapter=adapters[0], ascent=directions[best]),
        "tuned_seeds": Ensemble([ForwardInf(adapter=one, ascent=directions[best]) for one in adapters]),
        **{name: ForwardInf(adapter=adapters[0], ascent=ascent) for name, ascent in directions.items()},
        **baselines(adapters[0]),
    }
    return {name: attributor.trace for name, attributor in found.items() if name not in (options.without or ())}


def _figures(removal: Removal, chance: Removal, wrong: np.ndarray) -> dict[str, float]:
    low, high = bootstrap_interval(removal.rises)
    figures = {"rise": float(removal.rises.mean()), "rise_low": low, "rise_high": high}
    over = removal.rises - chance.rises
    low, high = bootstrap_interval(over)
    figures |= {"rise_over_random": float(over.mean()), "rise_over_random_low": low, "rise_over_random_high": high}
    if removal.gone is not None:
        figures["answer_gone"] = float(np.nanmean(removal.gone))
        if wrong.any():
            figures["wrong_answer_gone"] = float(np.nanmean(removal.gone[wrong]))
    return figures


def _line(name: str, figures: dict[str, float]) -> str:
    interval = f"{figures['rise_low']:.3f} - {figures['rise_high']:.3f}"
    gone = "".join(f"{figures[key]:13.3f}" for key in ("answer_gone", "wrong_answer_gone") if key in figures)
    return f"{name:25} {figures['rise']:6.3f}  {interval:>13}  {figures['rise_over_random']:11.3f} {gone}"
