"""A whole run on pictures: teach a model exemplars, let it draw them, trace what it has drawn."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from experiments.diffusion_alone import NOTE, REFERENCES, candidates_of, one_by_one
from experiments.diffusion_checks import checks
from experiments.diffusion_methods import baselines, controls, traced
from experiments.diffusion_removal import as_figures, removal_rises
from hf_forward_inf.adapters import DiffusionAdapter
from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.baselines import PixelDistance, Random
from hf_forward_inf.commands.outputs import about, check_output, write_outputs
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
    taught,
    tiny_drawer,
    together,
)
from hf_forward_inf.utils.processes import process_state, say


@dataclass
class DiffusionOptions(Teaching):
    """What is drawn and traced, and where the results go.

    A model is taught `exemplars`, all together or each `alone`, and draws `num_images` pictures of each one's caption:
    a query, whose exemplar is to be found among the candidates. With neither `model` nor `candidates`, a tiny model is
    trained on handwritten digits first.
    """

    output: str = field(default="outputs/diffusion", metadata={"help": "Folder for metrics, attribution and report."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a finished run in the output folder."})
    model: str | None = field(
        default=None, metadata={"help": "Text-to-image pipeline: hub name or local folder (default: a tiny one)."}
    )
    candidates: str | None = field(
        default=None, metadata={"help": "Pictures with captions (columns image, caption): hub name, folder, parquet."}
    )
    size: int = field(default=16, metadata={"help": "Size of pictures in pixels for a tiny model; digits have 8."})
    exemplars: int = field(default=20, metadata={"help": "Pictures taught and traced."})
    alone: bool = field(
        default=False, metadata={"help": "Teach each exemplar to a model of its own, as the paper does."}
    )
    num_candidates: list[int] = field(
        default_factory=lambda: [200],
        metadata={
            "help": "Candidates: exemplars, filled up at random; alone, half of the others by their captions. Several "
            "numbers: all are traced among the most, and ranked among fewer, too."
        },
    )
    num_images: int = field(default=4, metadata={"help": "Pictures drawn for a query."})
    drawing_seed: int = field(default=0, metadata={"help": "Draws the noise that pictures begin with."})
    change: str = field(
        default="none",
        metadata={"help": f"What is done to drawings before they are traced: {', '.join(CHANGES)}."},
    )
    timesteps: int = field(default=8, metadata={"help": "Times at which a picture's loss is taken."})
    baselines: bool = field(
        default=False, metadata={"help": "Trace with what is dearer too: TracIn, fixed rates, the exemplar itself."}
    )
    checks: bool = field(
        default=False,
        metadata={"help": "Measure noise, agreement with TracIn, captions' part, cost and memory (not alone)."},
    )
    removed: int = field(
        default=0,
        metadata={"help": "Instead of teaching: train a tiny model on all pictures, and again without so many best."},
    )
    retrained: int = field(default=5, metadata={"help": "Drawings for which it is trained again."})
    heatmaps: bool = field(default=False, metadata={"help": "Show where in a picture the score comes from."})
    top_k: int = field(default=100, metadata={"help": "Candidates of each query kept in the attribution."})

    def __post_init__(self) -> None:
        if self.model and not self.candidates:
            raise ValueError("--model is given: give --candidates with it.")
        for name in ("exemplars", "num_images", "timesteps", "top_k", "size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} must be above 0, not {getattr(self, name)}.")
        if self.removed and (self.model or self.alone):
            raise ValueError("--removed trains a tiny model from the start: leave out --model and --alone.")
        if self.change not in CHANGES:
            raise ValueError(f"--change {self.change} is not known: {', '.join(CHANGES)}.")
        if self.exemplars < 3:
            raise ValueError("--exemplars must be at least 3: scores are standardised over the queries.")
        if min(self.num_candidates) < self.exemplars and not self.alone:
            raise ValueError("--num_candidates must be at least --exemplars: they are among the candidates.")
        if min(self.num_candidates) <= REFERENCES:
            raise ValueError(f"--num_candidates must be above {REFERENCES}.")

    @property
    def drawing(self) -> Drawing:
        """How queries are drawn."""
        return Drawing(self.num_images, self.drawing_seed, self.change)


def diffusion_run(options: DiffusionOptions, ascent: AscentConfig) -> dict[str, Any]:
    """Run it all and write `metrics.json`, `attribution/` and `report.html` into the output folder.

    Bare figures are those of scores along conjugate-gradient directions, by how they fare with all queries (each
    exemplar alone: with drawings of other captions), in units of the candidates' sensitivity; beside, other directions
    and units ([`traced`]). `pixel_distance`, `representation` (of latents), `denoiser_features`, `bm25`;
    `low_loss` and `learned`, which don't look at the query ([`controls`]); with
    `baselines` those of [`baselines`]; with `checks` the figures of [`checks`]. Several
    `num_candidates`: figures among the most stand bare, those among 100 under `100/`. `drawings/...`: how far drawings
    are from their exemplar ([`likeness`]). With `removed` the figures are those of [`as_figures`].

    Raises:
        FileExistsError: If the folder holds a finished run and `overwrite` is not set.
        OSError: If the folder can't be written to. Both before anything is computed.
    """
    started = time.perf_counter()
    folder = check_output(options.output, options.overwrite)
    if options.removed:
        return _without_best(options, ascent, folder, started)
    before, rows, chosen = _drawer(options, ascent.seed)
    methods = partial(_methods, before, options, ascent)
    *fewer, most = sorted({min(count, len(rows)) for count in options.num_candidates})
    if options.alone:
        tracer = ForwardInf(adapter=before, ascent=ascent)
        task, found = one_by_one(
            before, rows, chosen, methods, options, options.drawing, num_candidates=most, seed=ascent.seed
        )
    else:
        say(f"Teaching it {len(chosen)} exemplars, together ...")
        adapter = taught(before, rows.select(chosen), options, ascent.seed)
        tracer = ForwardInf(adapter=adapter, ascent=ascent)
        task = together(adapter, rows, chosen, most, options.drawing, ascent.seed)
        say(
            f"Tracing {len(task.queries)} x {options.num_images} pictures over {len(task.candidates):,} candidates ..."
        )
        found = methods(adapter, task)
    table = _figures(found, task)
    for count in fewer:
        if options.alone:
            own = [candidates_of(row, rows, count, ascent.seed + number) for number, row in enumerate(chosen)]
        else:
            own = [list(range(count))] * len(chosen)
        say(f"Among {count:,} candidates:")
        for method, figures in _figures(found, replace(task, own=own)).items():
            table[method] |= {f"{count}/{name}": value for name, value in figures.items()}
    metrics: dict[str, Any] = {"queries": len(task.queries), "candidates": most, **flat(table)}
    metrics |= likeness(found["pixel_distance"], task)
    if options.checks and not options.alone:
        assert task.proponents is not None
        metrics |= _told(checks(tracer, task.queries, task.candidates, task.proponents))
    metrics |= {"seconds": time.perf_counter() - started, **about(options, tracer)}
    kept = found["forward_inf"].keep(min(options.top_k, most))
    explained = options.heatmaps and not options.alone
    shown = tracer.explain(kept) if explained else kept
    write_outputs(folder, shown, metrics, table, task.proponents, "", note=NOTE if options.alone else "")
    say(f"Written: {folder}")
    return metrics


def _drawer(options: DiffusionOptions, seed: int) -> tuple[DiffusionAdapter, Dataset, list[int]]:
    """Load or train what draws: its adapter, all pictures, the exemplars' rows."""
    rows, size = _pictures(options)
    chosen, others = choose_exemplars(rows, options.exemplars, seed)
    if options.model is None:
        return tiny_drawer(rows, rows.select(others), options, size, options.timesteps, seed), rows, chosen
    from diffusers import AutoPipelineForText2Image

    say(f"Tracing what {options.model} draws over {options.candidates}.")
    pipe = AutoPipelineForText2Image.from_pretrained(options.model).to(process_state().device)
    return DiffusionAdapter(pipe, timesteps=options.timesteps, seed=seed), rows, chosen


