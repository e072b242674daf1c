"""How much candidates are shaken by steps that know nothing: the measure of their scores."""

import numpy as np

from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.ascent.parameters import copies_in_memory, has_length
from hf_forward_inf.ascent.steps import RandomSteps
from hf_forward_inf.passes.loss_pass import LossPass

DRAWS = 16
"""Random steps: with 4 of them, one of five exemplars that a denoiser was taught alone was not found, with 16 all."""


def sensitivity(loss: LossPass, names: list[str], config: AscentConfig, draws: int) -> np.ndarray:
    """Shake the model at random, and see how much each row's loss varies; see [`ForwardInf.sensitivity`]."""
    if draws < 1:
        raise ValueError(f"draws={draws} must be at least 1.")
    if not has_length(loss.adapter, config):
        raise ValueError(
            "Random steps are as long as the ascent's, in the weights: sensitivity needs a radius, and no LoRA."
        )
    rises = np.empty((draws, len(loss.order)), dtype=np.float32)
    base, block = loss.base(), copies_in_memory(loss.adapter.model, names)
    with np.errstate(invalid="ignore"):
        for start in range(0, draws, block):
            some = range(start, min(start + block, draws))
            steps = RandomSteps(loss.adapter, names, config, some)
            rises[some.start : some.stop] = loss(steps, f"random steps {start + 1}-{some.stop} of {draws}") - base
        found = np.sqrt(np.square(rises).mean(axis=0))
    return np.where(np.isfinite(found), found, np.nan).astype(np.float32)
