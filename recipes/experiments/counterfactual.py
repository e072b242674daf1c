"""Take the found examples away, train again, and see what becomes of the query."""

import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from datasets import Dataset

from experiments.attributor_sets import BASELINES
from experiments.lds import LdsOptions, Trial, prepare, presented
from experiments.retrainable import Retrainable
from hf_forward_inf.adapters import Adapter
from hf_forward_inf.attribution import Attribution, Attributor
from hf_forward_inf.baselines import Ensemble, Random, attributors_for
from hf_forward_inf.commands.outputs import about, check_output, plotted, write_outputs
from hf_forward_inf.evaluation.tables import REFERENCE, Table, flat
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.report.plots import interval_plot
from hf_forward_inf.scores.metrics import bootstrap_interval
from hf_forward_inf.utils.processes import say
from hf_forward_inf.utils.rows import sample_rows

FEWER: dict[str, dict[str, Any]] = {
    "digits": {"explained": None},
    "facts": {
        "seeds": 1, "explained": 24, "directions": ["gradient", "ekfac", "cg_5"],
        "without": ["tuned_seeds", "trackstar", "influence_functions", "influence_functions_lissa",
                    "representation", "bm25_without_answer"],
    },
}  # fmt: skip
"""What a task takes here if the user doesn't say, where it isn't what it takes for LDS: each attributor asks for as
many trainings as there are queries, times the seeds, and the language model's take five seconds."""
COLUMNS = ("rise", "rise_low", "rise_high", "rise_median", "answer_gone", "wrong_answer_gone")
CAPTION = (
    "How much the loss of a query's answer rises if the candidates ranked first are taken away and the model is "
    "trained again: the mean over queries and its 95% interval."
)


