"""RMS change of each candidate's loss under random steps; scores can be divided by it."""

import numpy as np

from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.ascent.parameters import copies_in_memory, has_length
from hf_forward_inf.ascent.steps import RandomSteps
from hf_forward_inf.passes.loss_pass import LossPass

DRAWS = 16
"""Default number of random steps. Each of five denoisers was fine-tuned on one exemplar: in units from 4 steps scores
missed one of the five, in units from 16 steps none."""


def sensitivity(loss: LossPass, names: list[str], config: AscentConfig, draws: int) -> np.ndarray:
    """Compute the RMS change of each row's loss under random steps, `[rows]`; see [`ForwardInf.sensitivity`]."""
    if draws < 1:
        raise ValueError(f"draws={draws} must be at least 1.")
    if not has_length(loss.adapter, config):
        raise ValueError(
            "Sensitivity takes random steps of the ascent's radius, and a fixed learning rate and a LoRA step have no "
            "radius in weight space. It needs a radius, without learning_rate and lora_rank; or use units='loss'."
        )
    rises = np.empty((draws, len(loss.order)), dtype=np.float32)
    base, block = loss.base(), copies_in_memory(loss.adapter.model, names)
    with np.errstate(invalid="ignore"):
        for start in range(0, draws, block):
            stop = min(start + block, draws)
            steps = RandomSteps(loss.adapter, names, config, range(start, stop))
            rises[start:stop] = loss(steps, f"random steps {start + 1}-{stop} of {draws}") - base
        rms = np.sqrt(np.square(rises).mean(axis=0))
    return np.where(np.isfinite(rms), rms, np.nan).astype(np.float32)
