"""Options of the commands. Nothing here needs torch, so that `--help` is quick."""

from dataclasses import dataclass, field
from typing import Literal

from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.utils.options import RunOptions

__all__ = [
    "AscentConfig", "CacheOptions", "CompareOptions", "ExploreOptions", "FinetuneOptions", "ImageOptions",
    "LaionOptions", "LeakageOptions", "MislabelOptions", "TraceOptions",
]  # fmt: skip
RADII = (0.003, 0.01, 0.03, 0.1, 0.3)
"""Lengths of the step that `leakage` tries with defaults."""
IMAGE_CHANGES = ("none", "shifted", "recoloured", "recompressed", "inverted")
"""What may be done to an image: the names of [`image_changes.CHANGES`]."""
LEAST_TUNING = 3
"""Least number of queries by which `leakage` chooses settings: scores are standardised over them."""


@dataclass(kw_only=True)
class TraceOptions(RunOptions):
    """Which model, queries and candidates, and where the results go.

    Args:
        model (`str`): Language model, classifier of texts or images, PEFT adapter or diffusers pipeline: hub name or
            local folder.
        candidates (`str`): Training examples: hub name[:config], local folder (of pictures, too), parquet, JSON or
            CSV.
        queries (`str`): Outputs to explain, in the same forms as `candidates`. The model answers those without answer.
        input_column (`str`, *optional*): Column of what the model reads: prompts, questions, images, in queries and
            candidates. Found by name if unset.
        target_column (`str`, *optional*): Column of what the model is to say: completions, answers, labels. Found by
            name if unset.
        num_queries (`int`, *optional*): Number of queries traced at most, drawn at random. All if unset.
        reduction (`str`, defaults to `"sum"`): Loss of a candidate: sum or mean over its target tokens.
        strategy (`str`, defaults to `"auto"`): Which candidates get the finite step: all (full), those that a screen
            keeps of each query (screen), or what is best for the model and the number of candidates (auto).
        screen (`str`, *optional*): Attributor that ranks all candidates first, or several joined by +.
        keep (`int`, *optional*): Candidates of each query that a screen keeps. Defaults to 5% of them, at least 50.
        audit (`int`, defaults to 30): Random others of each query that are scored too, to see what the screen misses.
        baseline_model (`str`, *optional*): Another model, typically the one before fine-tuning, whose scores are
            subtracted: hub name or local folder.
        time_budget (`float`, *optional*): Seconds for scoring: with a screen the best first, otherwise in random
            order; candidates not reached by then have the lowest score, or none.
        tokens (`bool`, *optional*): Colour in the report the tokens (or places of a picture) of the best candidates
            by their part of the score. Defaults to doing so for language models, of up to 50 queries.
        baselines (`bool`, defaults to `True`): Also run BM25, and fixed learning rates if proponents are known.
        compare (`bool`, defaults to `False`): Also run every attributor: gradients, curvature, hidden states, fusion.
        cost (`bool`, defaults to `False`): Also measure what a query costs, in forward passes over the candidates: it
            takes longer than the trace.
    """

    output: str = "outputs/trace"
    model: str
    candidates: str
    queries: str
    input_column: str | None = None
    target_column: str | None = None
    num_queries: int | None = field(default=None, metadata={"min": 1})
    reduction: Literal["sum", "mean"] = "sum"
    strategy: Literal["auto", "full", "screen"] = "auto"
    screen: str | None = None
    keep: int | None = field(default=None, metadata={"min": 1})
    audit: int = field(default=30, metadata={"min": 0})
    baseline_model: str | None = None
    time_budget: float | None = field(default=None, metadata={"above": 0})
    tokens: bool | None = None
    baselines: bool = True
    compare: bool = False
    cost: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("time_budget", "tokens", "compare", "cost"):
            if self.baseline_model is not None and getattr(self, name):
                raise ValueError(f"--{name} is of one model: leave it out with --baseline_model.")


@dataclass(kw_only=True)
class CompareOptions(TraceOptions):
    """Which model, queries and candidates to run every attributor on, and where the results go."""

    output: str = "outputs/compare"
    compare: bool = field(default=True, init=False)


