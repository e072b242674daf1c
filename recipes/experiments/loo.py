"""Leave-one-out: single blocks of a language model's training data, and training without each of them."""

from dataclasses import dataclass, field

import numpy as np

from experiments.lds import retrained
from experiments.retrainable import Retrainable
from experiments.retrainable_texts import texts
from hf_forward_inf.scores.retraining import Retrained, all_but_one
from hf_forward_inf.utils.options import RunOptions
from hf_forward_inf.utils.processes import say

BLOCKS = {True: 512, False: 96}
"""Blocks of other data, and of the built-in facts."""
COLUMNS = ("lds", "lds_low", "lds_high", "lead", "lead_low", "lead_high")
"""Columns of the report's table."""
CAPTION = (
    "The rank correlation, over the blocks that were left out, between a query's scores and how much its loss rises "
    "if the block has weight 0; mean over queries, with its 95% interval. Lead: by how much Forward-INF with defaults "
    "is ahead, query by query."
)


@dataclass
class LooOptions(RunOptions):
    """What to train again and again, and where the results go.

    Args:
        data (`str`, *optional*): A file, folder or hub name of sentences with FTRACE's columns, or of rows with a
            `text`. Defaults to the built-in facts.
        model (`str`, *optional*): A causal language model to fine-tune, a folder or hub name. Defaults to a small
            Llama that is pretrained on other sentences.
        num_candidates (`int`, *optional*): Blocks of 128 tokens. Defaults to 512; of the built-in facts 96.
        left_out (`int`, defaults to 50): Blocks that are left out, drawn at random.
        num_queries (`int`, defaults to 64): Queries.
        models (`int`, defaults to 1): Models to explain, each trained on all blocks with a seed of its own; figures
            are means over them.
        seeds (`int`, defaults to 1): Trainings without each block, averaged.
        without (`list[str]`, *optional*): Attributors to leave out.
    """

    output: str = "outputs/loo"
    data: str | None = None
    model: str | None = None
    num_candidates: int | None = field(default=None, metadata={"min": 2})
    left_out: int = field(default=50, metadata={"min": 2})
    num_queries: int = field(default=64, metadata={"min": 1})
    models: int = field(default=1, metadata={"min": 1})
    seeds: int = field(default=1, metadata={"min": 1})
    without: list[str] = field(default_factory=lambda: ["influence_functions_lissa"])

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_candidates is None:
            self.num_candidates = BLOCKS[self.data is not None]
        if self.left_out > self.num_candidates:
            raise ValueError(f"--left_out {self.left_out} of {self.num_candidates} blocks: leave out fewer.")


def load_blocks(options: LooOptions) -> Retrainable:
    """Load what is trained again, and find the queries."""
    assert options.num_candidates is not None
    return texts(options.num_candidates, options.num_queries, source=options.data, model=options.model, blocks=True)


def leave_out(task: Retrainable, options: LooOptions) -> tuple[Retrained, Retrained]:
    """Train without single blocks, or read the cached losses: those of the queries, and those of the others."""
    count = len(task.candidates)
    rows = np.sort(np.random.default_rng(options.seed).permutation(count)[: options.left_out])
    say(
        f"{len(rows)} of {count} blocks are left out, one at a time x {options.seeds} seeds; what was trained before "
        "is read from the cache."
    )
    return retrained(task, all_but_one(count, rows), options.seeds)
