"""What experiments on images trace: training images, and a classifier that was trained on them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from datasets import Dataset, Value

from hf_forward_inf.adapters import ImageClassificationAdapter
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.data.images import class_names, count_classes, load_images
from hf_forward_inf.toys.classifiers import Training, accuracy, load_classifier, train, untrained
from hf_forward_inf.toys.networks import ResNet
from hf_forward_inf.utils.processes import say
from hf_forward_inf.utils.rows import sample_rows


@dataclass
class ImageTask:
    """Images, and the classifier that was trained on them.

    With no `model`, a small network is trained on the candidates once; with no `candidates` either, on handwritten
    digits.
    """

    output: str = field(default="outputs/images", metadata={"help": "Folder for metrics, attribution and report."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a finished run in the output folder."})
    model: str | None = field(
        default=None,
        metadata={"help": "Image classifier: hub name or folder, or a folder with weights of a small ResNet."},
    )
    candidates: str | None = field(
        default=None, metadata={"help": "Its training images: hub name, folder of folders, parquet (default: digits)."}
    )
    label_column: str = field(default="label", metadata={"help": "Column of labels."})
    image_column: str | None = field(default=None, metadata={"help": "Column of images (default: found)."})
    num_candidates: int | None = field(default=None, metadata={"help": "Candidates drawn at random (default: all)."})
    network: Literal["resnet", "conv"] = field(
        default="conv", metadata={"help": "Network that is trained: two convolutions (conv), or a ResNet."}
    )
    blocks: int = field(
        default=3, metadata={"help": "Blocks in each stage of the ResNet: 1 a ResNet-8, 3 a ResNet-20."}
    )
    width: int = field(default=16, metadata={"help": "Channels at the network's first layer."})
    fine_tune: bool = field(default=False, metadata={"help": "Train the given --model on, on the candidates."})
    epochs: int = field(default=30, metadata={"help": "Epochs of the training."})
    optimizer: Literal["adam", "sgd"] = field(
        default="adam", metadata={"help": "Of the training: adam, or sgd with momentum .9."}
    )
    rate: float = field(
        default=1e-2, metadata={"help": "Its learning rate at its highest; rises and falls as one cycle."}
    )
    weight_decay: float = field(default=0.0, metadata={"help": "The optimizer's weight decay."})
    batch_size: int = field(default=64, metadata={"help": "Images in a step of the training."})
    augment: bool = field(default=False, metadata={"help": "Mirror and shift images at random in training."})
    first: str | None = field(
        default=None, metadata={"help": "Child of the model with which perturbation begins (layer3 of a ResNet)."}
    )
    top_k: int = field(default=100, metadata={"help": "Candidates of each query kept in the attribution."})
    seed: int = field(default=0, metadata={"help": "Draws whatever is drawn, and the weights of a new network."})

    def __post_init__(self) -> None:
        if self.model and not self.candidates:
            raise ValueError("--model is given: give its training images as --candidates with it.")
        if self.fine_tune and not self.model:
            raise ValueError("--fine_tune trains a given network on: give --model with it.")
        for name in ("epochs", "batch_size", "blocks", "width", "top_k", "num_candidates"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, not {value}.")
        if not self.rate > 0 or not self.weight_decay >= 0:
            raise ValueError(
                f"--rate must be above 0 and --weight_decay not below, not {self.rate} and {self.weight_decay}."
            )

    def training(self, checkpoints: int = 1) -> Training:
        """How the network is trained."""
        return Training(
            self.epochs, self.rate, self.optimizer, self.weight_decay, self.batch_size, self.augment, self.seed,
            checkpoints,
        )  # fmt: skip


def load_image_task(
    options: ImageTask, candidates: Dataset | None = None
) -> tuple[Dataset, ImageClassificationAdapter]:
    """Load candidates, unless they are given, and the classifier that knows them, or train one."""
    if candidates is None:
        candidates = load_images(
            options.candidates, label_column=options.label_column, image_column=options.image_column
        )
    if options.num_candidates is not None:
        candidates = sample_rows(candidates, options.num_candidates, options.seed)
    return candidates, classifier(options, candidates)


def classifier(options: ImageTask, candidates: Dataset) -> ImageClassificationAdapter:
    """Load the classifier of some candidates, or train it."""
    return list(checkpoints(options, candidates, 1).values())[-1]


def checkpoints(options: ImageTask, candidates: Dataset, count: int) -> dict[int, ImageClassificationAdapter]:
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
    found = train(adapter, candidates, options.training(count))
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
