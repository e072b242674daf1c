"""The paper's hypothesis: what an example does to a query correlates with what the query does to the example."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from experiments.groups import GroupTask, mislabelled
from experiments.point_to_point import Influences, LogisticRegression, point_to_point
from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.data.images import count_classes, load_images
from hf_forward_inf.scores.batched_training import BatchedTraining
from hf_forward_inf.scores.metrics import spearman
from hf_forward_inf.toys.networks import ConvNet
from hf_forward_inf.utils.images import in_channels, planes, read_image
from hf_forward_inf.utils.options import RunOptions
from hf_forward_inf.utils.processes import say
from hf_forward_inf.utils.rows import sample_rows
from hf_forward_inf.utils.validation import listed

CAPTION = (
    "Each point is a training example (left) or a group of them: across, how much the query's loss rises when it is "
    "left out of training; up, how much its own loss falls when the query is trained on, or how much it rises as "
    "Forward-INF moves the model."
)


@dataclass
class HypothesisOptions(RunOptions):
    """What is trained, left out and added, and where the results go.

    Args:
        candidates (`str`, *optional*): Images with labels: hub name, folder of folders, parquet. Handwritten digits if
            unset.
        label_column (`str`, defaults to `"label"`): Column of labels.
        image_column (`str`, *optional*): Column of images. Found by type if unset.
        num_candidates (`int`, defaults to 1000): Training examples of the logistic regression.
        num_queries (`int`, defaults to 10): Queries of the logistic regression: of the other examples those of the
            highest loss.
        groups (`int`, defaults to 30): Groups of examples, from no wrong labels to nothing else.
        group_size (`int`, defaults to 35): Examples in a group.
        group_queries (`int`, defaults to 500): Queries of the groups, all with right labels.
        mislabelled (`float`, defaults to 0.5): Share of wrong labels over all groups; twice as many in the last.
        query_counts (`list[int]`, *optional*): Other numbers of the groups' queries to run as well (Table 4).
        ratios (`list[float]`, *optional*): Other shares of wrong labels to run as well (Table 5).
        width (`int`, defaults to 8): Channels of the network's first layer.
        epochs (`int`, defaults to 20): Epochs of the training.
        training_rate (`float`, defaults to 0.05): Peak learning rate of the training.
        batch_size (`int`, defaults to 50): Images in a training step.
        seeds (`int`, defaults to 4): Trainings of each network, averaged.
        radius (`float`, defaults to 0.1): Length of the step.
    """

    output: str = "outputs/hypothesis"
    candidates: str | None = None
    label_column: str = "label"
    image_column: str | None = None
    num_candidates: int = field(default=1000, metadata={"min": 2})
    num_queries: int = field(default=10, metadata={"min": 1})
    groups: int = field(default=30, metadata={"min": 2})
    group_size: int = field(default=35, metadata={"min": 1})
    group_queries: int = field(default=500, metadata={"min": 1})
    mislabelled: float = field(default=0.5, metadata={"above": 0, "max": 0.5})
    query_counts: list[int] = field(default_factory=list, metadata={"min": 1})
    ratios: list[float] = field(default_factory=list, metadata={"above": 0, "max": 0.5})
    width: int = field(default=8, metadata={"min": 1})
    epochs: int = field(default=20, metadata={"min": 1})
    training_rate: float = field(default=0.05, metadata={"above": 0})
    batch_size: int = field(default=50, metadata={"min": 1})
    seeds: int = field(default=4, metadata={"min": 1})
    radius: float = field(default=0.1, metadata={"above": 0})

    @property
    def most_queries(self) -> int:
        """Return the number of the groups' queries that are drawn."""
        return max(self.group_queries, *self.query_counts, 0)


