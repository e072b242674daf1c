"""Mislabelled data (the paper's section 4.3): does self-influence rank wrong labels first?

    python recipes/mislabel.py
    python recipes/mislabel.py --candidates train_10k.parquet --num_candidates 2000 --network resnet
    python recipes/mislabel.py --candidates test_2k.parquet --model resnet20 --fine_tune --epochs 4

With no option: scikit-learn's digits, a fifth of which get a random label, and a small network that is trained on them
once. `hf-forward-inf mislabel` does the same and more: people's own mistakes, sums over checkpoints, influence
functions. What is found depends on the training more than on the method.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.baselines import TracIn
from hf_forward_inf.cli import run_command
from hf_forward_inf.commands.image_task import captioned, classifier
from hf_forward_inf.commands.mislabel import CAPTION, flip
from hf_forward_inf.commands.options import ImageOptions
from hf_forward_inf.commands.outputs import Run, plotted
from hf_forward_inf.data.images import count_classes, load_images
from hf_forward_inf.evaluation.tables import flat
from hf_forward_inf.report.image_plots import detection_plot
from hf_forward_inf.scores.metrics import best_first, detection, found_by
from hf_forward_inf.utils.processes import say
from hf_forward_inf.utils.rows import sample_rows


@dataclass
class Options(ImageOptions):
    """Which images, how many wrong labels, and where the results go.

    Args:
        flipped (`float`, defaults to 0.2): Share of the images that get a random label.
        radius (`float`, defaults to 0.01): Length of the step; longer ones find less.
    """

    output: str = "outputs/mislabel"
    flipped: float = field(default=0.2, metadata={"above": 0, "below": 1})
    radius: float = field(default=0.01, metadata={"above": 0})


def main(options: Options) -> dict[str, Any]:
    """Flip labels, train on them, and examine the examples that nothing but themselves supports."""
    run = Run(options)
    rows = load_images(options.candidates, label_column=options.label_column, image_column=options.image_column)
    rows = sample_rows(rows, options.num_candidates or len(rows), options.seed)

    # A share of the labels is drawn at random; some of these are right by chance.
    truth = np.array(rows["label"][:])
    labels = flip(truth, options.flipped, count_classes(rows), options.seed)
    rows = rows.remove_columns("label").add_column("label", labels.tolist(), feature=rows.features["label"])
    wrong = labels != truth
    say(f"{wrong.sum()} of {len(rows):,} labels are wrong.")

    # Self-influence: how much an example's own step raises its own loss.
    adapter = classifier(options, rows)
    ascent = AscentConfig(direction="gradient", radius=options.radius, seed=options.seed)
    tracer = ForwardInf(adapter=adapter, ascent=ascent)
    scores = {
        "forward_inf": tracer.self_influence(rows),
        "tracin": TracIn(adapter=adapter).self_influence(rows),
        "random": np.random.default_rng(options.seed).random(len(rows)),
    }

    # Which share of the wrong labels is among the 15% that are examined first?
    table = {name: detection(one, wrong) for name, one in scores.items()}
    for name, figures in table.items():
        say(f"{name:12}" + "".join(f"  {key} {value:.3f}" for key, value in figures.items()))

    # The report shows the images of highest self-influence with their proponents.
    highest = best_first(scores["forward_inf"])[:20]
    found = tracer.trace(rows.select(highest), rows, top_k=min(options.top_k, len(rows)))
    notes = {i: f"really {truth[row]}" for i, row in enumerate(highest.tolist()) if wrong[row]}
    curves = {name: found_by(one, wrong) / wrong.sum() for name, one in scores.items()}
    metrics: dict[str, Any] = {"candidates": len(rows), "mislabelled": int(wrong.sum()), **flat(table)}
    return run.write(
        captioned(found, notes), metrics, tracer, table=table, columns=tuple(table["random"]),
        plot=plotted(detection_plot, curves), plot_caption=CAPTION, title="Which labels are wrong?",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(main, Options, bars=False, extra="truth"))
