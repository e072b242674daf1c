"""Algorithm 1 of "The Mirrored Influence Hypothesis" (Ko et al., CVPR 2024): scores of candidates for queries."""

import copy
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from torch import nn
from typing_extensions import Self

from hf_forward_inf.adapters import Adapter, choose_adapter
from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.ascent.parameters import has_length, names_for
from hf_forward_inf.ascent.steps import Mirrored, Perturbation
from hf_forward_inf.curvature.directions import direction_for
from hf_forward_inf.passes.candidate_pass import MAX_BATCH_LENGTH, encode
from hf_forward_inf.passes.loss_pass import LossPass, ShiftPass
from hf_forward_inf.passes.sensitivity import DRAWS, sensitivity
from hf_forward_inf.utils.models import evaluating

PASSES = {"rise": LossPass, "shift": ShiftPass}
"""What is measured of the candidates."""


class Scorer:
    """The algorithm and its settings, without what [`ForwardInf`] puts around it: its arguments are those."""

    name = "forward_inf"

    def __init__(
        self,
        model: nn.Module | None = None,
        processor: Any = None,
        *,
        adapter: Adapter | None = None,
        ascent: AscentConfig | None = None,
        reduction: Literal["sum", "mean"] = "sum",
        measure: Literal["rise", "shift"] = "rise",
        units: Literal["loss", "sensitivity"] | None = None,
        references: Dataset | None = None,
        training: Dataset | None = None,
        cache_dir: str | Path | None = None,
        max_batch_length: int = MAX_BATCH_LENGTH,
    ):
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction={reduction!r} must be 'sum' or 'mean'.")
        self.adapter = choose_adapter(model, processor, adapter, "ForwardInf")
        self.ascent = ascent or AscentConfig()
        if measure not in PASSES:
            raise ValueError(f"measure={measure!r} must be 'rise' or 'shift'.")
        if units not in (None, "loss", "sensitivity"):
            raise ValueError(f"units={units!r} must be 'loss' or 'sensitivity'.")
        self.reduction = reduction
        self.units = units
        self.measure = measure
        self.references = references
        self.training = training
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.max_batch_length = max_batch_length

    @property
    def ascent(self) -> AscentConfig:
        """How the model is perturbed; what was left open when it was set is filled in by the adapter."""
        return self._ascent

    @ascent.setter
    def ascent(self, ascent: AscentConfig) -> None:
        self._ascent = ascent.completed(self.adapter.default_ascent())

    @property
    def units(self) -> str:
        """What scores are told in; what was left open is the adapter's choice where it can be had."""
        if self._units is None and self.adapter.default_units == "sensitivity":
            return "sensitivity" if self.references is None and has_length(self.adapter, self.ascent) else "loss"
        return self._units or "loss"

    @units.setter
    def units(self, units: str | None) -> None:
        self._units = units

    @property
    def config(self) -> dict[str, Any]:
        """What scores depend on beside the model and the data."""
        own = {"reduction": self.reduction, "measure": self.measure, "hubs": self.references is not None}
        return {**asdict(self.ascent), **own, "units": self.units}

    def with_options(self, **options: Any) -> Self:
        """Give the same attributor with other options (`ascent`, `reduction`, `references`, ...)."""
        other = copy.copy(self)
        for option, value in options.items():
            if not hasattr(self, option):
                raise AttributeError(f"ForwardInf has no option {option!r}.")
            setattr(other, option, value)
        return other

    def score(
        self, queries: Dataset, candidates: Dataset, scratch: Path | None = None, first_row: int = 0
    ) -> np.ndarray:
        """Algorithm 1: float32 scores, `[queries, candidates]`, without what [`trace`] puts around them.

        What is computed of the candidates is cached in `scratch`, by default where everything is; in messages they are
        numbered from `first_row`.
        """
        if self.measure == "shift" and self.ascent.mode == "symmetric":
            raise ValueError("measure='shift' has no sign, so mode='symmetric' would cancel it: take mode='ascent'.")
        d_tst = encode(self.adapter, queries, "queries", self.cache_dir)
        names = names_for(self.adapter, self.ascent)
        scores = np.empty((len(queries), len(candidates)), dtype=np.float32)
        with evaluating(self.adapter.model), np.errstate(invalid="ignore"):
            loss = self.candidate_pass(candidates, scratch, first_row)
            training = candidates if self.training is None else self.training
            direction = direction_for(self.ascent, self.adapter, training, names, self.cache_dir)
            base = loss.base()  # L(theta, D_i)
            block = loss.block_size(names)
            for start in range(0, len(queries), block):
                rows = slice(start, min(start + block, len(queries)))
                # K steps of gradient ascent on the loss of each D_tst: theta -> theta_K.
                theta_k = Perturbation(self.adapter, d_tst[rows], names, self.ascent, direction)
                title = f"queries {start + 1}-{rows.stop} of {len(queries)}"
                scores[rows] = loss(theta_k, title) - base  # L(theta_K, D_i) - L(theta, D_i)
                if self.ascent.mode == "symmetric":  # as far to the other side, so that what is even in it cancels
                    scores[rows] = (scores[rows] - (loss(Mirrored(theta_k), title) - base)) / 2
        if self.ascent.mode == "descent" and self.measure == "rise":
            scores = -scores  # unlearning raises a proponent's loss, learning lowers it
        if self.reduction == "mean":
            scores /= loss.terms
        scores[~np.isfinite(scores)] = np.nan
        return scores

    def candidate_pass(self, candidates: Dataset, scratch: Path | None = None, first_row: int = 0) -> LossPass:
        """Give what measures the candidates under one model after another; as in [`score`]."""
        return PASSES[self.measure](
            self.adapter, candidates, cache_dir=scratch or self.cache_dir,
            max_batch_length=self.max_batch_length, first_row=first_row,
        )  # fmt: skip

    def in_units(
        self, scores: np.ndarray, candidates: Dataset, scratch: Path | None = None, first_row: int = 0
    ) -> np.ndarray:
        """Tell what [`score`] gives in the attributor's units."""
        if self.units == "loss":
            return scores
        with warnings.catch_warnings():  # rows that can't be read were told of as they were scored
            warnings.simplefilter("ignore", UserWarning)
            shaken = self.shaken(candidates, DRAWS, scratch, first_row)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(shaken > 0, scores / shaken, np.nan).astype(np.float32)

    def shaken(self, rows: Dataset, draws: int, scratch: Path | None = None, first_row: int = 0) -> np.ndarray:
        """Give each row's sensitivity ([`passes.sensitivity.sensitivity`]); as in [`score`]."""
        names = names_for(self.adapter, self.ascent)
        with evaluating(self.adapter.model):
            return sensitivity(self.candidate_pass(rows, scratch, first_row), names, self.ascent, draws)
