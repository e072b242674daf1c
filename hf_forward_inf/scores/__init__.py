"""Correct scores, and measure them against known proponents or against retraining."""

from hf_forward_inf.scores.metrics import evaluate
from hf_forward_inf.scores.retraining import Retrained, lds

__all__ = ["Retrained", "evaluate", "lds"]