def _pictures(options: DiffusionOptions) -> tuple[Dataset, int]:
    """Load pictures with captions; with it the size at which a tiny model draws them."""
    if options.candidates:
        return load_captioned(options.candidates).select_columns([CAPTION, IMAGE]), options.size
    say("A tiny model learns to draw handwritten digits; --model, --candidates for yours.")
    return captioned_digits().select_columns([CAPTION, IMAGE]), 8


def _without_best(options: DiffusionOptions, ascent: AscentConfig, folder: Path, started: float) -> dict[str, Any]:
    """Train on everything, trace drawings, and see what they lose with their best candidates."""
    rows, size = _pictures(options)
    chosen, _ = choose_exemplars(rows, options.exemplars, ascent.seed)

    def train(some: Dataset, seed: int) -> DiffusionAdapter:
        return tiny_drawer(rows, some, options, size, options.timesteps, seed)

    adapter = train(rows, ascent.seed)
    tracer = ForwardInf(adapter=adapter, ascent=ascent)
    queries = drawings(adapter, rows.select(chosen)[CAPTION][:], options.drawing)
    say(f"Tracing {len(queries)} x {options.num_images} pictures over {len(rows):,} candidates ...")
    found = {
        "forward_inf": tracer.trace(queries, rows).standardised(),
        "pixel_distance": PixelDistance(adapter=adapter).trace(queries, rows),
        "random": Random().trace(queries, rows),
    }
    judged = queries.select(range(min(options.retrained, len(queries))))
    rises = removal_rises(train, found, judged, rows, options.removed, ascent.seed)
    table = as_figures(rises)
    metrics = {"queries": len(judged), "candidates": len(rows), "removed": options.removed, **flat(table)}
    metrics |= {"seconds": time.perf_counter() - started, **about(options, tracer)}
    kept = found["forward_inf"].keep(min(options.top_k, len(rows)))
    write_outputs(folder, kept, metrics, table, None, "", columns=("rise", "rise_low", "rise_high", "above_random"))
    say(f"Written: {folder}")
    return metrics


