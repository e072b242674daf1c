"""Exemplars that a diffusion model is taught and draws: what is loaded, traced and compared."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from datasets import Dataset

from experiments.diffusion_alone import REFERENCES, candidates_of
from experiments.diffusion_methods import baselines, controls, traced
from experiments.diffusion_removal import as_figures, removal_rises
from hf_forward_inf.adapters import DiffusionAdapter
from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.baselines import PixelDistance, Random
from hf_forward_inf.commands.outputs import Run
from hf_forward_inf.data import load_captioned
from hf_forward_inf.data.digits import captioned_digits
from hf_forward_inf.data.image_changes import CHANGES
from hf_forward_inf.evaluation.tables import Table, among_own, as_text, compare, detected, flat
from hf_forward_inf.evaluation.task import Task
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.toys.drawings import (
    CAPTION,
    IMAGE,
    Drawing,
    Teaching,
    choose_exemplars,
    drawings,
    tiny_drawer,
)
from hf_forward_inf.utils.options import RunOptions
from hf_forward_inf.utils.processes import process_state, say


@dataclass
class DiffusionOptions(Teaching, RunOptions):
    """What is drawn and traced, and where the results go.

    A model is taught `exemplars`, all together or each `alone`, and draws `num_images` pictures of each one's caption:
    a query, whose exemplar is to be found among the candidates. With neither `model` nor `candidates`, a tiny model is
    trained on handwritten digits first.

    Args:
        model (`str`, *optional*): Text-to-image pipeline: hub name or local folder.
        candidates (`str`, *optional*): Pictures with captions (columns image, caption): hub name, folder, parquet.
        size (`int`, defaults to 16): Size in pixels of what a tiny model draws; digits have 8.
        exemplars (`int`, defaults to 20): Number of pictures taught and traced.
        alone (`bool`, defaults to `False`): Teach each exemplar to a model of its own, as the paper does.
        num_candidates (`int`, defaults to 200): Number of candidates: exemplars, filled up at random; with alone, half
            of the others by overlap of captions.
        fewer_candidates (`list[int]`, *optional*): Smaller numbers of candidates among which queries are ranked too.
        num_images (`int`, defaults to 4): Pictures drawn for each caption.
        drawing_seed (`int`, defaults to 0): Seeds the noise that pictures begin with.
        change (`str`, defaults to `"none"`): What is done to drawings before they are traced: none, shifted,
            recoloured, recompressed, inverted.
        timesteps (`int`, defaults to 8): Timesteps at which the loss of a picture is taken.
        baselines (`bool`, defaults to `False`): Also run the expensive baselines: TracIn, fixed rates, the exemplar
            itself as query.
        checks (`bool`, defaults to `False`): Also measure noise, agreement with TracIn, the captions' part, cost and
            memory (not with alone).
        removed (`int`, defaults to 0): Instead of teaching, train a tiny model on all pictures, and again without so
            many best candidates of each drawing.
        retrained (`int`, defaults to 5): Drawings for which it is trained again.
        heatmaps (`bool`, defaults to `False`): Show where in a picture the score comes from.
    """

    output: str = "outputs/diffusion"
    model: str | None = None
    candidates: str | None = None
    size: int = field(default=16, metadata={"min": 1})
    exemplars: int = field(default=20, metadata={"min": 3})
    alone: bool = False
    num_candidates: int = field(default=200, metadata={"above": REFERENCES})
    fewer_candidates: list[int] = field(default_factory=list, metadata={"above": REFERENCES})
    num_images: int = field(default=4, metadata={"min": 1})
    drawing_seed: int = 0
    change: str = field(default="none", metadata={"choices": tuple(CHANGES)})
    timesteps: int = field(default=8, metadata={"min": 1})
    baselines: bool = False
    checks: bool = False
    removed: int = field(default=0, metadata={"min": 0})
    retrained: int = field(default=5, metadata={"min": 1})
    heatmaps: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is not None and self.candidates is None:
            raise ValueError("--model is given: give --candidates with it.")
        if self.removed and (self.model is not None or self.alone):
            raise ValueError("--removed trains a tiny model from the start: leave out --model and --alone.")
        if min([self.num_candidates, *self.fewer_candidates]) < self.exemplars and not self.alone:
            raise ValueError("--num_candidates must be at least --exemplars: they are among the candidates.")

    @property
    def drawing(self) -> Drawing:
        """Return how queries are drawn."""
        return Drawing(self.num_images, self.drawing_seed, self.change)


def load_drawer(options: DiffusionOptions) -> tuple[DiffusionAdapter, Dataset, list[int]]:
    """Load what draws, or train it on all pictures but the exemplars: its adapter, all pictures, exemplars' rows."""
    rows, size = load_pictures(options)
    exemplars, others = choose_exemplars(rows, options.exemplars, options.seed)
    if options.model is None:
        adapter = tiny_drawer(rows, rows.select(others), options, size, options.timesteps, options.seed)
        return adapter, rows, exemplars
    from diffusers import AutoPipelineForText2Image

    say(f"Tracing what {options.model} draws over {options.candidates}.")
    pipe = AutoPipelineForText2Image.from_pretrained(options.model).to(process_state().device)
    return DiffusionAdapter(pipe, timesteps=options.timesteps, seed=options.seed), rows, exemplars


