"""The paper's hypothesis: what an example does to a query correlates with what the query does to the example."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from experiments.groups import GroupTask, mislabelled
from experiments.point_to_point import Influences, LogisticRegression, point_to_point
from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.commands.image_task import captioned
from hf_forward_inf.commands.outputs import check_output, environment, plotted, write_outputs
from hf_forward_inf.data.images import count_classes, load_images
from hf_forward_inf.report.image_plots import scatter_plot
from hf_forward_inf.scores.metrics import spearman
from hf_forward_inf.scores.retraining import BatchedTraining
from hf_forward_inf.toys.networks import ConvNet
from hf_forward_inf.utils.images import in_channels, planes, read_image
from hf_forward_inf.utils.processes import say
from hf_forward_inf.utils.rows import sample_rows
from hf_forward_inf.utils.validation import listed

CAPTION = (
    "Each point is a training example (left) or a group of them: across, how much the query's loss rises when it is "
    "left out of training; up, how much its own loss falls when the query is trained on, or how much it rises as "
    "Forward-INF moves the model."
)


@dataclass
class HypothesisOptions:
    """What is trained, left out and added, and where the results go."""

    output: str = field(default="outputs/hypothesis", metadata={"help": "Folder for metrics, scores and report."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a finished run in the output folder."})
    candidates: str | None = field(
        default=None, metadata={"help": "Images with labels: hub name, folder of folders, parquet (default: digits)."}
    )
    label_column: str = field(default="label", metadata={"help": "Column of labels."})
    image_column: str | None = field(default=None, metadata={"help": "Column of images (default: found)."})
    training: int = field(default=1000, metadata={"help": "Examples of the logistic regression."})
    queries: int = field(default=10, metadata={"help": "Its queries: of the others those of the highest loss."})
    groups: int = field(default=30, metadata={"help": "Groups, from no wrong labels to nothing else."})
    group_size: int = field(default=35, metadata={"help": "Examples in a group."})
    group_queries: int = field(default=500, metadata={"help": "Queries of the groups, all with right labels."})
    mislabelled: float = field(
        default=0.5, metadata={"help": "Share of wrong labels among all groups; twice as many in the last."}
    )
    query_counts: list[int] = field(
        default_factory=list, metadata={"help": "Other numbers of the groups' queries to run too (Table 4)."}
    )
    ratios: list[float] = field(
        default_factory=list, metadata={"help": "Other shares of wrong labels to run too (Table 5): trains all anew."}
    )
    width: int = field(default=8, metadata={"help": "Channels of the network's first convolution."})
    epochs: int = field(default=20, metadata={"help": "Epochs of its training."})
    learning_rate: float = field(default=0.05, metadata={"help": "Of its training."})
    batch_size: int = field(default=50, metadata={"help": "Of its training."})
    seeds: int = field(default=4, metadata={"help": "Trainings of each, averaged."})
    radius: float = field(default=0.1, metadata={"help": "Length of Forward-INF's step."})
    seed: int = field(default=0, metadata={"help": "Draws examples and wrong labels."})

    def __post_init__(self) -> None:
        for name in ("radius", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} must be above 0, not {getattr(self, name)}.")
        counts = ("queries", "group_size", "group_queries", "width", "epochs", "batch_size", "seeds")
        for name, least in {"training": 2, "groups": 2, **dict.fromkeys(counts, 1)}.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, not {getattr(self, name)}.")
        if not all(0 < ratio <= 0.5 for ratio in (self.mislabelled, *self.ratios)):
            raise ValueError("--mislabelled and --ratios are above 0 and at most 0.5: twice as many are in one group.")
        if not all(count >= 1 for count in self.query_counts):
            raise ValueError("--query_counts must be at least 1.")

    @property
    def most_queries(self) -> int:
        """Queries of the groups that are drawn."""
        return max(self.group_queries, *self.query_counts, 0)


def hypothesis_run(options: HypothesisOptions) -> dict[str, Any]:
    """Run it all and write `metrics.json`, `attribution/` and `report.html` into the output folder.

    `noiseless/pearson` and `spearman`: of the two influences of single examples on the queries of a logistic
    regression (Table 1). `noisy/...`: of groups on the queries of a convolutional network. `forward_inf/...`:
    Forward-INF's scores of groups against the influence that they stand for, Inf(D_i <- D_tst) (Table 7);
    `forward_inf_cg/...`, along conjugate gradients. `queries_50/noisy/...` and `mislabelled_0.2/noisy/...`: the same
    for other numbers of queries and shares of wrong labels (Tables 4 and 5), if they are asked for.

    Raises:
        FileExistsError: If the folder holds a finished run and `overwrite` is not set.
        OSError: If the folder can't be written to. Both before anything is computed.
        ValueError: If there are too few images, or of several sizes.
    """
    started = time.perf_counter()
    folder = check_output(options.output, options.overwrite)
    rows, inputs, labels = _drawn(options)
    say(f"Leaving out {options.training} examples of a logistic regression, one at a time ...")
    found, single = _noiseless(rows, inputs, labels, options)
    figures = {"noiseless": _figures(single.to_query, single.from_query)}
    grouped, scores, own = _grouped(rows, inputs, labels, options)
    figures |= own
    others = {f"queries_{count}": replace(options, group_queries=count) for count in options.query_counts}
    others |= {f"mislabelled_{ratio:g}": replace(options, mislabelled=ratio) for ratio in options.ratios}
    for case, other in others.items():
        found_there = _grouped(rows, inputs, labels, other)[2]
        figures |= {f"{case}/{name}": row for name, row in found_there.items()}
    for name, row in figures.items():
        say(f"{name:28} Pearson {row['pearson']:.4f}  Spearman {row['spearman']:.4f}")
    metrics: dict[str, Any] = {f"{name}/{key}": value for name, row in figures.items() for key, value in row.items()}
    metrics |= {"queries": options.queries, "candidates": options.training, **environment(options)}
    panels = {
        "One example, one query": (single.to_query.ravel(), single.from_query.ravel()),
        "Groups, by retraining": (grouped.to_query.mean(0), grouped.from_query.mean(0)),
        "Groups, Forward-INF": (grouped.from_query.mean(0), scores),
    }
    metrics["seconds"] = time.perf_counter() - started
    write_outputs(
        folder, found, metrics, figures, None, plotted(scatter_plot, panels),
        columns=("pearson", "spearman"), plot_caption=CAPTION,
        title="Does the mirror hold? Leaving one example out, against adding the query",
    )  # fmt: skip
    say(f"Written: {folder}")
    return metrics


def _drawn(options: HypothesisOptions) -> tuple[Dataset, torch.Tensor, torch.Tensor]:
    """Draw images and read them: rows, float32 `[rows, channels, height, width]` from 0 to 1, and labels."""
    rows = load_images(options.candidates, label_column=options.label_column, image_column=options.image_column)
    missing = np.flatnonzero([label is None for label in rows["label"][:]])
    if len(missing):
        raise ValueError(f"Rows {listed(missing)} have no label in `{options.label_column}`: take them out.")
    single = options.training + options.queries
    grouped = options.groups * options.group_size + options.most_queries
    if len(rows) < max(single, grouped):
        raise ValueError(
            f"There are {len(rows)} images; the logistic regression takes {single} (--training, --queries), "
            f"the groups {grouped} (--groups, --group_size, --group_queries, --query_counts)."
        )
    rows = sample_rows(rows, max(grouped, min(len(rows), 2 * options.training)), options.seed)
    channels = 1 if read_image(rows[0]["image"]).mode in ("L", "1") else 3
    arrays = [planes(in_channels(read_image(row["image"]), channels)) for row in rows]
    if len({array.shape for array in arrays}) > 1:
        raise ValueError("The images are of several sizes: bring them to one.")
    return rows, torch.from_numpy(np.stack(arrays)).float() / 255, torch.tensor(rows["label"][:])


def _noiseless(
    rows: Dataset, inputs: torch.Tensor, labels: torch.Tensor, options: HypothesisOptions
) -> tuple[Attribution, Influences]:
    flat = inputs.flatten(1).double()
    constant = torch.ones(len(flat), 1, dtype=torch.float64)
    model = LogisticRegression(torch.cat([flat, constant], dim=1), labels, count_classes(rows))
    chosen, influences = point_to_point(model, options.training, options.queries)
    found = Attribution(
        influences.from_query.astype(np.float32), rows.select(chosen), rows.select(range(options.training)),
        method="adding each query to the training of a logistic regression (so a score is a loss's fall)",
    )  # fmt: skip
    return captioned(found, {}), influences


def _grouped(
    rows: Dataset, inputs: torch.Tensor, labels: torch.Tensor, options: HypothesisOptions
) -> tuple[Influences, np.ndarray, dict[str, dict[str, float]]]:
    """Train without each group and with the queries, and score the groups: influences, scores, correlations."""
    task = _groups(rows, inputs, labels, options)
    say(
        f"Training a network without each of {options.groups} groups, {options.seeds} times; "
        f"{options.mislabelled:.0%} of labels are wrong, {options.group_queries} queries ..."
    )
    grouped = task.influences(options.seeds)
    mirrored = grouped.from_query.mean(0)
    figures = {"noisy": _figures([grouped.to_query.mean(0)], [mirrored])}
    models = [task.model(seed) for seed in range(options.seeds)]
    ascents = {
        "forward_inf": AscentConfig(radius=options.radius, direction="gradient"),
        "forward_inf_cg": AscentConfig(radius=options.radius, direction="cg", damping=0.1, sample=1024),
    }
    scores = {
        name: np.mean([task.forward_inf(one, ascent) for one in models], axis=0) for name, ascent in ascents.items()
    }
    figures |= {name: _figures([mirrored], [rise]) for name, rise in scores.items()}
    return grouped, scores["forward_inf"], figures


def _groups(rows: Dataset, inputs: torch.Tensor, labels: torch.Tensor, options: HypothesisOptions) -> GroupTask:
    classes, count = count_classes(rows), options.groups * options.group_size
    of, noisy = mislabelled(labels[:count].numpy(), options.groups, classes, options.seed, ratio=options.mislabelled)
    kept = slice(count, count + options.most_queries)
    data = torch.cat([inputs[:count], inputs[kept]]), torch.cat([torch.from_numpy(noisy), labels[kept]])
    training = BatchedTraining(
        partial(ConvNet, inputs.shape[1], (inputs.shape[2], inputs.shape[3]), classes, options.width), data, data,
        steps=options.epochs * -(-count // options.batch_size), learning_rate=options.learning_rate, momentum=0.9,
        batch_size=options.batch_size,
    )  # fmt: skip
    return GroupTask(training, of, options.group_queries)


def _figures(one: Sequence[Any] | np.ndarray, other: Sequence[Any] | np.ndarray) -> dict[str, float]:
    """Correlate query by query, and average."""
    pairs = list(zip(one, other, strict=True))
    return {
        "pearson": float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs])),
        "spearman": float(np.mean([spearman(a, b) for a, b in pairs])),
    }
