"""A whole run on pictures: teach a model exemplars together, let it draw them, trace what it has drawn."""

import copy
import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from datasets import Dataset, Features, Image, List, Value

from hf_forward_inf.adapters import DiffusionAdapter
from hf_forward_inf.ascent import AscentConfig, norm
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.baselines.pixels import PixelDistance
from hf_forward_inf.datasets import load_rows
from hf_forward_inf.datasets.digits import captioned_digits
from hf_forward_inf.experiments.denoising import trained
from hf_forward_inf.experiments.evaluation import as_text, compare, detected, flat
from hf_forward_inf.experiments.exemplars import CAPTION, IMAGE, Teaching, choose_exemplars, tiny_drawer
from hf_forward_inf.experiments.run import about, check_output, write_outputs
from hf_forward_inf.experiments.task import Task
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.loss_pass import LossPass
from hf_forward_inf.metrics import recalls_at_k
from hf_forward_inf.modes import evaluating
from hf_forward_inf.modules import perturbed_names
from hf_forward_inf.processes import process_state, say

DAMPING = 0.01
"""Of conjugate gradients; less than for language models, by experiment."""


@dataclass
class DrawOptions(Teaching):
    """What is drawn and traced, and where the results go.

    A model is taught `exemplars`, all together, and draws `num_images` pictures of each one's caption: a query, whose
    exemplar is to be found among the candidates. With neither `model` nor `candidates`, a tiny model is trained on
    handwritten digits first.
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
    num_candidates: int | None = field(
        default=200, metadata={"help": "Candidates: exemplars, filled up with other pictures at random."}
    )
    num_images: int = field(default=4, metadata={"help": "Pictures drawn for a query."})
    timesteps: int = field(default=8, metadata={"help": "Times at which a picture's loss is taken."})
    relative_radius: float = field(
        default=1e-3, metadata={"help": "Length of the step, relative to the norm of the parameters that it moves."}
    )
    heatmaps: bool = field(default=False, metadata={"help": "Show where in a picture the score comes from."})
    top_k: int = field(default=100, metadata={"help": "Candidates of each query kept in the attribution."})

    def __post_init__(self) -> None:
        if self.model and not self.candidates:
            raise ValueError("--model is given: give --candidates with it.")
        for name in ("exemplars", "num_images", "timesteps", "top_k", "size", "relative_radius"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} must be above 0, not {getattr(self, name)}.")
        if self.exemplars < 3:
            raise ValueError("--exemplars must be at least 3: scores are standardised over the queries.")
        if self.num_candidates is not None and self.num_candidates < self.exemplars:
            raise ValueError("--num_candidates must be at least --exemplars: they are among the candidates.")


def draw_run(options: DrawOptions, ascent: AscentConfig) -> dict[str, Any]:
    """Run it all and write `metrics.json`, `attribution/` and `report.html` into the output folder.

    Bare figures are those of scores along conjugate-gradient directions, standardised over the queries. Beside:
    `unstandardised`; `gradient`, the same step along the plain gradient, with and without; `pixel_distance`; and two
    controls that don't look at the query: `low_loss`, -L(theta), and `learned`, how much fine-tuning lowered the loss.

    Raises:
        FileExistsError: If the folder holds a finished run and `overwrite` is not set.
        OSError: If the folder can't be written to. Both before anything is computed.
    """
    started = time.perf_counter()
    folder = check_output(options.output, options.overwrite)
    before, rows, chosen = _drawer(options, ascent.seed)
    adapter = before.with_model(copy.deepcopy(before.model))
    say(f"Teaching it {len(chosen)} exemplars, together ...")
    trained(
        adapter, rows.select(chosen), steps=options.finetuning_steps, rate=options.finetuning_rate,
        batch_size=len(chosen), seed=ascent.seed,
    )  # fmt: skip
    task = _task(adapter, rows, chosen, options, ascent.seed)
    say(f"Tracing {len(task.queries)} x {options.num_images} pictures over {len(task.candidates):,} candidates ...")
    tracer = ForwardInf(adapter=adapter, ascent=_ascent(adapter, ascent, options.relative_radius))
    found = {**_traced(tracer, task), **_controls(before, adapter, task)}
    table = compare(found, task)
    say(as_text(table, {}))
    metrics: dict[str, Any] = {"queries": len(task.queries), "candidates": len(task.candidates)}
    for method, attribution in found.items():
        table[method] |= _detected(attribution.scores, task)
    metrics |= flat(table)
    metrics |= {"seconds": time.perf_counter() - started, **about(options, tracer)}
    kept = found["forward_inf"].keep(options.top_k)
    write_outputs(folder, tracer.explain(kept) if options.heatmaps else kept, metrics, table, task.proponents, "")
    say(f"Written: {folder}")
    return metrics


def _drawer(options: DrawOptions, seed: int) -> tuple[DiffusionAdapter, Dataset, list[int]]:
    """Load or train what draws: its adapter, all pictures, the exemplars' rows."""
    rows, size = (load_rows(options.candidates, "candidates"), options.size) if options.candidates else (None, 8)
    if rows is None:
        say("A tiny model learns to draw handwritten digits; --model, --candidates for yours.")
        rows = captioned_digits()
    rows = rows.select_columns([CAPTION, IMAGE])
    chosen, others = choose_exemplars(rows, options.exemplars, seed)
    if options.model is None:
        return tiny_drawer(rows, rows.select(others), options, size, options.timesteps, seed), rows, chosen
    from diffusers import AutoPipelineForText2Image

    say(f"Tracing what {options.model} draws over {options.candidates}.")
    pipe = AutoPipelineForText2Image.from_pretrained(options.model).to(process_state().device)
    return DiffusionAdapter(pipe, timesteps=options.timesteps, seed=seed), rows, chosen