@dataclass
class TrainingOptions(RunOptions):
    """What to fine-tune and trace, and where the results go.

    With none of `model`, `candidates` and `queries`, a tiny Llama is trained on questions about built-in facts, some
    of them answered wrongly on purpose.

    Args:
        model (`str`, *optional*): Causal model to fine-tune: hub name or local folder.
        candidates (`str`, *optional*): Training examples in TRL's formats: hub name[:config], folder, parquet, JSON or
            CSV.
        queries (`str`, *optional*): Prompts whose answers are traced, in the same forms as `candidates`.
        lora (`bool`, defaults to `False`): Fine-tune by LoRA; its weights are perturbed.
        epochs (`int`, defaults to 20): Epochs of the training.
        training_rate (`float`, *optional*): Peak learning rate of the training. Defaults to 2e-3 for a tiny model,
            5e-5 for `model`, 1e-2 for LoRA.
        batch_size (`int`, defaults to 16): Rows in a training step.
    """

    output: str = "outputs/finetune"
    model: str | None = None
    candidates: str | None = None
    queries: str | None = None
    lora: bool = False
    epochs: int = field(default=20, metadata={"min": 1})
    training_rate: float | None = field(default=None, metadata={"above": 0})
    batch_size: int = field(default=16, metadata={"min": 1})

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("model", "candidates", "queries") if getattr(self, name) is not None]
        if given and len(given) < 3:
            raise ValueError(f"--{given[0]} is given: give --model, --candidates and --queries together.")


@dataclass
class FinetuneOptions(TrainingOptions):
    """What to fine-tune and trace, and where the results go.

    With none of `model`, `candidates` and `queries`, a tiny Llama is trained on questions about built-in facts, some
    of them answered wrongly on purpose.

    Args:
        contrast (`bool`, defaults to `False`): Trace wrong answers against the right ones (column right): why this
            rather than that?
        removed (`int`, defaults to 5): Best candidates of each wrong answer that are removed before training again; 0
            to skip this.
    """

    contrast: bool = False
    removed: int = field(default=5, metadata={"min": 0})


@dataclass
class LaionOptions(RunOptions):
    """What drew, what it drew, and the pictures that are streamed.

    With neither `model` nor `candidates`, a tiny model is trained on handwritten digits and traced over them.

    Args:
        model (`str`, *optional*): Text-to-image pipeline: hub name or local folder.
        candidates (`str`, *optional*): Captioned pictures: webdataset shards or parquet, a folder or pattern, or a hub
            name.
        prompt (`list[str]`, *optional*): Captions; each is drawn, and traced.
        images (`list[str]`, *optional*): Files of pictures already drawn, of the one `prompt`.
        num_images (`int`, defaults to 4): Pictures drawn for each caption.
        num_references (`int`, defaults to 3): Captions of candidates that are drawn too, to standardise scores by; 0
            for none.
        image_column (`str`, *optional*): Column of pictures. Found by name if unset.
        caption_column (`str`, *optional*): Column of captions. Found by name if unset.
        timesteps (`int`, defaults to 8): Timesteps at which the loss of a picture is taken.
        chunk_size (`int`, defaults to 2000): Candidates read and traced at once.
        heatmaps (`bool`, defaults to `False`): Show where in a picture the score comes from.
    """

    output: str = "outputs/laion"
    model: str | None = None
    candidates: str | None = None
    prompt: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    num_images: int = field(default=4, metadata={"min": 1})
    num_references: int = field(default=3, metadata={"min": 0})
    image_column: str | None = None
    caption_column: str | None = None
    timesteps: int = field(default=8, metadata={"min": 1})
    chunk_size: int = field(default=2000, metadata={"min": 1})
    heatmaps: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.model is None) != (self.candidates is None):
            raise ValueError("Give --model and --candidates together: what drew, and what it was trained on.")
        if self.model is not None and not (self.prompt or self.images):
            raise ValueError("Give --prompt, which is drawn, or --images that were drawn.")
        if self.images and len(self.prompt) > 1:
            raise ValueError(f"--images are of one prompt, not of {len(self.prompt)}: trace them in several runs.")


