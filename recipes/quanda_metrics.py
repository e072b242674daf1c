"""quanda's metrics of attribution: Forward-INF and quanda's own wrappers of captum.

    python recipes/quanda_metrics.py
    python recipes/quanda_metrics.py --network conv
    python recipes/quanda_metrics.py --model resnet20 --candidates train_10k.parquet --queries test_2k.parquet

With no option: scikit-learn's digits and networks of 1,810 parameters, trained once for each metric and repeat. With a
model of your own, the metrics that need no other training. It needs quanda (`recipes/experiments/quanda_explainer.py`
says how to install it), and writes `figures.json` and `metrics.json`.
"""

import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from experiments.retrainable import NETWORKS

from hf_forward_inf.cli import run_command
from hf_forward_inf.commands.outputs import check_output, environment
from hf_forward_inf.data.images import load_images
from hf_forward_inf.evaluation.figures import as_markdown, save_figures
from hf_forward_inf.evaluation.tables import flat
from hf_forward_inf.utils.options import RunOptions
from hf_forward_inf.utils.processes import say
from hf_forward_inf.utils.rows import sample_rows

if TYPE_CHECKING:
    from experiments.quanda_tasks import Problem

COLUMNS = {
    "class_detection": "class", "subclass_detection": "subclass", "mislabelling": "wrong labels",
    "shortcut": "shortcut", "mixed_datasets": "mixed data", "cardinality": "distinct", "lds": "LDS",
}  # fmt: skip
"""Titles of the metrics."""


@dataclass
class Options(RunOptions):
    """Which networks, and where the figures go.

    Args:
        network (`str`, defaults to `"perceptron"`): Network of the digits: perceptron or conv.
        repeats (`int`, defaults to 3): Draws of data, with networks of another seed each.
        halves (`int`, defaults to 40): Random halves of the data that are trained on for the LDS.
        num_candidates (`int`, defaults to 800): Training images.
        num_queries (`int`, defaults to 50): Queries.
        model (`str`, *optional*): A trained classifier of images instead: hub name, folder or file of weights.
        candidates (`str`, *optional*): Its training images: file, folder or hub name.
        queries (`str`, *optional*): Its test images.
        without (`list[str]`, *optional*): Explainers to leave out.
    """

    output: str = "outputs/quanda"
    network: str = field(default="perceptron", metadata={"choices": tuple(NETWORKS)})
    repeats: int = field(default=3, metadata={"min": 1})
    halves: int = field(default=40, metadata={"min": 2})
    num_candidates: int = field(default=800, metadata={"min": 10})
    num_queries: int = field(default=50, metadata={"min": 2})
    model: str | None = None
    candidates: str | None = None
    queries: str | None = None
    without: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {name for name in ("model", "candidates", "queries") if getattr(self, name) is not None}
        if given and len(given) < 3:
            raise ValueError(f"--{sorted(given)[0]} is given: give --model, --candidates and --queries together.")


def main(options: Options) -> dict[str, Any]:
    """Train, explain by every explainer, and judge by every metric; figures are means over repeats."""
    from experiments.quanda_contenders import CONTENDERS, TITLES, WITHOUT_SELF_INFLUENCE

    folder = check_output(options.output, options.overwrite)
    chosen = {name: make for name, make in CONTENDERS.items() if name not in (options.without or ())}
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in chosen}
    for problem in problems(options):
        for name, make in chosen.items():
            if name in WITHOUT_SELF_INFLUENCE and not problem.explained:
                continue
            with tempfile.TemporaryDirectory() as scratch:
                figures = problem.figures(make(problem, Path(scratch)))
            say(f"{name}: {', '.join(f'{COLUMNS[metric]} {value:.3f}' for metric, value in figures.items())}")
            for metric, value in figures.items():
                found[name][metric].append(value)

    rows = {TITLES.get(name, name): averaged(values) for name, values in found.items()}
    known = {metric: title for metric, title in COLUMNS.items() if any(metric in row for row in rows.values())}
    repeats = 1 if options.model else options.repeats
    note = (
        f"{options.num_candidates:,} images, {options.num_queries} queries, {repeats} repeats, with standard errors."
    )
    say(as_markdown(save_figures(folder / "figures.json", rows, columns=known, note=note)))
    metrics = {**flat({name: averaged(values) for name, values in found.items()}), **environment(options)}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def problems(options: Options) -> "Iterator[Problem]":
    """Yield trained networks, one after another."""
    from experiments.quanda_tasks import Digits, loaded

    if options.model is None:
        for seed in range(options.seed, options.seed + options.repeats):
            digits = Digits(options.network, options.num_candidates, options.num_queries, options.halves, seed)
            yield from digits.problems()
        return
    candidates = sample_rows(load_images(options.candidates), options.num_candidates, options.seed)
    queries = sample_rows(load_images(options.queries), options.num_queries, options.seed)
    yield loaded(options.model, candidates, queries)


def averaged(values: dict[str, list[float]]) -> dict[str, float]:
    """Return means over repeats, and their standard errors where there are several."""
    rows = {}
    for metric, repeats in values.items():
        rows[metric] = float(np.mean(repeats))
        if len(repeats) > 1:
            rows[f"{metric}_se"] = float(np.std(repeats, ddof=1) / len(repeats) ** 0.5)
    return rows


if __name__ == "__main__":
    sys.exit(run_command(main, Options, bars=False))