def load_pictures(options: DiffusionOptions) -> tuple[Dataset, int]:
    """Load pictures with captions, and return them with the size at which a tiny model draws them."""
    if options.candidates is not None:
        return load_captioned(options.candidates).select_columns([CAPTION, IMAGE]), options.size
    say("A tiny model learns to draw handwritten digits; --model, --candidates for yours.")
    return captioned_digits().select_columns([CAPTION, IMAGE]), 8


def trace_task(
    before: DiffusionAdapter, options: DiffusionOptions, ascent: AscentConfig, adapter: DiffusionAdapter, task: Task
) -> dict[str, Attribution]:
    """Trace a task with Forward-INF and its variants, controls that ignore the query, and baselines if asked for."""
    tracer = ForwardInf(adapter=adapter, ascent=ascent)
    found = traced(tracer, task.queries, task.candidates)
    found |= controls(before, adapter, task.queries, task.candidates)
    if options.baselines:
        assert task.proponents is not None
        found |= baselines(tracer, task.queries, task.candidates, task.proponents)
    return found


def figures_among(
    found: Mapping[str, Attribution], task: Task, exemplars: list[int], rows: Dataset, options: DiffusionOptions
) -> Table:
    """Compare with the truth among all candidates, and among fewer (figures such as `100/top1`)."""
    table = _figures(found, task)
    for count in options.fewer_candidates:
        own = [list(range(count))] * len(exemplars)
        if options.alone:
            own = [candidates_of(row, rows, count, options.seed + i) for i, row in enumerate(exemplars)]
        say(f"Among {count:,} candidates:")
        for method, figures in _figures(found, replace(task, own=own)).items():
            table[method] |= {f"{count}/{name}": value for name, value in figures.items()}
    return table


def train_without_best(options: DiffusionOptions, ascent: AscentConfig) -> dict[str, Any]:
    """Train on all pictures, trace drawings, and train again without the best candidates of each ([`removal_rises`]).

    Writes what a run writes: `rise` of Forward-INF, of pixel distance and of random candidates.
    """
    run = Run(options)
    rows, size = load_pictures(options)
    exemplars, _ = choose_exemplars(rows, options.exemplars, options.seed)

    def train(some: Dataset, seed: int) -> DiffusionAdapter:
        return tiny_drawer(rows, some, options, size, options.timesteps, seed)

    adapter = train(rows, options.seed)
    tracer = ForwardInf(adapter=adapter, ascent=ascent)
    queries = drawings(adapter, rows.select(exemplars)[CAPTION][:], options.drawing)
    say(f"Tracing {len(queries)} x {options.num_images} pictures over {len(rows):,} candidates ...")
    found = {
        "forward_inf": tracer.trace(queries, rows).standardised(),
        "pixel_distance": PixelDistance(adapter=adapter).trace(queries, rows),
        "random": Random().trace(queries, rows),
    }
    some = queries.select(range(min(options.retrained, len(queries))))
    table = as_figures(removal_rises(train, found, some, rows, options.removed, options.seed))
    metrics = {"queries": len(some), "candidates": len(rows), "removed": options.removed, **flat(table)}
    columns = ("rise", "rise_low", "rise_high", "above_random")
    return run.write(found["forward_inf"], metrics, tracer, table=table, columns=columns)


def likeness(distances: Attribution, task: Task) -> dict[str, float]:
    """Return how far drawings are from their exemplar, and from all candidates: mean squared pixels."""
    assert task.proponents is not None
    own = np.array([distances.scores[i, rows[0]] for i, rows in enumerate(task.proponents)])
    return {
        "drawings/distance_to_exemplar": float(-own.mean()),
        "drawings/distance_to_candidates": float(-np.nanmean(distances.scores)),
    }


def _figures(found: Mapping[str, Attribution], task: Task) -> Table:
    """Compare with the truth, and print it; added is how often the exemplar is first, or among the first five."""
    table = compare(found, task)
    say(as_text(table, {}))
    for method, attribution in found.items():
        table[method] |= detected(among_own(attribution.scores, task), task)
    return table