@dataclass
class ImageOptions(RunOptions):
    """Images, and the classifier that was trained on them.

    With no `model`, a small network is trained on the candidates once; with no `candidates` either, on handwritten
    digits.

    Args:
        model (`str`, *optional*): Image classifier: hub name or folder, or a folder with weights of a small ResNet.
        candidates (`str`, *optional*): Its training images: hub name, folder of folders, parquet. Handwritten digits
            if unset.
        label_column (`str`, defaults to `"label"`): Column of labels.
        image_column (`str`, *optional*): Column of images. Found by type if unset.
        num_candidates (`int`, *optional*): Number of candidates, drawn at random. All if unset.
        network (`str`, defaults to `"conv"`): Network that is trained: two convolutions (conv), or a ResNet.
        blocks (`int`, defaults to 3): Blocks in each stage of the ResNet: 1 for a ResNet-8, 3 for a ResNet-20.
        width (`int`, defaults to 16): Channels of the network's first layer.
        fine_tune (`bool`, defaults to `False`): Fine-tune the given model on the candidates.
        epochs (`int`, defaults to 30): Epochs of the training.
        training_optimizer (`str`, defaults to `"adam"`): Optimizer of the training: adam, or sgd with momentum 0.9.
        training_rate (`float`, defaults to 0.01): Peak learning rate of the training, of a one-cycle schedule.
        weight_decay (`float`, defaults to 0.0): Weight decay of the training.
        batch_size (`int`, defaults to 64): Images in a training step.
        augment (`bool`, defaults to `False`): Mirror and shift images at random in training.
        first (`str`, *optional*): First child module of the model to be perturbed (layer3 of a ResNet).
    """

    output: str = "outputs/images"
    model: str | None = None
    candidates: str | None = None
    label_column: str = "label"
    image_column: str | None = None
    num_candidates: int | None = field(default=None, metadata={"min": 1})
    network: Literal["resnet", "conv"] = "conv"
    blocks: int = field(default=3, metadata={"min": 1})
    width: int = field(default=16, metadata={"min": 1})
    fine_tune: bool = False
    epochs: int = field(default=30, metadata={"min": 1})
    training_optimizer: Literal["adam", "sgd"] = "adam"
    training_rate: float = field(default=1e-2, metadata={"above": 0})
    weight_decay: float = field(default=0.0, metadata={"min": 0})
    batch_size: int = field(default=64, metadata={"min": 1})
    augment: bool = False
    first: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is not None and self.candidates is None:
            raise ValueError("--model is given: give its training images as --candidates with it.")
        if self.fine_tune and self.model is None:
            raise ValueError("--fine_tune needs a network that is trained already: give --model with it.")


@dataclass
class LeakageOptions(ImageOptions):
    """Which training images are put into the test set, how they are changed, and where the results go.

    With no `model`, a small network is trained on the candidates once; with no `candidates` either, on handwritten
    digits.

    Args:
        num_queries (`int`, defaults to 64): Number of training images that are put into the test set.
        tuning_share (`float`, defaults to 0.2): Share of them that settings are chosen by; the others are evaluated.
        change (`list[str]`, defaults to `["none"]`): What is done to them: none, shifted, recoloured, recompressed,
            inverted. Figures of the first have no prefix.
        radii (`list[float]`): Radii to try.
        baselines (`bool`, defaults to `True`): Also run the baselines.
    """

    output: str = "outputs/leakage"
    num_queries: int = 64
    tuning_share: float = field(default=0.2, metadata={"above": 0, "below": 1})
    change: list[str] = field(default_factory=lambda: ["none"], metadata={"choices": IMAGE_CHANGES})
    radii: list[float] = field(default_factory=lambda: list(RADII), metadata={"above": 0})
    baselines: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.change or not self.radii:
            raise ValueError("--change and --radii need at least one value each.")
        if not LEAST_TUNING <= self.tuning <= self.num_queries - LEAST_TUNING:
            raise ValueError(
                f"--num_queries {self.num_queries} and --tuning_share {self.tuning_share} leave {self.tuning} to "
                f"choose settings by and {self.num_queries - self.tuning} to evaluate: {LEAST_TUNING} or more are "
                "needed for each."
            )

    @property
    def tuning(self) -> int:
        """Number of leaked images by which settings are chosen."""
        return round(self.tuning_share * self.num_queries)