@dataclass
class CounterfactualOptions(LdsOptions):
    """What to take away and train again, and where the results go.

    Settings of Forward-INF are chosen as in the run of the linear datamodeling score, whose retraining is shared.
    """

    output: str = field(
        default="outputs/counterfactual", metadata={"help": "Folder for metrics, attribution and report."}
    )
    share: float = field(default=0.02, metadata={"help": "Share of the candidates that is taken away for a query."})
    explained: int | None = field(
        default=None, metadata={"help": "Queries that are explained, drawn from all (all; facts: 24)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.candidates is not None
        if self.explained is not None and self.explained < 1:
            raise ValueError(f"--explained must be at least 1, not {self.explained}.")
        if not 1 <= self.share * self.candidates < self.candidates:
            raise ValueError(f"--share {self.share} of {self.candidates} candidates takes away none or all.")

    def defaults(self) -> dict[str, Any]:
        """Give what the task takes where the user doesn't say."""
        return super().defaults() | FEWER[self.task]


@dataclass(frozen=True)
class Removal:
    """What taking each query's best candidates away did.

    Args:
        rises (`np.ndarray`): How much the loss of the query rose, the mean over seeds, `[queries]`.
        gone (`np.ndarray`): Share of the retrained models that no longer give the explained answer, among the seeds
            whose model trained on everything gives it; `[queries]`, NaN where none does.
    """

    rises: np.ndarray
    gone: np.ndarray


class Counterfactual:
    """Trains again without some candidates, and compares with training on all of them by the same seeds.

    Args:
        task (`Retrainable`): What is trained.
        queries (`datasets.Dataset`): What is explained, answers included.
        seeds (`int`): Trainings of each set.
    """

    def __init__(self, task: Retrainable, queries: Dataset, seeds: int):
        self.task, self.queries, self.seeds = task, queries, seeds
        self.whole = task.retrained(queries, np.ones((1, len(task.candidates)), dtype=bool), seeds)[:, 0]

    def without(self, kept: np.ndarray) -> Removal:
        """Train on each query's own set, booleans `[queries, candidates]`, all of one size."""
        rows = np.arange(len(self.queries))
        mine = self.task.retrained(self.queries, kept, self.seeds)[:, rows, rows]
        rises = mine[..., 0] - self.whole[..., 0]
        given, lost = self.whole[..., 1] > 0, mine[..., 1] == 0
        with np.errstate(invalid="ignore"):
            gone = (lost & given).sum(axis=0) / given.sum(axis=0)
        return Removal(rises.mean(axis=0), gone)


def without_best(found: Attribution, count: int) -> np.ndarray:
    """Leave out each query's best candidates: who is left, booleans `[queries, candidates]`."""
    kept = np.ones((len(found), len(found.candidates)), dtype=bool)
    for i in range(len(found)):
        kept[i, found.ranking(i)[:count]] = False
    return kept


def answered_by(adapter: Adapter, queries: Dataset) -> tuple[Dataset, np.ndarray]:
    """Put the model's answers in the place of the queries' targets, and tell which were wrong."""
    column = adapter.columns[-1]
    answers = adapter.answer(queries[:])
    wrong = [str(given).strip() != str(true).strip() for given, true in zip(answers, queries[column], strict=True)]
    return queries.remove_columns(column).add_column(column, answers), np.array(wrong)


def counterfactual_run(options: CounterfactualOptions) -> dict[str, Any]:
    """Run it all and write `metrics.json`, `attribution/` and `report.html` into the output folder.

    The model's own answers are explained. With intervals, `rise` of the default and `{name}/rise` of everyone else:
    how much the loss of the answer rises, on average, if the query's best candidates are taken away;
    `rise_median`: the middle query's, since the loss of an answer that a single candidate states may rise twenty
    times as much as others; `rise_over_random`: how much more than without as many random ones; `{name}/rise_behind`:
    how much less than without the default's; `answer_gone`: the share of answers that the retrained models no longer
    give, `wrong_answer_gone`: that of wrong answers. What is retrained is kept: a run that was
    interrupted goes on from there.

    Raises:
        FileExistsError: If the folder holds a finished run and `overwrite` is not set.
        OSError: If the folder can't be written to. Both before anything is computed.
    """
    started = time.perf_counter()
    folder = check_output(options.output, options.overwrite)
    trial = prepare(options)
    task, everyone = trial.task, _attributors(trial, options)
    asked = sample_rows(task.queries, options.explained or len(task.queries), options.seed)
    queries, wrong = answered_by(trial.adapters[0], asked)
    count = round(options.share * len(task.candidates))
    counterfactual = Counterfactual(task, queries, len(trial.adapters))
    say(f"\n{count} of {len(task.candidates)} candidates are taken away; {wrong.sum()} answers are wrong.")
    chance = counterfactual.without(without_best(Random().trace(queries, task.candidates), count))
    say(f"{'':26}  rise     95% interval  median  over random  answer gone  wrong answer gone")
    found: dict[str, Attribution] = {}
    table: Table = {}
    rises: dict[str, np.ndarray] = {}
    for name, attributor in everyone.items():
        found[name] = attributor.trace(queries, task.candidates)
        removal = counterfactual.without(without_best(found[name], count))
        rises[name] = removal.rises
        table[name] = _figures(removal, chance, wrong)
        if name != REFERENCE:
            table[name] |= _behind(rises[REFERENCE] - removal.rises)
        say(_line(name, table[name]))
    metrics: dict[str, Any] = {
        "queries": len(queries), "wrong_answers": int(wrong.sum()), "candidates": len(task.candidates),
        "removed": count,
        **flat(table), "tuned/direction": trial.best, **about(options, ForwardInf(adapter=trial.adapters[0])),
    }  # fmt: skip
    metrics["total_seconds"] = time.perf_counter() - started
    truth = asked[trial.adapters[0].columns[-1]]
    notes = {i: f"really {truth[i]}" for i in np.flatnonzero(wrong).tolist()}
    write_outputs(
        folder, presented(found[REFERENCE], notes, options.top_k), metrics, table, None,
        plotted(partial(interval_plot, "rise"), table), columns=COLUMNS, plot_caption=CAPTION,
        title="Does the answer go away without what was found?",
    )  # fmt: skip
    say(f"Written: {folder}")
    return metrics


def _attributors(trial: Trial, options: CounterfactualOptions) -> dict[str, Attributor]:
    """The default, the best direction by the other queries, alone and over seeds, every direction and baseline."""
    first, tuned = trial.adapters[0], trial.directions[trial.best]
    default = ForwardInf(adapter=first)
    found: dict[str, Attributor] = {
        REFERENCE: default,
        "tuned": ForwardInf(adapter=first, ascent=tuned),
        "tuned_seeds": Ensemble([ForwardInf(adapter=one, ascent=tuned) for one in trial.adapters]),
        **{name: ForwardInf(adapter=first, ascent=ascent) for name, ascent in trial.directions.items()},
        **attributors_for(default, BASELINES),
    }
    return {name: attributor for name, attributor in found.items() if name not in (options.without or ())}


def _behind(behind: np.ndarray) -> dict[str, float]:
    """By how much less the loss rises than without what the default found, query by query."""
    low, high = bootstrap_interval(behind)
    return {"rise_behind": float(behind.mean()), "rise_behind_low": low, "rise_behind_high": high}


def _figures(removal: Removal, chance: Removal, wrong: np.ndarray) -> dict[str, float]:
    low, high = bootstrap_interval(removal.rises)
    figures = {"rise": float(removal.rises.mean()), "rise_low": low, "rise_high": high}
    figures["rise_median"] = float(np.median(removal.rises))
    over = removal.rises - chance.rises
    low, high = bootstrap_interval(over)
    figures |= {"rise_over_random": float(over.mean()), "rise_over_random_low": low, "rise_over_random_high": high}
    for name, gone in {"answer_gone": removal.gone, "wrong_answer_gone": removal.gone[wrong]}.items():
        gone = gone[~np.isnan(gone)]
        if len(gone):
            low, high = bootstrap_interval(gone)
            figures |= {name: float(gone.mean()), f"{name}_low": low, f"{name}_high": high}
    return figures


def _line(name: str, figures: dict[str, float]) -> str:
    interval = f"{figures['rise_low']:.3f} - {figures['rise_high']:.3f}"
    gone = "".join(f"{figures[key]:13.3f}" for key in ("answer_gone", "wrong_answer_gone") if key in figures)
    more = f"{figures['rise_median']:6.3f}  {figures['rise_over_random']:11.3f}"
    return f"{name:25} {figures['rise']:6.3f}  {interval:>15}  {more} {gone}"
