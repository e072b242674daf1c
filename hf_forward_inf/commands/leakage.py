"""The run of `leakage`: are the training copies of images in the test set found (the paper's Table 2)?"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
from datasets import Dataset, Features, Image

from hf_forward_inf.adapters import ImageClassificationAdapter
from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.attribution import Attribution, Attributor
from hf_forward_inf.baselines import attributors_for
from hf_forward_inf.commands.image_task import captioned, load_image_task, with_objective
from hf_forward_inf.commands.options import LeakageOptions
from hf_forward_inf.commands.outputs import Run
from hf_forward_inf.data.image_changes import changed
from hf_forward_inf.evaluation import cost
from hf_forward_inf.evaluation.tables import as_text, compare, detected, flat
from hf_forward_inf.evaluation.task import MAIN, Task
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.scores.metrics import reciprocal_ranks
from hf_forward_inf.utils.fingerprints import uncached
from hf_forward_inf.utils.processes import say

Objective: TypeAlias = Literal["cross_entropy", "margin"]
Measure: TypeAlias = Literal["rise", "shift"]

POOL = 1024
"""Candidates among which settings are chosen, at most."""
MEASURES: dict[str, tuple[Objective, Measure]] = {
    "shift": ("cross_entropy", "shift"),
    "cross_entropy": ("cross_entropy", "rise"),
    "margin": ("margin", "rise"),
}
"""What a score measures of a candidate, in order of preference: the shift of its prediction, the rise of its loss (the
paper's score), or the fall of its margin."""
BASELINES = ("tracin", "tracin_cosine", "influence_functions", "representation")
"""Attributors that are compared with, over all parameters and with their defaults."""
CORRECTIONS = ("reranked", "", "standardised")
"""Corrections of scores, in order of preference: shares of the own step's ([`ForwardInf.rerank`]), none, or
[`corrections.standardised`]."""


@dataclass(frozen=True)
class Setting:
    """Settings of Forward-INF: what is measured, after how long a step, and how scores are corrected.

    Args:
        tracer (`ForwardInf`): With its adapter and radius.
        measured (`str`): Of [`MEASURES`].
        correction (`str`): Of [`CORRECTIONS`].
    """

    tracer: ForwardInf
    measured: str
    correction: str
    name = "forward_inf"

    @property
    def config(self) -> dict[str, Any]:
        """The tracer's options, and the correction."""
        return {**self.tracer.config, "correction": self.correction}

    def trace(self, queries: Dataset, candidates: Dataset, top_k: int | None = None) -> Attribution:
        """Score every candidate for every query."""
        return self.corrected(self.tracer.trace(queries, candidates)).keep(top_k)

    def corrected(self, found: Attribution) -> Attribution:
        """Return corrected scores of all candidates, NaN for those that reranking leaves out."""
        if self.correction == "reranked":
            best = self.tracer.rerank(found)
            return replace(best, scores=best.dense(), indices=None)
        return found.standardised() if self.correction else found

    @property
    def kind(self) -> str:
        """All but the radius."""
        return ", ".join(filter(None, (self.measured, self.correction)))

    def __str__(self) -> str:
        return f"{self.kind}, radius {self.tracer.ascent.radius:g}"


def leaked(candidates: Dataset, rows: np.ndarray, changes: list[str]) -> tuple[Dataset, dict[str, list[int]]]:
    """Return test images made of some candidates, once for each change, and the row numbers of each change."""
    labels = candidates.select(rows)["label"][:]
    images = [changed(row["image"], change) for change in changes for row in candidates.select(rows)]
    features = Features({"image": Image(), "label": candidates.features["label"]})
    queries = Dataset.from_dict({"image": images, "label": labels * len(changes)}, features=features)
    count = len(rows)
    return queries, {change: list(range(i * count, (i + 1) * count)) for i, change in enumerate(changes)}


def draw_tasks(candidates: Dataset, options: LeakageOptions) -> tuple[Task, Task]:
    """Draw the leaked images: those by which settings are chosen, among a pool, and those that are evaluated.

    Raises:
        ValueError: If there are fewer candidates than queries.
    """
    if len(candidates) <= options.num_queries:
        raise ValueError(
            f"{options.num_queries} queries need more than {len(candidates)} candidates to be drawn from."
        )
    order = np.random.default_rng(options.seed).permutation(len(candidates))
    tuning, judged = np.split(order[: options.num_queries], [options.tuning])
    pool = np.concatenate([tuning, order[options.num_queries :]])[:POOL]
    tasks = []
    for rows, among in ((tuning, pool), (judged, np.arange(len(candidates)))):
        queries, groups = leaked(candidates, rows, options.change)
        place = {row: i for i, row in enumerate(among.tolist())}
        truth = [[place[row]] for row in rows.tolist()] * len(options.change)
        first = options.change[0]
        tasks.append(Task(queries, candidates.select(among), truth, {MAIN: groups.pop(first), **groups}))
    return tasks[0], tasks[1]


def choose(adapter: ImageClassificationAdapter, task: Task, options: LeakageOptions) -> dict[str, Setting]:
    """Choose Forward-INF's settings by how high the copies rank, over all changes alike.

    All [`MEASURES`], radii and [`CORRECTIONS`] are tried; of equally good ones the first measure with the first
    correction, at the radius at which copies stand out most ([`lead`]).

    Returns:
        `dict`: `forward_inf`, the best; `cross_entropy`, the best with the paper's score.
    """
    assert task.proponents is not None
    heights: dict[Setting, tuple[float, float]] = {}
    say(f"Settings, by the mean reciprocal rank of {len(task.queries)} copies among {len(task.candidates):,}:")
    for measured, (objective, measure) in MEASURES.items():
        own = with_objective(adapter, objective, options.first)
        for radius in options.radii:
            ascent = AscentConfig(direction="gradient", radius=radius, seed=options.seed)
            tracer = ForwardInf(adapter=own, ascent=ascent, measure=measure)
            found = tracer.trace(task.queries, task.candidates)
            for correction in CORRECTIONS:
                setting = Setting(tracer, measured, correction)
                shown = setting.corrected(found).scores
                height = float(reciprocal_ranks(shown, task.proponents).mean())
                heights[setting] = height, lead(shown, task.proponents)
                say(f"  {height:.3f}  {setting}")
    plain = {one: height for one, height in heights.items() if one.kind == "cross_entropy"}
    return {"forward_inf": _best(heights), "cross_entropy": _best(plain)}


def lead(scores: np.ndarray, truth: list[list[int]]) -> float:
    """Return how far copies score above the best other candidate, in deviations of a query's scores (mean)."""
    leads = []
    for row, own in zip(scores, truth, strict=True):
        leads.append((np.max(row[own]) - np.nanmax(np.delete(row, own))) / max(np.nanstd(row), 1e-12))
    return float(np.mean(np.nan_to_num(leads, nan=-np.inf)))  # a copy that is not among the best has no score


def _best(heights: Mapping[Setting, tuple[float, float]]) -> Setting:
    highest = max(height for height, _ in heights.values())
    equal = [one for one, (height, _) in heights.items() if height >= highest - 1e-9]
    first = min(equal, key=lambda one: (list(MEASURES).index(one.measured), CORRECTIONS.index(one.correction)))
    alike = [one for one in equal if one.kind == first.kind]
    return max(alike, key=lambda one: heights[one][1])


def leakage_run(options: LeakageOptions) -> dict[str, Any]:
    """Run it all and write `metrics.json`, `attribution/` and `report.html` into the output folder.

    Bare figures are those of the settings that did best on the tuning queries, `cross_entropy` those of the paper's
    score; baselines and changes have their names in front (`shifted/top1`). The cosine of an exact copy with itself is
    1, so that cosines and representations always find it; near-duplicates are the fairer comparison.

    Raises:
        FileExistsError: If the folder holds a finished run and `overwrite` is not set.
        OSError: If the folder can't be written to. Both before anything is computed.
    """
    run = Run(options)
    candidates, adapter = load_image_task(options)
    tuning, task = draw_tasks(candidates, options)
    chosen = choose(adapter, tuning, options)
    tracer = chosen["forward_inf"].tracer
    say(f"Tracing {len(task.queries)} images over {len(candidates):,} candidates: {chosen['forward_inf']} ...")
    found: dict[str, Attribution] = {}
    costs: dict[str, float] = {}
    plain, _ = cost.plain_pass(tracer, candidates)
    everyone = ForwardInf(adapter=adapter, ascent=AscentConfig(seed=options.seed))
    attributors: dict[str, Attributor] = {
        **chosen,
        **attributors_for(everyone, BASELINES if options.baselines else ()),
    }
    for name, attributor in attributors.items():
        with uncached():
            seconds, _ = cost.timed(partial(_trace, found, name, attributor, task))
        costs[f"{name}/forward_passes_together"] = seconds / plain
        costs[f"{name}/seconds_per_query"] = seconds / len(task.queries)
    table = compare(found, task)
    for name, attribution in found.items():
        table[name] |= detected(attribution.scores, task)
    say(as_text(table, costs))
    metrics: dict[str, Any] = {"queries": len(task.main), "candidates": len(candidates), **flat(table)}
    metrics |= {key.removeprefix("forward_inf/"): value for key, value in costs.items()}
    metrics |= {name: str(setting) for name, setting in _named(chosen).items()}
    metrics |= cost.measure(tracer, task.queries.select(task.main), candidates)
    together = costs["forward_inf/forward_passes_together"] / len(task.queries)
    say(
        f"A query's loss pass costs {metrics['forward_passes_per_query']:.2f} forward passes over the candidates; "
        f"with all that is done to scores, {len(task.queries)} queries together, {together:.2f} each."
    )
    notes = {row: change for change, rows in task.groups.items() for row in rows if change}
    return run.write(
        captioned(found["forward_inf"], notes), metrics, tracer, table=table, proponents=task.proponents,
        columns=("top1", "top5", "mrr", "mrr_se"), title="Which training images are these test images copies of?",
    )  # fmt: skip


def _trace(found: dict[str, Attribution], name: str, attributor: Attributor, task: Task) -> None:
    found[name] = attributor.trace(task.queries, task.candidates)


def _named(chosen: Mapping[str, Setting]) -> dict[str, Setting]:
    return {("setting" if name == "forward_inf" else f"{name}/setting"): one for name, one in chosen.items()}
