"""The linear datamodeling score: what is trained on random subsets, and how settings are chosen."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from datasets import Dataset, concatenate_datasets

from experiments.attributor_sets import DIRECTIONS, chosen_directions, grid
from experiments.retrainable import NETWORKS, Retrainable, digits
from experiments.retrainable_facts import facts
from experiments.retrainable_sentences import sentences
from experiments.retrainable_texts import TUNING, texts
from hf_forward_inf.adapters import Adapter
from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.attribution import Attribution, Attributor
from hf_forward_inf.baselines import Ensemble
from hf_forward_inf.evaluation.tables import REFERENCE, Table
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.scores.intervals import with_interval
from hf_forward_inf.scores.retraining import (
    Retrained,
    agreement,
    lds_by_query,
    random_subsets,
    rises_without_best,
)
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
    "texts": {
        "num_candidates": 5000, "subsets": 100, "seeds": 1, "sample": 128,
        "without": ["influence_functions_lissa", "self_retrieval"], "directions": [],
        "dampings": [0.1, 0.01], "radii": [0.3, 1.0],
    },
}  # fmt: skip
"""Values of options that are unset, by task: about twenty minutes on two CPU cores; texts: an hour with one thread."""
FEW = 1000
"""Candidates among the built-in facts."""
LARGE_DROP = 0.1
"""Subsets that lack more than this share differ by far more than the noise of bfloat16."""
SELF_RETRIEVAL_RADII = (0.1, 0.3, 1.0)
"""Radii tried where settings are chosen by self-retrieval."""
WIDTHS = (28, 6, 14, 6, 14, 7, 6, 7)
"""Widths of the columns that are printed."""
HEAD = aligned(("", "LDS", "95% interval", "lead", "95% interval", "damping", "radius", "seconds"), WIDTHS)
QLD_METHODS = ("forward_inf", "influence_functions_kfac_cg", "trackstar", "bm25", "random")
"""Attributors whose best candidates are removed."""
REMOVED = 0.01
"""Share of the candidates that is removed for a query."""
COLUMNS = ("lds", "lds_low", "lds_high", "lead", "lead_low", "lead_high", "qld", "qld_low", "qld_high")
"""Columns of the report's table."""
CAPTION = (
    "LDS: the rank correlation between the losses that scores predict and those after training on random subsets of "
    "the candidates; mean over queries, with its 95% interval. Lead: by how much Forward-INF with defaults is ahead, "
    "query by query. Settings of the directions were chosen by other queries."
)


@dataclass
class LdsOptions(RunOptions):
    """What to train again and again, and where the results go.

    Args:
        task (`str`, defaults to `"digits"`): Images and a small classifier (digits), masked sentences and a small mT5
            (facts), whole sentences and a small Llama (sentences), or a larger one that was pretrained on other
            sentences and is fine-tuned (texts).
        network (`str`, defaults to `"perceptron"`): For digits: perceptron or conv.
        data (`str`, *optional*): For texts: a file, folder or hub name of sentences with FTRACE's columns, or of rows
            with a `text`. Defaults to the built-in facts.
        model (`str`, *optional*): For texts: a causal language model to fine-tune, a folder or hub name. Defaults to a
            small Llama.
        blocks (`bool`, defaults to `False`): For texts: cut them into blocks of 128 tokens.
        epochs (`int`, defaults to 2): For texts: passes of the fine-tuning over the candidates, which are known by
            heart after ten.
        drop (`float`, defaults to 0.5): Share of the candidates that each subset lacks.
        qld (`int`, defaults to 0): Queries whose best 1% of the candidates by some attributors are removed.
        qld_methods (`list[str]`, *optional*): Those attributors.
        num_candidates (`int`, *optional*): Training examples. Defaults to 800; facts: 400; sentences: 600; texts:
            5000, or 1000 without `data`.
        num_queries (`int`, defaults to 40): Queries; as many others serve to choose settings.
        subsets (`int`, *optional*): Random subsets that are trained on. Defaults to 120; facts and sentences: 60;
            texts: 100.
        models (`int`, defaults to 1): Models to explain, each trained on all candidates with a seed of its own;
            figures are means over them.
        seeds (`int`, *optional*): Trainings of each subset, averaged. Defaults to 3; facts and sentences: 2; texts:
            1, from the same weights.
        directions (`list[str]`, *optional*): Directions of the ascent to compare. Defaults to several; texts: none.
        dampings (`list[float]`, *optional*): Dampings tried on the other queries.
        radii (`list[float]`, *optional*): Radii tried on the other queries.
        sample (`int`, *optional*): Training examples whose curvature counts.
        without (`list[str]`, *optional*): Attributors to leave out. Defaults to none; of language models the
            slow ones.
    """

    output: str = "outputs/lds"
    task: Literal["digits", "facts", "sentences", "texts"] = "digits"
    network: str = field(default="perceptron", metadata={"choices": tuple(NETWORKS)})
    data: str | None = None
    model: str | None = None
    blocks: bool = False
    epochs: int = field(default=TUNING["epochs"], metadata={"min": 1})
    drop: float = field(default=0.5, metadata={"above": 0, "below": 1})
    qld: int = field(default=0, metadata={"min": 0})
    qld_methods: list[str] = field(default_factory=lambda: list(QLD_METHODS))
    num_candidates: int | None = field(default=None, metadata={"min": 2})
    num_queries: int = field(default=40, metadata={"min": 1})
    subsets: int | None = field(default=None, metadata={"min": 2})
    models: int = field(default=1, metadata={"min": 1})
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
        few = {"num_candidates": FEW} if self.task == "texts" and self.data is None else {}
        return DEFAULTS[self.task] | few


