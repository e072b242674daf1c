"""Data leakage (the paper's Table 2): training images in the test set; is the training copy of each found?

    python recipes/leakage.py
    python recipes/leakage.py --change shifted
    python recipes/leakage.py --model resnet20_cifar10 --candidates train_10k.parquet

With no option: scikit-learn's digits and a small network that is trained on them once. `hf-forward-inf leakage` does
the same and more: it chooses what is scored, how, and the radius on a fifth of the leaked images, and measures costs.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.attribution import Attributor
from hf_forward_inf.baselines import RepresentationSimilarity, TracIn
from hf_forward_inf.cli import run_command
from hf_forward_inf.commands.image_task import captioned, load_image_task
from hf_forward_inf.commands.leakage import leaked
from hf_forward_inf.commands.options import IMAGE_CHANGES, ImageOptions
from hf_forward_inf.commands.outputs import Run
from hf_forward_inf.evaluation.tables import flat
from hf_forward_inf.utils.processes import say


@dataclass
class Options(ImageOptions):
    """Which training images are put into the test set, and where the results go.

    Args:
        num_queries (`int`, defaults to 64): Number of training images that are put into the test set.
        change (`str`, defaults to `"none"`): What is done to them: none, shifted, recoloured, recompressed, inverted.
        radius (`float`, defaults to 0.03): Length of the step.
    """

    output: str = "outputs/leakage"
    num_queries: int = field(default=64, metadata={"min": 1})
    change: str = field(default="none", metadata={"choices": IMAGE_CHANGES})
    radius: float = field(default=0.03, metadata={"above": 0})


def main(options: Options) -> dict[str, Any]:
    """Trace copies of training images, and see where their originals are ranked."""
    run = Run(options)
    candidates, adapter = load_image_task(options)

    # The leaked images, changed or not, are the queries; their originals are the proponents.
    rows = np.random.default_rng(options.seed).permutation(len(candidates))[: options.num_queries]
    queries, _ = leaked(candidates, rows, [options.change])
    truth = [[row] for row in rows.tolist()]

    # The score is by how much a candidate's prediction shifts when the model is moved for the query.
    ascent = AscentConfig(direction="gradient", radius=options.radius, seed=options.seed)
    tracer = ForwardInf(adapter=adapter, ascent=ascent, measure="shift")
    attributors: dict[str, Attributor] = {
        "forward_inf": tracer,
        "tracin": TracIn(adapter=adapter),
        "tracin_cosine": TracIn(adapter=adapter, similarity="cosine"),
        "representation": RepresentationSimilarity(adapter=adapter),
    }

    # Is the original ranked first? Of exact copies, cosines and representations find it always: 1 with itself.
    found, table = {}, {}
    for name, attributor in attributors.items():
        found[name] = attributor.trace(queries, candidates)
        figures = found[name].evaluate(truth)
        table[name] = {"top1": figures["recall@1"], "top5": figures["recall@5"], "mrr": figures["mrr"]}
        say(f"{name:16}" + "".join(f"  {key} {value:.3f}" for key, value in table[name].items()))

    return run.write(
        captioned(found["forward_inf"]), flat(table), tracer, table=table, proponents=truth,
        columns=("top1", "top5", "mrr"), title="Which training images are these test images copies of?",
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(main, Options, bars=False, extra="truth"))