@dataclass
class MislabelOptions(ImageOptions):
    """Which labels to examine, and where the results go.

    Labels of your `candidates` are ranked, the most suspicious first, and written to `labels.csv`. With `flipped` or
    `noisy_column`, and on the handwritten digits that are used without candidates, labels are made wrong or known to
    be wrong, and the run reports how many of them are found. With no `model`, a small network is trained on the
    candidates once.

    Args:
        flipped (`float`, *optional*): Share of the images that get a random label. Defaults to 0.2 for the handwritten
            digits, to none for your candidates.
        rank_by (`str`, defaults to `"loss"`): What your labels are ranked by: the model's loss, which found more wrong
            labels wherever both were measured, or their self_influence.
        noisy_column (`str`, *optional*): Column of labels with people's own mistakes, instead of random ones.
        radius (`float`, defaults to 0.01): Length of the step; longer ones find less.
        other_radii (`list[float]`, *optional*): Other radii to report figures of.
        checkpoints (`int`, defaults to 1): Number of checkpoints, evenly spaced over the training, over which scores
            are summed.
        influence_functions (`bool`, defaults to `True`): Also score by influence functions (EK-FAC), the slowest of
            all.
        influence_modules (`list[str]`, *optional*): Modules that influence functions use, such as layer3 linear. All
            if unset.
    """

    output: str = "outputs/mislabel"
    flipped: float | None = field(default=None, metadata={"above": 0, "below": 1})
    rank_by: Literal["loss", "self_influence"] = "loss"
    noisy_column: str | None = None
    radius: float = field(default=0.01, metadata={"above": 0})
    other_radii: list[float] = field(default_factory=list, metadata={"above": 0})
    checkpoints: int = field(default=1, metadata={"min": 1})
    influence_functions: bool = True
    influence_modules: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.candidates is None and self.noisy_column is None and self.flipped is None:
            self.flipped = 0.2
        if self.checkpoints > self.epochs:
            raise ValueError(f"--checkpoints {self.checkpoints} are more than the {self.epochs} --epochs.")
        if self.checkpoints > 1 and self.model is not None and not self.fine_tune:
            raise ValueError("--checkpoints are of a training: add --fine_tune, or leave --model out.")


@dataclass
class CacheOptions:
    """Show, prune or clear the cache: what was computed of your candidates, so that it is not computed again.

    It is in the folder that the environment variable HF_FORWARD_INF_CACHE names, by default in the Hugging Face home.
    Its limit is HF_FORWARD_INF_CACHE_LIMIT, by default 20GB, or none: each run removes what was used longest ago.

    Args:
        action (`str`, defaults to `"show"`): What to do: show, prune (down to the size to keep), or clear.
        keep (`str`, *optional*): Size that prune leaves, such as 10GB; what was used last stays. Defaults to the
            limit.
    """

    action: Literal["show", "prune", "clear"] = field(default="show", metadata={"positional": True})
    keep: str | None = None


@dataclass(kw_only=True)
class ExploreOptions:
    """Explore a run's results in the browser: pick a query or type one, compare attributors, filter rows.

    Args:
        folder (`str`): Output folder of a run.
        model (`str`, *optional*): Model that answers what you type, and is traced: hub name or local folder.
        candidates (`str`, *optional*): Training examples that are then traced over. Defaults to those of the run.
        port (`int`, *optional*): Port on this machine. Defaults to the first free one from 7860 on.
        export_space (`str`, *optional*): Write a Space that shows the results into this folder, and serve nothing.
    """

    folder: str = field(metadata={"positional": True})
    model: str | None = None
    candidates: str | None = None
    port: int | None = None
    export_space: str | None = None