def load_task(options: LdsOptions) -> Retrainable:
    """Load what is trained again, and find the queries."""
    assert options.num_candidates is not None
    if options.task == "digits":
        return digits(options.network, options.num_candidates, options.num_queries)
    if options.task == "texts":
        return texts(
            options.num_candidates, options.num_queries, source=options.data, model=options.model,
            blocks=options.blocks, epochs=options.epochs, autocast=options.drop > LARGE_DROP,
        )  # fmt: skip
    make = {"facts": facts, "sentences": sentences}[options.task]
    return make(options.num_candidates, options.num_queries)


def retrain_subsets(task: Retrainable, options: LdsOptions) -> tuple[Retrained, Retrained]:
    """Train on random subsets, or read the cached losses: those of the queries, and those of the others."""
    assert options.subsets is not None and options.seeds is not None
    say(
        f"{len(task.candidates)} candidates, {len(task.queries)} queries; {options.subsets} random subsets without "
        f"{options.drop:.0%} x {options.seeds} seeds are trained on, or read from the cache."
    )
    subsets = random_subsets(len(task.candidates), options.subsets, options.drop, options.seed)
    return retrained(task, subsets, options.seeds)


def retrained(task: Retrainable, subsets: np.ndarray, seeds: int) -> tuple[Retrained, Retrained]:
    """Train on subsets with every seed, or read the cached losses: those of the queries, and those of the others."""
    everyone = concatenate_datasets([task.queries, task.others])
    found = task.retrained(everyone, subsets, seeds)[..., 0]
    if seeds > 1:
        say(f"Correlation of two seeds' losses over the subsets: {agreement(found):.3f}.")
    losses, count = found.mean(axis=0), len(task.queries)
    return Retrained(task.queries, subsets, losses[:, :count]), Retrained(task.others, subsets, losses[:, count:])


def judge(
    explained: Sequence[Mapping[str, Attributor]], candidates: Dataset, measured: Retrained
) -> tuple[Table, list[dict[str, Attribution]]]:
    """Trace with every attributor, Forward-INF first, and correlate with what training did.

    Args:
        explained (`Sequence[Mapping[str, Attributor]]`): Attributors by name, of each model that is explained.
        candidates (`datasets.Dataset`): The training data.
        measured (`Retrained`): The queries, and what training did to them.

    Returns:
        `tuple`: Figures by attributor, of each query's mean over the explained models; and each model's attributions.
    """
    say(f"\n{HEAD}")
    table: Table = {}
    found: list[dict[str, Attribution]] = [{} for _ in explained]
    by_query: dict[str, np.ndarray] = {}
    for name in explained[0]:
        started = time.perf_counter()
        for attributors, own in zip(explained, found, strict=True):
            own[name] = attributors[name].trace(measured.queries, candidates)
        seconds = time.perf_counter() - started
        truths = [lds_by_query(own[name].dense(), measured.subsets, measured.losses) for own in found]
        by_query[name] = np.mean(truths, axis=0)
        table[name] = with_interval("lds", by_query[name])
        table[name] |= {"trace_seconds": seconds, **step_of(explained[0][name])}
        if name != REFERENCE:
            table[name] |= with_interval("lead", by_query[REFERENCE] - by_query[name])
        say(line(name, table[name]))
    return table, found


def remove_best(
    task: Retrainable, found: Mapping[str, Attribution], options: LdsOptions
) -> dict[str, dict[str, float]]:
    """Train without the best 1% of the candidates of some queries: how much their losses rise, by attributor."""
    queries = task.queries.select(range(min(options.qld, len(task.queries))))
    count = max(1, round(REMOVED * len(task.candidates)))

    def trained(subsets: np.ndarray) -> np.ndarray:
        return task.retrained(queries, subsets, options.seeds or 1)[..., 0].mean(axis=0)

    figures: dict[str, dict[str, float]] = {}
    for name in (name for name in options.qld_methods if name in found):
        rises = rises_without_best(trained, found[name].dense()[: len(queries)], count)
        figures[name] = with_interval("qld", rises)
        low, high = figures[name]["qld_low"], figures[name]["qld_high"]
        say(f"{name}: the loss rises by {rises.mean():.3f} ({low:.3f} - {high:.3f}) without the best {count}")
    return figures


def choose_directions(
    adapter: Adapter, task: Retrainable, others: Retrained, options: LdsOptions
) -> tuple[dict[str, AscentConfig], str]:
    """Choose settings of every direction, and the best direction if there are any, by the LDS of other queries."""
    if not options.directions:
        return {}, ""
    assert options.dampings and options.radii
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
    cells = []
    for key in ("lds", "lead"):
        low, high = (figures.get(f"{key}_{end}") for end in ("low", "high"))
        cells += [number(figures.get(key)), "" if low is None else f"{low:.3f} - {high:.3f}"]
    settings = [number(figures.get(key), "g") for key in ("damping", "radius")]
    return aligned((name, *cells, *settings, number(figures["trace_seconds"], ".1f")), WIDTHS)
