"""Memorisation: test images with the training images that the model remembers; features under ascent (Figure 8).

    python recipes/memorization.py
    python recipes/memorization.py --model resnet20_cifar10 --candidates train_10k.parquet --queries test_2k.parquet

With no option: scikit-learn's digits and a small network trained on four fifths of them once. `--help` lists all
options.
"""

import sys
from dataclasses import replace
from typing import Any

import numpy as np
from experiments.memorization import CAPTION, GRID, MemorizationOptions, dynamics, load_test_images, pairs_of

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.cli import run_command
from hf_forward_inf.commands.image_task import captioned, with_objective
from hf_forward_inf.commands.outputs import Run
from hf_forward_inf.evaluation import cost
from hf_forward_inf.report.image_plots import pair_grid
from hf_forward_inf.utils.processes import say


def main(options: MemorizationOptions) -> dict[str, Any]:
    """Trace test images, and pair the ones with the strongest proponents with these; also write `pairs.png`.

    `same_label`: share of pairs with one label. `moved/proponents`, `moved/others`: how far features have moved at the
    largest radius, relative to their length.
    """
    run = Run(options)
    candidates, queries, adapter = load_test_images(options)
    adapter = with_objective(adapter, options.objective, options.first)

    # Trace; scores are standardised over the queries, so that they can be compared between them.
    ascent = AscentConfig(direction="gradient", radius=options.radius, seed=options.seed)
    tracer = ForwardInf(adapter=adapter, ascent=ascent)
    say(f"Tracing {len(queries)} test images over {len(candidates):,} candidates ...")
    found = tracer.trace(queries, candidates).standardised()

    # The queries with the highest scores, and the best candidate of each.
    strongest = np.argsort(-np.nanmax(found.scores, axis=1))[: options.pairs]
    found = replace(found, queries=queries.select(strongest), scores=found.scores[strongest])
    shown = captioned(found)
    pairs = pairs_of(shown)
    same_label = float(np.mean([pair["query_label"] == pair["candidate_label"] for pair in pairs]))
    say(f"{same_label:.0%} of the {len(pairs)} strongest pairs have one label.")

    # Figure 8: the features of the first query's proponents move further than those of others.
    moved, plot = dynamics(tracer, found, options)
    for kind in ("proponents", "others"):
        say(f"Features of {kind} have moved by {moved[f'moved/{kind}']:.1%} of their length.")

    metrics = {"queries": len(queries), "candidates": len(candidates), "same_label": same_label, **moved}
    metrics |= cost.measure(tracer, queries, candidates)
    return run.write(
        shown,
        metrics,
        tracer,
        plot=plot,
        plot_caption=CAPTION,
        title="Which training images does the model remember when it sees these test images?",
        more={GRID: lambda path: pair_grid(path, pairs)},
    )


if __name__ == "__main__":
    sys.exit(run_command(main, MemorizationOptions, bars=False))
