"""Test images and the training images that a model remembers when it sees them: data, pairs, and Figure 8."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from datasets import Dataset, concatenate_datasets

from experiments.features_under_ascent import features_under_ascent, moved, on_a_plane
from hf_forward_inf.adapters import ImageClassificationAdapter
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.commands.image_task import load_image_task
from hf_forward_inf.commands.options import ImageOptions
from hf_forward_inf.data.images import load_images
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.report.image_plots import dynamics_plot
from hf_forward_inf.utils.rows import sample_rows

TEST_SHARE = 0.2
"""Share of the built-in digits that is held out from training: the test images."""
GRID = "pairs.png"
PROPONENTS = 10
"""Best candidates of a query whose features are computed."""
CAPTION = (
    "Features of examples while the model ascends the loss of the first query: t-SNE of the inputs of its last layer, "
    "fitted to all radii together. Its ten strongest candidates against others drawn at random."
)


@dataclass
class MemorizationOptions(ImageOptions):
    """Which classifier and test images, and where the results go.

    With no `model`, a small network is trained on four fifths of the handwritten digits once.

    Args:
        output (`str`): Folder for metrics, attribution, report and pairs.png.
        queries (`str`, *optional*): Test images: hub name, folder, parquet. The test split of the candidates if unset.
        num_queries (`int`, defaults to 100): Test images traced, drawn at random.
        pairs (`int`, defaults to 24): Pairs shown, at most one for each test image.
        objective (`str`, defaults to `"margin"`): What is raised: the loss (cross_entropy), or minus the margin.
        radius (`float`, defaults to 0.03): Length of the step.
        dynamics (`list[float]`): Radii at which features are computed, the first one 0.
        others (`int`, defaults to 200): Other candidates whose features are computed.
    """

    output: str = "outputs/memorization"
    queries: str | None = None
    num_queries: int = field(default=100, metadata={"min": 3})
    pairs: int = field(default=24, metadata={"min": 1})
    objective: Literal["cross_entropy", "margin"] = "margin"
    radius: float = field(default=0.03, metadata={"above": 0})
    dynamics: list[float] = field(default_factory=lambda: [0.0, 0.03, 0.1, 0.3], metadata={"min": 0})
    others: int = field(default=200, metadata={"min": 1})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.candidates is not None and self.model is None:
            raise ValueError("--candidates are given: give the --model that was trained on them.")
        if self.candidates is None and self.queries is not None:
            raise ValueError("--queries are given: give --candidates with them.")
        if len(self.dynamics) < 2 or self.dynamics[0] != 0:
            raise ValueError("--dynamics must begin with 0 and go on with radii above it.")


def load_test_images(options: MemorizationOptions) -> tuple[Dataset, Dataset, ImageClassificationAdapter]:
    """Load the candidates, the test images and the classifier; a fifth of the digits is held out from training."""
    if options.candidates is None:
        split = load_images().train_test_split(TEST_SHARE, seed=options.seed)
        candidates, adapter = load_image_task(options, split["train"])
        queries = split["test"]
    else:
        candidates, adapter = load_image_task(options)
        queries = load_images(
            options.queries or options.candidates,
            label_column=options.label_column,
            image_column=options.image_column,
            split="test",
        )
    return candidates, sample_rows(queries, options.num_queries, options.seed), adapter


def dynamics(tracer: ForwardInf, found: Attribution, options: MemorizationOptions) -> tuple[dict[str, float], str]:
    """Compute features of the first query, of its best candidates and of others, at several radii.

    Returns:
        `tuple`: How far features of each kind have moved at the last radius, and a plot (t-SNE).
    """
    best, rest = np.split(found.ranking(0), [PROPONENTS])
    drawn = np.random.default_rng(options.seed).permutation(rest)[: options.others]
    query = found.queries.select([0])
    rows = concatenate_datasets([query, found.candidates.select([*best, *drawn]).cast(query.features)])
    kinds = ["query", *["proponents"] * len(best), *["others"] * len(drawn)]
    features = features_under_ascent(tracer, query, rows, options.dynamics)
    far = moved(features)[-1]
    figures = {f"moved/{kind}": float(far[np.array(kinds) == kind].mean()) for kind in dict.fromkeys(kinds)}
    return figures, dynamics_plot(on_a_plane(features, options.seed), kinds, options.dynamics)


def pairs_of(found: Attribution) -> list[dict[str, Any]]:
    """Return each query with its best candidate: their images, captions and score."""
    pairs = []
    for i, query in enumerate(found.queries):
        best = found.top(i, 1)[0]
        pairs.append(
            {
                "query": query["image"], "candidate": best["image"], "score": best["score"],
                "query_label": query["caption"], "candidate_label": best["caption"],
            }
        )  # fmt: skip
    return pairs
