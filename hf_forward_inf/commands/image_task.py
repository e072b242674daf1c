"""Training images, and a classifier that was trained on them: loaded, or trained here."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
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
    """Load the candidates, unless they are given, and load or train the classifier."""
    if candidates is None:
        candidates = load_images(
            options.candidates, label_column=options.label_column, image_column=options.image_column
        )
    if options.num_candidates is not None:
        candidates = sample_rows(candidates, options.num_candidates, options.seed)
    return candidates, classifier(options, candidates)


def classifier(options: ImageOptions, candidates: Dataset) -> ImageClassificationAdapter:
    """Load the classifier, or train it on the candidates."""
    return list(checkpoints(options, candidates, 1).values())[-1]


def checkpoints(options: ImageOptions, candidates: Dataset, count: int) -> dict[int, ImageClassificationAdapter]:
    """Load the classifier, or train it on the candidates.

    Returns:
        `dict[int, ImageClassificationAdapter]`: Checkpoints by epoch, evenly spaced, the trained network last; a
        network that is not trained here has one, after 0 epochs.
    """
    source = options.candidates or "handwritten digits"
    if options.model is not None:
        say(f"Tracing {options.model}, trained on {len(candidates):,} images of {source}.")
        adapter = load_classifier(options.model)
        say(f"Training accuracy: {accuracy(adapter, candidates):.1%}.")
        if not options.fine_tune:
            return {0: adapter}
    else:
        say(
            f"Training a {options.network} network on {len(candidates):,} images of {source}; "
            "--model, --candidates for yours."
        )
        adapter = untrained(
            options.network, candidates, count_classes(candidates), options.seed, blocks=options.blocks,
            width=options.width,
        )  # fmt: skip
    found = train(adapter, candidates, training_of(options, count))
    say(f"Training accuracy: {accuracy(adapter, candidates):.1%}.")
    return found


def with_objective(
    adapter: ImageClassificationAdapter, objective: Literal["cross_entropy", "margin"], first: str | None
) -> ImageClassificationAdapter:
    """Return an adapter of the same model with another objective.

    Args:
        adapter (`ImageClassificationAdapter`): Its model, processor and transform are used.
        objective (`str`): `"cross_entropy"` or `"margin"`.
        first (`str`, *optional*): First child module to perturb. Defaults to `layer3` for a [`networks.ResNet`], else
            to the adapter's own choice.
    """
    return ImageClassificationAdapter(
        adapter.model, adapter.image_processor, transform=adapter.transform, channels=adapter.channels,
        objective=objective, first=first or ("layer3" if isinstance(adapter.model, ResNet) else None),
    )  # fmt: skip


def captioned(found: Attribution, notes: Mapping[int, str] = MappingProxyType({})) -> Attribution:
    """Return an attribution whose rows have a `caption` for the report: the names of the labels of images.

    Args:
        found (`Attribution`): Returned as it is if its rows hold no images.
        notes (`dict[int, str]`, *optional*): Added to the captions of some queries, by row number.
    """
    if "image" not in found.candidates.column_names:
        return found
    names = class_names(found.candidates)

    def with_words(rows: Dataset, notes: Mapping[int, str]) -> Dataset:
        words = [str(label) if names is None else names[label] for label in rows["label"][:]]
        texts = [f"{word}, {notes[i]}" if i in notes else word for i, word in enumerate(words)]
        return rows.add_column("caption", texts, feature=Value("string"))

    return replace(found, queries=with_words(found.queries, notes), candidates=with_words(found.candidates, {}))
