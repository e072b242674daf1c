"""What drew this? A diffusion model is taught 20 pictures together, draws them, and every drawing is traced.

    accelerate launch recipes/diffusion.py
    accelerate launch recipes/diffusion.py --candidates pictures.parquet --size 32 --width 48 --batch_size 32
    accelerate launch recipes/diffusion.py --alone --finetuning_steps 100 --finetuning_rate 3e-4 --timesteps 4
        --num_candidates 1000 --fewer_candidates 101    # the paper's task: each exemplar taught to its own model
    accelerate launch recipes/diffusion.py --change inverted    # drawings that differ from their exemplar
    accelerate launch recipes/diffusion.py --removed 50    # no exemplars: trained again without the best candidates
    accelerate launch recipes/diffusion.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --candidates laion

With no option a tiny model learns to draw handwritten digits first. `--help` lists all options.
"""

import sys
from functools import partial
from typing import Any

from experiments.diffusion import (
    DiffusionOptions,
    figures_among,
    likeness,
    load_drawer,
    trace_task,
    train_without_best,
)
from experiments.diffusion_alone import NOTE, one_by_one
from experiments.diffusion_checks import checks

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.cli import run_command
from hf_forward_inf.commands.outputs import Run
from hf_forward_inf.evaluation.tables import flat
from hf_forward_inf.toys.drawings import taught, together
from hf_forward_inf.utils.processes import say


def main(options: DiffusionOptions, ascent: AscentConfig) -> dict[str, Any]:
    """Teach exemplars, draw their captions, trace the drawings, and see where the exemplars are ranked.

    Bare figures: Forward-INF, scores standardised over the queries, in units of the candidates' losses. Others
    under their names: directions and units ([`traced`]), `pixel_distance`, `representation`, `denoiser_features`,
    `bm25`, and `low_loss` and `learned`, which ignore the query ([`controls`]). `drawings/...`: how far drawings are
    from their exemplar.
    """
    if options.removed:
        return train_without_best(options, ascent)
    run = Run(options)

    # A model that can draw, and has not seen the exemplars.
    before, rows, exemplars = load_drawer(options)
    count = min(options.num_candidates, len(rows))
    trace = partial(trace_task, before, options, ascent)

    if options.alone:  # the paper's task: a model for each exemplar, whose drawings are traced
        adapter = before
        task, found = one_by_one(
            before, rows, exemplars, trace, options, options.drawing, num_candidates=count, seed=options.seed
        )
    else:  # one model that is taught all exemplars; each of its drawings is a query
        say(f"Teaching it {len(exemplars)} exemplars, together ...")
        adapter = taught(before, rows.select(exemplars), options, options.seed)
        task = together(adapter, rows, exemplars, count, options.drawing, options.seed)
        say(f"Tracing {len(task.queries)} x {options.num_images} pictures over {count:,} candidates ...")
        found = trace(adapter, task)

    # Where are the exemplars ranked, by Forward-INF and by all others?
    tracer = ForwardInf(adapter=adapter, ascent=ascent)
    table = figures_among(found, task, exemplars, rows, options)
    metrics: dict[str, Any] = {"candidates": count, **flat(table)}  # of each query; their union is larger
    metrics |= likeness(found["pixel_distance"], task)
    if options.checks and not options.alone:
        assert task.proponents is not None
        measured = checks(tracer, task.queries, task.candidates, task.proponents)
        say("\n".join(f"{name}: {value:.4g}" for name, value in measured.items()))
        metrics |= measured

    shown = found["forward_inf"].keep(min(options.top_k, count))
    if options.heatmaps and not options.alone:
        shown = tracer.explain(shown)
    return run.write(
        shown, metrics, tracer, table=table, proponents=task.proponents, note=NOTE if options.alone else ""
    )


if __name__ == "__main__":
    sys.exit(run_command(main, DiffusionOptions, AscentConfig))
