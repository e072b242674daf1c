"""How much do scores depend on what users do: seeds, checkpoints, precision, LoRA, optimizers, rows, a base model?

    python recipes/sensitivity.py
    python recipes/sensitivity.py --repeats 3

A tiny Llama learns 600 sentences of the built-in facts, as in `recipes/lds.py --task sentences`, whose models, trained
again on random halves, are the truth. Each row of the table changes one thing, and compares the scores with the truth
and with those of the reference. An interrupted run resumes.
"""

import shutil
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiments.lds import LdsOptions, load_task, retrain_subsets
from experiments.retrainable import Retrainable
from experiments.sensitivity import REFERENCE, Sensitivity, Variant
from torch import Tensor

from hf_forward_inf.attribution import Attribution
from hf_forward_inf.cli import run_command
from hf_forward_inf.commands.outputs import Run
from hf_forward_inf.data import proponents
from hf_forward_inf.evaluation.figures import as_markdown, save_figures
from hf_forward_inf.evaluation.tables import flat
from hf_forward_inf.scores.intervals import with_interval
from hf_forward_inf.scores.metrics import best_first, reciprocal_ranks, spearman
from hf_forward_inf.scores.retraining import Retrained, lds_by_query
from hf_forward_inf.tracing.planning import KEEP
from hf_forward_inf.tracing.screened import floored
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.options import RunOptions
from hf_forward_inf.utils.processes import say
from hf_forward_inf.utils.storage import cached_tensors

TITLES = {
    "lds": "LDS", "lds_gain": "LDS, less the reference's", "rank_correlation": "rank correlation with it",
    "same_best": "same among the 10 best", "mrr": "MRR", "unwanted": "unseen or repeated among the 10 best",
}  # fmt: skip
"""Titles of the columns."""
BEST = 10
SCORES = "scores"
"""Folder, in that of the run, with the scores of the variants that are done."""


@dataclass
class Options(RunOptions):
    """How many rows, models and repeats, and where the results go.

    Args:
        repeats (`int`, defaults to 1): References of several seeds, whose figures are averaged for each query.
        num_candidates (`int`, defaults to 600): Training sentences.
        num_queries (`int`, defaults to 40): Queries.
        subsets (`int`, defaults to 60): Random halves that are trained on for the truth.
        seeds (`int`, defaults to 2): Trainings of each half, averaged.
    """

    output: str = "outputs/sensitivity"
    repeats: int = field(default=1, metadata={"min": 1})
    num_candidates: int = field(default=600, metadata={"min": 60})
    num_queries: int = field(default=40, metadata={"min": 2})
    subsets: int = field(default=60, metadata={"min": 2})
    seeds: int = field(default=2, metadata={"min": 1})


def main(options: Options) -> dict[str, Any]:
    """Trace every variant, and compare its scores with the truth and with the reference's."""
    finished = (Path(options.output) / "metrics.json").exists()
    run = Run(options)
    if finished:  # and not interrupted: its scores are not to be read
        shutil.rmtree(run.folder / SCORES, ignore_errors=True)
    sizes = {name: getattr(options, name) for name in ("num_candidates", "num_queries", "subsets", "seeds")}
    truth_of = LdsOptions(task="sentences", **sizes)
    task = load_task(truth_of)
    truth, _ = retrain_subsets(task, truth_of)

    found: dict[str, list[dict[str, np.ndarray]]] = defaultdict(list)
    for seed in range(options.seed, options.seed + options.repeats):
        variants = Sensitivity(task, seed).variants()
        found_by = partial(traced, task=task, folder=run.folder / SCORES)
        reference = found_by(variants[REFERENCE], name=f"{REFERENCE} {seed}")
        for name, variant in variants.items():
            figures = by_query(variant, found_by(variant, name=f"{name} {seed}"), reference.scores, truth)
            found[name].append(figures)
            say(f"{name}: {', '.join(f'{key} {values.mean():.3f}' for key, values in figures.items())}")

    # Figures are means over queries of the means over repeats, with bootstrap intervals over queries.
    table = {name: averaged(repeats) for name, repeats in found.items()}
    note = (
        f"{options.num_candidates} sentences, {options.num_queries} queries, {options.repeats} repeats; truth: "
        f"{options.subsets} halves x {options.seeds} seeds. 95% intervals over queries."
    )
    say(as_markdown(save_figures(run.folder / "figures.json", table, columns=TITLES, note=note)))
    return run.write(
        reference,
        flat(table),
        table=table,
        columns=tuple(TITLES),
        more={"figures.json": partial(save_figures, rows=table, columns=TITLES, note=note)},
        title="What scores depend on",
    )


def traced(variant: Variant, task: Retrainable, folder: Path, name: str) -> Attribution:
    """Train and trace a variant, or read the scores that an interrupted run has left in a folder."""
    key = fingerprint(task.key, task.queries["text"][:], name)

    def scores() -> dict[str, Tensor]:
        return {"scores": torch.from_numpy(variant.make().trace(task.queries, variant.candidates).dense())}

    known = cached_tensors(folder / f"{key}.safetensors", scores)
    return Attribution(known["scores"].numpy(), task.queries, variant.candidates)


def by_query(variant: Variant, found: Attribution, theirs: np.ndarray, truth: Retrained) -> dict[str, np.ndarray]:
    """Return a variant's figures for each query, `[queries]`, given the reference's scores."""
    scores = found.scores
    own = scores[:, : theirs.shape[1]]  # of the candidates that both have
    lds, known = (lds_by_query(floored(each, KEEP)[0], truth.subsets, truth.losses) for each in (own, theirs))
    best, best_of_all = best_first(own)[:, :BEST], best_first(scores)[:, :BEST]
    pairs = zip(best, best_first(theirs)[:, :BEST], strict=True)
    facts = proponents(truth.queries, variant.candidates)
    figures = {
        "lds": lds,
        "lds_gain": lds - known,
        "rank_correlation": np.array([spearman(*rows) for rows in zip(own, theirs, strict=True)]),
        "same_best": np.array([len(np.intersect1d(*rows)) / BEST for rows in pairs]),
        "mrr": reciprocal_ranks(scores, facts),
    }
    if own.shape == scores.shape and np.array_equal(own, theirs):  # the reference itself
        for name in ("lds_gain", "rank_correlation", "same_best"):
            del figures[name]
    unwanted = {} if variant.unwanted is None else {"unwanted": variant.unwanted[best_of_all].mean(axis=1)}
    return {**figures, **unwanted}


def averaged(repeats: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """Return each figure's mean, and its 95% interval over queries."""
    row: dict[str, float] = {}
    for name in repeats[0]:
        row |= with_interval(name, np.mean([one[name] for one in repeats], axis=0))
    return row


if __name__ == "__main__":
    sys.exit(run_command(main, Options, bars=False))