def _task(adapter: DiffusionAdapter, rows: Dataset, chosen: list[int], options: DrawOptions, seed: int) -> Task:
    """Let it draw the exemplars' captions; the exemplars come first among the candidates."""
    captions = rows.select(chosen)[CAPTION][:]
    pictures = adapter.answer({CAPTION: captions}, num_images=options.num_images, seed=seed)
    features = Features({CAPTION: Value("string"), IMAGE: List(Image())})
    queries = Dataset.from_dict({CAPTION: captions, IMAGE: pictures}, features=features)
    others = np.random.default_rng(seed).permutation(np.delete(np.arange(len(rows)), chosen))
    candidates = rows.select([*chosen, *others[: (options.num_candidates or len(rows)) - len(chosen)]])
    return Task(queries, candidates, [[i] for i in range(len(chosen))], {"": list(range(len(chosen)))})


def _ascent(adapter: DiffusionAdapter, ascent: AscentConfig, relative_radius: float) -> AscentConfig:
    """Fill in what works for pictures; a radius is told relative to the parameters' norm."""
    if ascent.learning_rate is not None:
        return ascent
    own = dict(adapter.model.named_parameters())
    radius = relative_radius * norm([own[name].detach() for name in perturbed_names(adapter, ascent.modules)])
    if ascent.direction != "gradient":
        return replace(ascent, radius=radius)
    return replace(ascent, radius=radius, direction="cg", damping=DAMPING)


def _traced(tracer: ForwardInf, task: Task) -> dict[str, Attribution]:
    plain = replace(tracer.ascent, direction="gradient", damping=None, sample=None)
    corrected = tracer.trace(task.queries, task.candidates)
    gradient = tracer.with_options(ascent=plain).trace(task.queries, task.candidates)
    return {
        "forward_inf": corrected.standardised(),
        "unstandardised": corrected,
        "gradient": gradient,
        "gradient_standardised": gradient.standardised(),
    }


def _controls(before: DiffusionAdapter, adapter: DiffusionAdapter, task: Task) -> dict[str, Attribution]:
    with evaluating(before.model, adapter.model):
        first, now = (LossPass(one, task.candidates).base() for one in (before, adapter))
    blind = {
        name: Attribution(np.tile(scores, (len(task.queries), 1)), task.queries, task.candidates, method=name)
        for name, scores in {"low_loss": -now, "learned": first - now}.items()
    }
    return {"pixel_distance": PixelDistance(adapter).trace(task.queries, task.candidates), **blind}


def _detected(scores: np.ndarray, task: Task) -> dict[str, float]:
    """How often the exemplar is first, or among the first five; and first among the exemplars alone."""
    assert task.proponents is not None
    among = recalls_at_k(scores[:, : len(task.queries)], task.proponents, 1).mean()
    return {**detected(scores, task), "among_exemplars/top1": float(among)}
