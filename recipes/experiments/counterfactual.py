"""Removing the best candidates of a query and training again: what becomes of its loss and its answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset

from experiments.attributor_sets import BASELINES
from experiments.lds import LdsOptions
from experiments.retrainable import Retrainable
from hf_forward_inf.adapters import Adapter
from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.attribution import Attributor
from hf_forward_inf.baselines import Ensemble, attributors_for
from hf_forward_inf.evaluation.tables import REFERENCE
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.scores.intervals import with_interval
from hf_forward_inf.utils.text_tables import aligned, number

FEWER: dict[str, dict[str, Any]] = {
    "digits": {"explained": None},
    "facts": {
        "seeds": 1, "explained": 24, "directions": ["gradient", "ekfac", "cg_5"],
        "without": ["tuned_seeds", "trackstar", "influence_functions", "influence_functions_lissa",
                    "representation", "bm25_without_answer"],
    },
}  # fmt: skip
"""Values of unset options that differ from those for LDS: each attributor needs as many trainings as there are
queries, times the seeds, and each training of the language model takes five seconds."""
COLUMNS = ("rise", "rise_low", "rise_high", "rise_median", "answer_gone", "wrong_answer_gone")
WIDTHS = (25, 6, 15, 6, 11, 11, 17)
"""Widths of the columns that are printed."""
HEAD = aligned(("", "rise", "95% interval", "median", "over random", "answer gone", "wrong answer gone"), WIDTHS)
CAPTION = (
    "How much the loss of a query's answer rises if the candidates ranked first are removed and the model is trained "
    "again; mean over queries, with its 95% interval."
)


@dataclass
class CounterfactualOptions(LdsOptions):
    """What to remove and train again, and where the results go.

    Settings of Forward-INF are chosen as for the linear datamodeling score, whose retraining is shared.

    Args:
        share (`float`, defaults to 0.02): Share of the candidates that is removed for a query.
        explained (`int`, *optional*): Queries that are explained, drawn at random. Defaults to all; facts: 24.
    """

    output: str = "outputs/counterfactual"
    share: float = field(default=0.02, metadata={"above": 0, "below": 1})
    explained: int | None = field(default=None, metadata={"min": 1})

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.num_candidates is not None
        if not 1 <= self.share * self.num_candidates < self.num_candidates:
            raise ValueError(f"--share {self.share} of {self.num_candidates} candidates removes none.")

    def defaults(self) -> dict[str, Any]:
        """Return the task's values of options that are unset."""
        return super().defaults() | FEWER[self.task]


@dataclass(frozen=True)
class Removal:
    """The effect of removing each query's best candidates.

    Args:
        rises (`np.ndarray`): How much the loss of the query rose, the mean over seeds, `[queries]`.
        gone (`np.ndarray`): Share of the retrained models that no longer give the explained answer, among the seeds
            whose model trained on everything gives it; `[queries]`, NaN where none does.
    """

    rises: np.ndarray
    gone: np.ndarray


class Counterfactual:
    """Trains without some candidates, and compares with training on all of them with the same seeds.

    Args:
        task (`Retrainable`): What is trained.
        queries (`datasets.Dataset`): What is explained, answers included.
        seeds (`int`): Trainings of each set.
    """

    def __init__(self, task: Retrainable, queries: Dataset, seeds: int):
        self.task, self.queries, self.seeds = task, queries, seeds
        self.whole = task.retrained(queries, np.ones((1, len(task.candidates)), dtype=bool), seeds)[:, 0]

    def without(self, kept: np.ndarray) -> Removal:
        """Train on each query's own set: booleans `[queries, candidates]`, the same number for each query."""
        rows = np.arange(len(self.queries))
        mine = self.task.retrained(self.queries, kept, self.seeds)[:, rows, rows]
        rises = mine[..., 0] - self.whole[..., 0]
        given, lost = self.whole[..., 1] > 0, mine[..., 1] == 0
        with np.errstate(invalid="ignore"):
            gone = (lost & given).sum(axis=0) / given.sum(axis=0)
        return Removal(rises.mean(axis=0), gone)


def remark(removal: Removal, chance: Removal, query: int, count: int) -> str:
    """Say in a sentence what happened to a query when its best candidates were removed, as the page shows it."""
    rise, other, gone = removal.rises[query], chance.rises[query], removal.gone[query]
    lost = "" if np.isnan(gone) else f" {gone:.0%} of the models that gave this answer no longer do."
    return (
        f"Trained again without its best {count} rows, the model's loss on this answer rises by {rise:.3g} "
        f"(without {count} random rows: {other:.3g}).{lost}"
    )


def answered_by(adapter: Adapter, queries: Dataset) -> tuple[Dataset, np.ndarray]:
    """Return the queries with the model's answers as their targets, and which of these are wrong."""
    column = adapter.columns[-1]
    answers = adapter.answer(queries[:])
    wrong = [str(given).strip() != str(true).strip() for given, true in zip(answers, queries[column], strict=True)]
    return queries.remove_columns(column).add_column(column, answers), np.array(wrong)


def attributors(
    adapters: Sequence[Adapter], directions: Mapping[str, AscentConfig], best: str
) -> dict[str, Attributor]:
    """Return the default, the best direction alone and over seeds, every direction, and the baselines."""
    first, tuned = adapters[0], directions[best]
    default = ForwardInf(adapter=first)
    return {
        REFERENCE: default,
        "tuned": ForwardInf(adapter=first, ascent=tuned),
        "tuned_seeds": Ensemble([ForwardInf(adapter=one, ascent=tuned) for one in adapters]),
        **{name: ForwardInf(adapter=first, ascent=ascent) for name, ascent in directions.items()},
        **attributors_for(default, BASELINES),
    }


def behind(default: Removal, other: Removal) -> dict[str, float]:
    """Return by how much less the loss rises than after the default's removal, query by query."""
    return with_interval("rise_behind", default.rises - other.rises)


def rise_figures(removal: Removal, chance: Removal, wrong: np.ndarray) -> dict[str, float]:
    """Return mean rises of the loss and shares of answers that are gone, with 95% intervals.

    Args:
        removal (`Removal`): Of an attributor's best candidates.
        chance (`Removal`): Of as many random ones.
        wrong (`np.ndarray`): Which explained answers are wrong, booleans `[queries]`.
    """
    figures = with_interval("rise", removal.rises) | {"rise_median": float(np.median(removal.rises))}
    figures |= with_interval("rise_over_random", removal.rises - chance.rises)
    for name, gone in {"answer_gone": removal.gone, "wrong_answer_gone": removal.gone[wrong]}.items():
        gone = gone[~np.isnan(gone)]
        if len(gone):
            figures |= with_interval(name, gone)
    return figures


def line(name: str, figures: dict[str, float]) -> str:
    """Return figures as a line of a table."""
    interval = f"{figures['rise_low']:.3f} - {figures['rise_high']:.3f}"
    names = ("rise_median", "rise_over_random", "answer_gone", "wrong_answer_gone")
    return aligned((name, number(figures["rise"]), interval, *(number(figures.get(key)) for key in names)), WIDTHS)