def _methods(
    before: DiffusionAdapter, options: DiffusionOptions, ascent: AscentConfig, adapter: DiffusionAdapter, task: Task
) -> dict[str, Attribution]:
    """Trace a task with everything that is asked for."""
    tracer = ForwardInf(adapter=adapter, ascent=ascent)
    found = traced(tracer, task.queries, task.candidates)
    found |= controls(before, adapter, task.queries, task.candidates)
    if options.baselines:
        assert task.proponents is not None
        found |= baselines(tracer, task.queries, task.candidates, task.proponents)
    return found


def likeness(distances: Attribution, task: Task) -> dict[str, float]:
    """Tell how far drawings are from their exemplar, and from the other candidates: mean squared pixels."""
    assert task.proponents is not None
    own = np.array([distances.scores[i, rows[0]] for i, rows in enumerate(task.proponents)])
    return {
        "drawings/distance_to_exemplar": float(-own.mean()),
        "drawings/distance_to_candidates": float(-np.nanmean(distances.scores)),
    }


def _told(figures: dict[str, float]) -> dict[str, float]:
    """Say what was measured."""
    for name, value in figures.items():
        say(f"{name}: {value:.4g}")
    return figures


def _figures(found: Mapping[str, Attribution], task: Task) -> Table:
    """Compare with the truth, and say it; how often the exemplar is first, or among the first five, beside."""
    table = compare(found, task)
    say(as_text(table, {}))
    for method, attribution in found.items():
        table[method] |= detected(among_own(attribution.scores, task), task)
    return table
