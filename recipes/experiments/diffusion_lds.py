"""Options of the truth about a denoiser's pictures."""

from dataclasses import dataclass, field

from experiments.diffusion_contenders import BASELINES, STEPS
from experiments.diffusion_truth import NETWORKS, DenoiserTruth
from hf_forward_inf.data import load_captioned
from hf_forward_inf.data.digits import captioned_digits
from hf_forward_inf.evaluation.tables import REFERENCE
from hf_forward_inf.toys.drawings import CAPTION as TEXT
from hf_forward_inf.toys.drawings import IMAGE
from hf_forward_inf.toys.pixel_pipeline import GROUPS
from hf_forward_inf.utils.options import RunOptions

CAPTION = (
    "LDS: the rank correlation between the losses that scores predict and those after training on random halves of "
    "the pictures; mean over queries, with its 95% interval. Settings were chosen by other queries."
)
METHODS = (REFERENCE, *STEPS, "unlearning", "trak", "d_trak", "mucs", *BASELINES)
"""All that is compared."""
SIZES = {"perceptron": (128, 500), "unet": (24, 700)}
"""Width and training steps of a denoiser, where they are unset."""


@dataclass
class DenoiserOptions(RunOptions):
    """What to train again and again, and where the results go.

    Args:
        candidates (`str`, *optional*): Pictures with captions (columns image, caption): hub name, folder, parquet.
            Defaults to scikit-learn's digits.
        size (`int`, defaults to 8): Height and width to which pictures are shrunk, in pixels.
        num_candidates (`int`, defaults to 600): Pictures that are trained on.
        num_queries (`int`, defaults to 40): Queries; as many others serve to choose settings.
        network (`str`, defaults to `"perceptron"`): What removes the noise: a perceptron of pixels, or a UNet, which
            needs a GPU: 123 are trained in 80 seconds on an H200, one in 10 on a CPU core.
        width (`int`, *optional*): Features of a perceptron's hidden layers, or channels of a UNet at full size.
            Defaults to 128; UNets: 24.
        training_steps (`int`, *optional*): Training steps of 32 pictures. Defaults to 500; UNets: 700.
        timesteps (`int`, defaults to 16): Timesteps of the losses that are traced, the same for all methods.
        query_timesteps (`int`, *optional*): Timesteps of a query's loss; MUCS has none of their own. Defaults to four
            times as many.
        subsets (`int`, defaults to 40): Random halves that are trained on.
        seeds (`int`, defaults to 2): Trainings of each half, averaged.
        models (`int`, defaults to 1): Models that are explained, trained on all pictures with different seeds.
        removed (`int`, defaults to 50): Best candidates of a query without which is trained again; 0 for no such test.
        retrained (`int`, defaults to 20): Queries for which it is.
        removal_seeds (`int`, defaults to 1): Trainings for each, averaged.
        removed_by (`list[str]`, *optional*): Methods whose best candidates are removed. Defaults to all.
    """

    output: str = "outputs/diffusion_lds"
    candidates: str | None = None
    size: int = field(default=8, metadata={"min": 1})
    num_candidates: int = field(default=600, metadata={"min": 2})
    num_queries: int = field(default=40, metadata={"min": 2})
    network: str = field(default="perceptron", metadata={"choices": tuple(NETWORKS)})
    width: int | None = field(default=None, metadata={"min": 1})
    training_steps: int | None = field(default=None, metadata={"min": 2})
    timesteps: int = field(default=16, metadata={"min": 1})
    query_timesteps: int | None = field(default=None, metadata={"min": 1})
    subsets: int = field(default=40, metadata={"min": 2})
    seeds: int = field(default=2, metadata={"min": 1})
    models: int = field(default=1, metadata={"min": 1})
    removed: int = field(default=50, metadata={"min": 0})
    retrained: int = field(default=20, metadata={"min": 1})
    removal_seeds: int = field(default=1, metadata={"min": 1})
    removed_by: list[str] | None = field(default=None, metadata={"choices": METHODS})

    def __post_init__(self) -> None:
        super().__post_init__()
        width, steps = SIZES[self.network]
        self.width = width if self.width is None else self.width
        self.training_steps = steps if self.training_steps is None else self.training_steps
        if self.network == "unet" and self.width % GROUPS:
            raise ValueError(f"--width {self.width} must be a multiple of {GROUPS} for a UNet, which norms groups.")
        if self.removed >= self.num_candidates:
            raise ValueError(f"--removed {self.removed} leaves nothing of --num_candidates {self.num_candidates}.")
        if self.removed_by and REFERENCE not in self.removed_by:
            raise ValueError(f"--removed_by needs {REFERENCE}, with which the others are compared.")


def load_truth(options: DenoiserOptions) -> DenoiserTruth:
    """Load the pictures, and return what trains on them."""
    assert options.width is not None and options.training_steps is not None
    rows = captioned_digits() if options.candidates is None else load_captioned(options.candidates)
    return DenoiserTruth(
        rows.select_columns([TEXT, IMAGE]), options.size, options.num_candidates, options.num_queries,
        network=options.network, width=options.width, steps=options.training_steps, traced_at=options.timesteps,
        queries_at=options.query_timesteps, seed=options.seed,
    )  # fmt: skip
