"""The run of `mislabel`: does self-influence find wrong labels (the paper's section 4.3)?"""

from typing import Any

import numpy as np
from datasets import Dataset

from hf_forward_inf.adapters import ImageClassificationAdapter
from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.baselines import FirstOrder, TracIn
from hf_forward_inf.commands.image_task import captioned, checkpoints, classifier, with_objective
from hf_forward_inf.commands.options import MislabelOptions
from hf_forward_inf.commands.outputs import Run, plotted
from hf_forward_inf.data.images import class_names, count_classes, load_images
from hf_forward_inf.evaluation.tables import flat
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.passes.loss_pass import LossPass
from hf_forward_inf.report.image_plots import detection_plot
from hf_forward_inf.scores.metrics import best_first, detection, found_by
from hf_forward_inf.utils.models import evaluating
from hf_forward_inf.utils.processes import say
from hf_forward_inf.utils.rows import sample_rows
from hf_forward_inf.utils.text_tables import text_table

SHOWN = 20
"""Images that the report shows, those of highest self-influence."""
LABELS = "labels.csv"
CAPTION = "The share of all wrong labels among the examples examined, those of highest self-influence (or loss) first."


def flip(labels: np.ndarray, share: float, classes: int, seed: int = 0) -> np.ndarray:
    """Return labels of which a share is drawn again from all classes: some of these stay the same."""
    draw, noisy = np.random.default_rng(seed), labels.copy()
    rows = draw.permutation(len(labels))[: round(share * len(labels))]
    noisy[rows] = draw.integers(0, classes, len(rows))
    return noisy


def mislabel_run(options: MislabelOptions) -> dict[str, Any]:
    """Rank labels, and write `metrics.json`, `attribution/` and `report.html` into the output folder.

    Labels that may be wrong are ranked by [`rank_labels`]; where it is known which are wrong, this is measured:
    `detected_at_15_percent`, with its ceiling and precision, and `auc` ([`metrics.detection`]). Those of Forward-INF's
    self-influence have no prefix; those of TracIn's, of influence functions', of the loss and of a random order have
    their names before them. With several checkpoints scores are summed over them; figures of each are under
    `epoch_20/` and so on. The report traces the images of highest self-influence.

    Raises:
        FileExistsError: If the folder holds a finished run and `overwrite` is not set.
        OSError: If the folder can't be written to. Both before anything is computed.
        ValueError: If no label is wrong, or all are.
    """
    if options.flipped is None and options.noisy_column is None:
        return rank_labels(options)
    run = Run(options)
    rows, truth = _labelled(options)
    wrong = np.array(rows["label"][:]) != truth
    if not 0 < wrong.sum() < len(wrong):
        raise ValueError(f"{wrong.sum()} of {len(wrong)} labels are wrong: nothing is to be found, or nothing else.")
    say(f"{wrong.sum()} of {len(rows):,} labels are wrong.")
    adapters = checkpoints(options, rows, options.checkpoints)
    found = {epoch: self_influences(adapter, rows, options) for epoch, adapter in adapters.items()}
    scores = {name: np.sum([one[name] for one in found.values()], axis=0) for name in next(iter(found.values()))}
    scores["random"] = np.random.default_rng(options.seed).random(len(rows))
    table = {name: detection(one, wrong) for name, one in scores.items()}
    for name, row in table.items():
        say(f"{name:12}" + "".join(f"  {key} {value:.3f}" for key, value in row.items()))
    by_epoch: dict[str, float] = {}
    if len(found) > 1:
        for epoch, alone in found.items():
            figures = flat({name: detection(one, wrong) for name, one in alone.items()})
            by_epoch |= {f"epoch_{epoch}/{name}": value for name, value in figures.items()}
    tracer = _tracer(list(adapters.values())[-1], options.radius, options)
    highest = best_first(scores["forward_inf"])[:SHOWN]
    attribution = tracer.trace(rows.select(highest), rows, top_k=min(options.top_k, len(rows)))
    curves = {name: found_by(one, wrong) / wrong.sum() for name, one in scores.items()}
    metrics: dict[str, Any] = {"candidates": len(rows), "mislabelled": int(wrong.sum()), **flat(table), **by_epoch}
    return run.write(
        captioned(attribution, _notes(rows, truth, highest)), metrics, tracer, table=table,
        columns=tuple(table["loss"]), plot=plotted(detection_plot, curves), plot_caption=CAPTION,
        title="Which labels are wrong?",
    )  # fmt: skip


