"""What experiments on images trace: training images, and a classifier that was trained on them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from datasets import Dataset, Value

from hf_forward_inf.adapters import ImageClassificationAdapter
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.commands.options import ImageOptions
from hf_forward_inf.data.images import class_names, count_classes, load_images
from hf_forward_inf.toys.classifiers import Training, accuracy, load_classifier, train, untrained
from hf_forward_inf.toys.networks import ResNet
from hf_forward_inf.utils.processes import say
from hf_forward_inf.utils.rows import sample_rows


def training_of(options: ImageOptions, checkpoints: int = 1) -> Training:
    """Return how the network is trained."""
    return Training(
        options.epochs, options.training_rate, options.training_optimizer, options.weight_decay, options.batch_size,
        options.augment, options.seed, checkpoints,
    )  # fmt: skip


def load_image_task(
    options: ImageOptions, candidates: Dataset | None = None
) -> tuple[Dataset, ImageClassificationAdapter]:
    """Load candidates, unless they are given, and the classifier that knows them, or train one."""
    if candidates is None:
        candidates = load_images(
            options.candidates, label_column=options.label_column, image_column=options.image_column
        )
    if options.num_candidates is not None:
        candidates = sample_rows(candidates, options.num_candidates, options.seed)
    return candidates, classifier(options, candidates)


def classifier(options: ImageOptions, candidates: Dataset) -> ImageClassificationAdapter:
    """Load the classifier of some candidates, or train it."""
    return list(checkpoints(options, candidates, 1).values())[-1]


def checkpoints(options: ImageOptions, candidates: Dataset, count: int) -> dict[int, ImageClassificationAdapter]:
    """Load the classifier, or train it: the network after so many epochs, at equal distances; the trained one last.

    A network that is not trained here has one, after 0 epochs.
    """
    source = options.candidates or "handwritten digits"
    if options.model is not None:
        say(f"What {options.model} learned from {len(candidates):,} images of {source}.")
        adapter = load_classifier(options.model)
        say(f"It knows {accuracy(adapter, candidates):.1%} of their labels.")
        if not options.fine_tune:
            return {0: adapter}
    else:
        say(
            f"A {options.network} network learns {len(candidates):,} images of {source}; "
            "--model, --candidates for yours."
        )
        adapter = untrained(
            options.network, candidates, count_classes(candidates), options.seed, blocks=options.blocks,
            width=options.width,
        )  # fmt: skip
    found = train(adapter, candidates, training_of(options, count))
    say(f"Trained on them, it knows {accuracy(adapter, candidates):.1%} of their labels.")
    return found


def with_objective(
    adapter: ImageClassificationAdapter, objective: Literal["cross_entropy", "margin"], first: str | None
) -> ImageClassificationAdapter:
    """Give an adapter of the same model that perturbs from `first` on, `layer3` of a [`networks.ResNet`]."""
    return ImageClassificationAdapter(
        adapter.model, adapter.image_processor, transform=adapter.transform, channels=adapter.channels,
        objective=objective, first=first or ("layer3" if isinstance(adapter.model, ResNet) else None),
    )  # fmt: skip


def captioned(found: Attribution, notes: Mapping[int, str]) -> Attribution:
    """Tell in words what is on each image, for the report, and add notes to some queries, by row number."""
    names = class_names(found.candidates)

    def words(rows: Dataset, notes: Mapping[int, str]) -> Dataset:
        told = [str(label) if names is None else names[label] for label in rows["label"][:]]
        texts = [f"{word}, {notes[i]}" if i in notes else word for i, word in enumerate(told)]
        return rows.add_column("caption", texts, feature=Value("string"))

    return replace(found, queries=words(found.queries, notes), candidates=words(found.candidates, {}))
