"""Training images that a model remembers when it sees a test image: the paper's pairs, and its Figure 8."""

import time
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from datasets import Dataset, concatenate_datasets

from experiments.features_under_ascent import features_under_ascent, moved, on_a_plane
from hf_forward_inf.adapters import ImageClassificationAdapter
from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.commands.image_task import captioned, load_image_task, with_objective
from hf_forward_inf.commands.options import ImageOptions
from hf_forward_inf.commands.outputs import about, check_output, write_outputs
from hf_forward_inf.data.images import load_images
from hf_forward_inf.evaluation import cost
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.report.image_plots import dynamics_plot, pair_grid
from hf_forward_inf.utils.processes import say
from hf_forward_inf.utils.rows import sample_rows

TEST_SHARE = 0.2
"""Of the built-in digits, what is kept from training: the test images."""
GRID = "pairs.png"
PROPONENTS = 10
"""Best candidates of a query whose features are followed."""
CAPTION = (
    "How the model sees examples while it is moved up the loss of the first query: t-SNE of what its last layer "
    "reads, laid out together for all radii. Its ten strongest candidates against others drawn at random."
)


@dataclass
class MemorizationOptions(ImageOptions):
    """Whose memories are looked for, and where the results go."""

    output: str = field(
        default="outputs/memorization", metadata={"help": "Folder for metrics, attribution, report and pairs.png."}
    )
    queries: str | None = field(
        default=None, metadata={"help": "Test images: hub name, folder, parquet (default: the test split)."}
    )
    num_queries: int = field(default=100, metadata={"help": "Test images traced, drawn at random."})
    pairs: int = field(default=24, metadata={"help": "Pairs shown, at most one a test image."})
    objective: Literal["cross_entropy", "margin"] = field(
        default="margin", metadata={"help": "What is raised: the loss, or minus the margin."}
    )
    radius: float = field(default=0.03, metadata={"help": "Length of the step."})
    dynamics: list[float] = field(
        default_factory=lambda: [0.0, 0.03, 0.1, 0.3], metadata={"help": "Radii at which features are looked at."}
    )
    others: int = field(default=200, metadata={"help": "Other candidates whose features are followed."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.candidates and not self.model:
            raise ValueError("--candidates are given: give the --model that was trained on them.")
        if self.candidates is None and self.queries is not None:
            raise ValueError("--queries are given: give --candidates with them.")
        for name, least in {"num_queries": 3, "pairs": 1, "others": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, not {getattr(self, name)}.")
        if not self.radius > 0 or len(self.dynamics) < 2 or self.dynamics[0] != 0 or min(self.dynamics) < 0:
            raise ValueError("--radius must be above 0, and --dynamics go from 0 to radii above it.")


def memorization_run(options: MemorizationOptions) -> dict[str, Any]:
    """Run it all and write `metrics.json`, `attribution/`, `report.html` and `pairs.png` into the output folder.

    Test images are traced, scores standardised over them, and each is paired with its strongest training image.
    `same_label` is the share of pairs of one label; `moved/proponents` and `moved/others` tell how far features have
    moved at the largest radius, relative to their length.

    Raises:
        FileExistsError: If the folder holds a finished run and `overwrite` is not set.
        OSError: If the folder can't be written to. Both before anything is computed.
    """
    started = time.perf_counter()
    folder = check_output(options.output, options.overwrite)
    candidates, queries, adapter = _load(options)
    adapter = with_objective(adapter, options.objective, options.first)
    tracer = ForwardInf(adapter=adapter, ascent=AscentConfig(radius=options.radius, seed=options.seed))
    say(f"Tracing {len(queries)} test images over {len(candidates):,} candidates ...")
    found = tracer.trace(queries, candidates).standardised()
    strongest = np.argsort(-np.nanmax(found.scores, axis=1))[: options.pairs]
    found = replace(found, queries=queries.select(strongest), scores=found.scores[strongest])
    shown = captioned(found, {})
    figures, plot = _dynamics(tracer, found, options)
    pairs = _pairs(shown)
    metrics: dict[str, Any] = {"queries": len(queries), "candidates": len(candidates)}
    metrics["same_label"] = float(np.mean([pair["query_label"] == pair["candidate_label"] for pair in pairs]))
    metrics |= {**figures, **cost.measure(tracer, queries, candidates)}
    metrics |= {"seconds": time.perf_counter() - started, **about(options, tracer)}
    say(f"{metrics['same_label']:.0%} of the {len(pairs)} strongest pairs have one label.")
    for kind in ("proponents", "others"):
        say(f"Features of {kind} have moved by {metrics[f'moved/{kind}']:.1%} of their length.")
    title = "Which training images does the model remember when it sees these test images?"
    write_outputs(
        folder, shown.keep(min(options.top_k, len(candidates))), metrics, {}, None, plot, title=title,
        plot_caption=CAPTION, more={GRID: lambda path: pair_grid(path, pairs)},
    )  # fmt: skip
    say(f"Written: {folder}")
    return metrics


def _load(options: MemorizationOptions) -> tuple[Dataset, Dataset, ImageClassificationAdapter]:
    """Load candidates, the test images, and the classifier; of the digits a fifth is kept from training."""
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


def _dynamics(tracer: ForwardInf, found: Attribution, options: MemorizationOptions) -> tuple[dict[str, float], str]:
    """Follow the features of the strongest pair's query, of its best candidates, and of others."""
    best, rest = np.split(found.ranking(0), [PROPONENTS])
    drawn = np.random.default_rng(options.seed).permutation(rest)[: options.others]
    query = found.queries.select([0])
    rows = concatenate_datasets([query, found.candidates.select([*best, *drawn]).cast(query.features)])
    kinds = ["query", *["proponents"] * len(best), *["others"] * len(drawn)]
    features = features_under_ascent(tracer, query, rows, options.dynamics)
    far = moved(features)[-1]
    figures = {f"moved/{kind}": float(far[np.array(kinds) == kind].mean()) for kind in dict.fromkeys(kinds)}
    return figures, dynamics_plot(on_a_plane(features, options.seed), kinds, options.dynamics)


def _pairs(found: Attribution) -> list[dict[str, Any]]:
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