def rank_labels(options: MislabelOptions) -> dict[str, Any]:
    """Rank the labels of the user's images, the most suspicious first, and write `labels.csv` besides the rest.

    Its columns: `row`, `label` and `model_label` (names where there are names), `loss` and `self_influence`.

    Returns:
        `dict`: What `metrics.json` holds: `model_disagrees`, the share of labels that are not the model's.
    """
    run = Run(options)
    rows = _rows(options, options.label_column)
    adapter = classifier(options, rows)
    tracer = _tracer(adapter, options.radius, options)
    with evaluating(adapter.model):
        scores = {"loss": LossPass(adapter, rows).base(), "self_influence": tracer.self_influence(rows)}
    order = best_first(scores[options.rank_by])
    names = class_names(rows)
    given, predicted = rows["label"][:], adapter.answer({"image": rows["image"][:]})
    labels, own = ([str(one) if names is None else names[one] for one in ones] for ones in (given, predicted))
    columns = {"row": order, "label": np.array(labels)[order], "model_label": np.array(own)[order]}
    table = Dataset.from_dict(columns | {name: values[order] for name, values in scores.items()})
    differ = np.array(given) != np.array(predicted)
    say(f"{differ.sum()} of {len(rows):,} labels are not the model's. The most suspicious, by {options.rank_by}:")
    first = table.select(range(min(SHOWN, len(table))))
    cells = [[str(one["row"]), one["label"], one["model_label"], f"{one['loss']:.3g}"] for one in first]
    say(text_table([["row", "label", "the model says", "loss"], *cells]))
    shown = order[:SHOWN]
    found = tracer.trace(rows.select(shown), rows, top_k=min(options.top_k, len(rows)))
    notes = {i: f"the model says {own[row]}" for i, row in enumerate(shown.tolist()) if differ[row]}
    metrics = {"candidates": len(rows), "model_disagrees": float(differ.mean())}
    return run.write(
        captioned(found, notes), metrics, tracer, more={LABELS: table.to_csv}, title="Which labels look wrong?",
    )  # fmt: skip


def self_influences(
    adapter: ImageClassificationAdapter, rows: Dataset, options: MislabelOptions
) -> dict[str, np.ndarray]:
    """Score every row by what it does to itself, and by its loss: float32 `[rows]` by method."""
    scores = {"forward_inf": _tracer(adapter, options.radius, options).self_influence(rows)}
    for radius in options.other_radii:
        scores[f"radius_{radius:g}"] = _tracer(adapter, radius, options).self_influence(rows)
    scores["tracin"] = TracIn(adapter=adapter).self_influence(rows)
    if options.influence_functions:
        curved = AscentConfig(direction="ekfac", seed=options.seed)
        other = FirstOrder(adapter=adapter, ascent=curved, modules=options.influence_modules)
        scores["influence_functions"] = other.self_influence(rows)
    with evaluating(adapter.model):
        scores["loss"] = LossPass(adapter, rows).base()
    return scores


def _tracer(adapter: ImageClassificationAdapter, radius: float, options: MislabelOptions) -> ForwardInf:
    if options.first is not None:
        adapter = with_objective(adapter, "cross_entropy", options.first)
    # Along the gradient, whose steps are taken for many rows in one batch: every row is a query of its own.
    ascent = AscentConfig(direction="gradient", radius=radius, seed=options.seed)
    return ForwardInf(adapter=adapter, ascent=ascent)


def _rows(options: MislabelOptions, column: str) -> Dataset:
    rows = load_images(options.candidates, label_column=column, image_column=options.image_column)
    few = options.num_candidates
    return rows if few is None else sample_rows(rows, few, options.seed)


def _labelled(options: MislabelOptions) -> tuple[Dataset, np.ndarray]:
    """Load images with the labels that are trained on, and the right ones."""
    rows = _rows(options, options.label_column)
    truth = np.array(rows["label"][:])
    if options.noisy_column is not None:
        return _rows(options, options.noisy_column), truth
    assert options.flipped is not None
    noisy = flip(truth, options.flipped, count_classes(rows), options.seed)
    return rows.remove_columns("label").add_column("label", noisy.tolist(), feature=rows.features["label"]), truth


def _notes(rows: Dataset, truth: np.ndarray, shown: np.ndarray) -> dict[int, str]:
    """What the wrong ones of some rows really are, by place."""
    names = class_names(rows) or [str(label) for label in range(truth.max() + 1)]
    given = rows["label"][:]
    return {i: f"really {names[truth[row]]}" for i, row in enumerate(shown.tolist()) if given[row] != truth[row]}