def draw_images(options: HypothesisOptions) -> tuple[Dataset, torch.Tensor, torch.Tensor]:
    """Draw images, and return rows, pixels (float32 `[rows, channels, height, width]`, 0 to 1) and labels.

    Raises:
        ValueError: If there are too few images, or of several sizes, or some have no label.
    """
    rows = load_images(options.candidates, label_column=options.label_column, image_column=options.image_column)
    missing = np.flatnonzero([label is None for label in rows["label"][:]])
    if len(missing):
        raise ValueError(f"Rows {listed(missing)} have no label in `{options.label_column}`: remove them.")
    single = options.num_candidates + options.num_queries
    grouped = options.groups * options.group_size + options.most_queries
    if len(rows) < max(single, grouped):
        raise ValueError(
            f"There are {len(rows)} images; the logistic regression takes {single} (--num_candidates, --num_queries), "
            f"the groups {grouped} (--groups, --group_size, --group_queries, --query_counts)."
        )
    rows = sample_rows(rows, max(grouped, min(len(rows), 2 * options.num_candidates)), options.seed)
    channels = 1 if read_image(rows[0]["image"]).mode in ("L", "1") else 3
    arrays = [planes(in_channels(read_image(row["image"]), channels)) for row in rows]
    if len({array.shape for array in arrays}) > 1:
        raise ValueError("The images are of several sizes: resize them.")
    return rows, torch.from_numpy(np.stack(arrays)).float() / 255, torch.tensor(rows["label"][:])


def single_examples(
    rows: Dataset, inputs: torch.Tensor, labels: torch.Tensor, options: HypothesisOptions
) -> tuple[Attribution, Influences]:
    """Leave each example of a logistic regression out in turn, and add each query: the influences both ways.

    The attribution's scores are those of adding a query.
    """
    say(f"Leaving out {options.num_candidates} examples of a logistic regression, one at a time ...")
    flat = inputs.flatten(1).double()
    constant = torch.ones(len(flat), 1, dtype=torch.float64)
    model = LogisticRegression(torch.cat([flat, constant], dim=1), labels, count_classes(rows))
    chosen, influences = point_to_point(model, options.num_candidates, options.num_queries)
    found = Attribution(
        influences.from_query.astype(np.float32), rows.select(chosen), rows.select(range(options.num_candidates)),
        method="adding each query to the training of a logistic regression (a score is the fall of the loss)",
    )  # fmt: skip
    return found, influences


def groups_of_examples(
    rows: Dataset, inputs: torch.Tensor, labels: torch.Tensor, options: HypothesisOptions
) -> tuple[Influences, np.ndarray, dict[str, dict[str, float]]]:
    """Train without each group and with the queries, and score the groups by Forward-INF.

    Returns:
        `tuple`: Influences both ways, scores, and correlations by name.
    """
    task = _groups(rows, inputs, labels, options)
    say(
        f"Training a network without each of {options.groups} groups, {options.seeds} times; "
        f"{options.mislabelled:.0%} of labels are wrong, {options.group_queries} queries ..."
    )
    grouped = task.influences(options.seeds)
    mirrored = grouped.from_query.mean(0)
    figures = {"noisy": correlations([grouped.to_query.mean(0)], [mirrored])}
    models = [task.model(seed) for seed in range(options.seeds)]
    ascents = {
        "forward_inf": AscentConfig(radius=options.radius, direction="gradient"),
        "forward_inf_cg": AscentConfig(radius=options.radius, direction="cg", damping=0.1, sample=1024),
    }
    scores = {
        name: np.mean([task.forward_inf(one, ascent) for one in models], axis=0) for name, ascent in ascents.items()
    }
    figures |= {name: correlations([mirrored], [rise]) for name, rise in scores.items()}
    return grouped, scores["forward_inf"], figures


def _groups(rows: Dataset, inputs: torch.Tensor, labels: torch.Tensor, options: HypothesisOptions) -> GroupTask:
    classes, count = count_classes(rows), options.groups * options.group_size
    of, noisy = mislabelled(labels[:count].numpy(), options.groups, classes, options.seed, ratio=options.mislabelled)
    kept = slice(count, count + options.most_queries)
    data = torch.cat([inputs[:count], inputs[kept]]), torch.cat([torch.from_numpy(noisy), labels[kept]])
    training = BatchedTraining(
        partial(ConvNet, inputs.shape[1], (inputs.shape[2], inputs.shape[3]), classes, options.width), data, data,
        steps=options.epochs * -(-count // options.batch_size), learning_rate=options.training_rate, momentum=0.9,
        batch_size=options.batch_size,
    )  # fmt: skip
    return GroupTask(training, of, options.group_queries)


def correlations(one: Sequence[Any] | np.ndarray, other: Sequence[Any] | np.ndarray) -> dict[str, float]:
    """Return the correlations of two matrices, means over their rows."""
    pairs = list(zip(one, other, strict=True))
    return {
        "pearson": float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in pairs])),
        "spearman": float(np.mean([spearman(a, b) for a, b in pairs])),
    }
