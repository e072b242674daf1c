"""Algorithm 1 of "The Mirrored Influence Hypothesis" (Ko et al., CVPR 2024): scores of candidates for queries."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset, is_caching_enabled
from torch import nn
from typing_extensions import Self

from hf_forward_inf.adapters import Adapter, choose_adapter
from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.ascent.steps import Mirrored, PerturbedModels
from hf_forward_inf.attribution import Attributor
from hf_forward_inf.baselines import ATTRIBUTORS
from hf_forward_inf.baselines.ensembles import described
from hf_forward_inf.curvature.perturber import Perturber
from hf_forward_inf.passes.candidate_pass import MAX_BATCH_LENGTH, encode
from hf_forward_inf.passes.loss_pass import LossPass, ShiftPass, WeighedPass
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.memory import Memory
from hf_forward_inf.utils.models import check_same_parameters, evaluating
from hf_forward_inf.utils.progress import counting

CHOICES = {
    "reduction": ("sum", "mean"),
    "measure": ("rise", "shift"),
    "units": (None, "loss", "base_loss"),
    "strategy": ("auto", "full", "screen"),
}
LEAST = {"max_batch_length": 1, "keep": 1, "audit": 0}
"""Least values of options that are whole numbers."""

Blocks = Callable[[], Iterator[tuple[slice, PerturbedModels]]]
"""Yields the rows of each block of queries and their perturbed models ([`Perturber.blocks`])."""


class Scorer:
    """Algorithm 1 and its options; [`ForwardInf`] documents them, and adds what users call."""

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
        falls: float | None = None,
        units: Literal["loss", "base_loss"] | None = None,
        training: Dataset | None = None,
        strategy: Literal["auto", "full", "screen"] = "auto",
        screen: str | Attributor | None = None,
        keep: int | None = None,
        audit: int = 30,
        storage: float = 4.0,
        cache_dir: str | Path | None = None,
        max_batch_length: int = MAX_BATCH_LENGTH,
        baseline_model: nn.Module | None = None,
    ):
        adapter = choose_adapter(model, processor, adapter, "ForwardInf")
        self._options = {
            "adapter": adapter, "ascent": ascent, "reduction": reduction, "measure": measure, "falls": falls,
            "units": units, "training": training, "strategy": strategy, "screen": screen, "keep": keep,
            "audit": audit, "storage": storage, "cache_dir": cache_dir, "max_batch_length": max_batch_length,
            "baseline_model": baseline_model,
        }  # fmt: skip
        _check(self._options)
        if baseline_model is not None:
            check_same_parameters(adapter.model, baseline_model)
        self.adapter = adapter
        self.ascent = (ascent or AscentConfig()).completed(adapter.default_ascent)
        if measure == "shift" and self.ascent.mode == "symmetric":
            raise ValueError("measure='shift' has no sign, so mode='symmetric' would cancel it: take mode='ascent'.")
        if self.ascent.mode in adapter.poor_modes:
            _warn_of_mode(self.ascent.mode, adapter.poor_modes[self.ascent.mode])
        self.reduction, self.measure = reduction, measure
        whole = measure == "rise" and falls in (None, 1)
        self.units = units or (adapter.default_units if whole else "loss")
        if not whole and self.units != "loss":
            other = f"falls={falls}" if measure == "rise" else f"measure={measure!r}"
            raise ValueError(f"units='base_loss' is for rises of the loss: leave it out with {other}.")
        self.falls = self._completed_falls(falls)
        self.training = training
        self.strategy, self.screen, self.keep, self.audit, self.storage = strategy, screen, keep, audit, storage
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.max_batch_length, self.baseline_model = max_batch_length, baseline_model
        self._perturbers = Memory[Perturber](1)

    def _completed_falls(self, falls: float | None) -> float:
        """Return the weight of terms whose losses fall; by default the adapter's, where it has a meaning."""
        if falls is None:
            fits = self.measure == "rise" and self.units == "loss" and self.ascent.mode == "ascent"
            return self.adapter.default_falls if fits else 1.0
        if falls != 1 and self.measure != "rise":
            raise ValueError(f"falls={falls} is for rises of the loss: leave it out with measure={self.measure!r}.")
        if falls != 1 and self.ascent.mode != "ascent":
            raise ValueError(
                f"falls={falls} is for losses that were to rise, and mode={self.ascent.mode!r} lowers them: take "
                "mode='ascent'."
            )
        return float(falls)

    @property
    def config(self) -> dict[str, Any]:
        """Everything that scores depend on besides the model and the data."""
        own = {"reduction": self.reduction, "measure": self.measure, "falls": self.falls}
        screen = self.screen if self.screen is None or isinstance(self.screen, str) else described(self.screen)
        screened = {"strategy": self.strategy, "screen": screen, "keep": self.keep, "audit": self.audit}
        return {**asdict(self.ascent), **own, "units": self.units, **screened, **self.adapter.config}

    def with_options(self, **options: Any) -> Self:
        """Return the same attributor with other options of its constructor (`ascent`, `reduction`, ...).

        Raises:
            TypeError: If there is no such option.
            ValueError: As the constructor.
        """
        unknown = options.keys() - self._options.keys()
        if unknown:
            known = ", ".join(self._options)
            raise TypeError(f"ForwardInf has no option {', '.join(map(repr, sorted(unknown)))}; it has {known}.")
        return type(self)(**{**self._options, **options})

    def score(
        self,
        queries: Dataset,
        candidates: Dataset,
        scratch: Path | None = None,
        first_row: int = 0,
        loss: LossPass | None = None,
        models: Blocks | None = None,
    ) -> np.ndarray:
        """Algorithm 1 on all candidates: float32 scores, `[queries, candidates]`, NaN where one is not finite.

        Args:
            queries (`datasets.Dataset`): D_tst, one a row.
            candidates (`datasets.Dataset`): The training examples D_i.
            scratch (`Path`, *optional*): Where what is computed of the candidates is cached. Defaults to `cache_dir`.
            first_row (`int`, defaults to 0): The number that messages give the first candidate.
            loss (`LossPass`, *optional*): The pass over the candidates. Defaults to a new one.
            models (`Callable`, *optional*): Returns the queries' perturbed models, a block at a time, where they were
                prepared ([`prepared.prepare`]).
        """
        scores = np.empty((len(queries), len(candidates)), dtype=np.float32)
        with evaluating(self.adapter.model), np.errstate(invalid="ignore"):
            loss = loss or self.candidate_pass(candidates, scratch, first_row)
            models = models or self.models_of(queries, candidates, loss)
            # K steps of gradient ascent on the loss of each D_tst: theta -> theta_K.
            for rows, theta_k in models():
                symmetric = self.ascent.mode == "symmetric"
                with counting(rows.stop - rows.start, parts=1 + symmetric):
                    scores[rows] = loss(theta_k) - loss.base()  # L(theta_K, D_i) - L(theta, D_i)
                    if symmetric:  # as far to the other side, which cancels even terms
                        scores[rows] = (scores[rows] - (loss(Mirrored(theta_k)) - loss.base())) / 2
        return self.finished(scores, loss.terms)

    def finished(self, rises: np.ndarray, terms: np.ndarray) -> np.ndarray:
        """Return rises of losses, `[..., candidates]`, as scores: with their sign, and by term if so reduced."""
        # Descent lowers a proponent's loss.
        scores = -rises if self.ascent.mode == "descent" and self.measure == "rise" else rises
        scores = scores / terms if self.reduction == "mean" else scores
        return np.where(np.isfinite(scores), scores, np.nan).astype(np.float32)

    def models_of(self, queries: Dataset, candidates: Dataset, loss: LossPass | None = None) -> Blocks:
        """Return what perturbs the model for each block of queries; arguments as in [`perturber`]."""
        d_tst = encode(self.adapter, queries, "queries", self.cache_dir)
        perturber = self.perturber(candidates, loss)
        return lambda: perturber.blocks(d_tst)

    def perturber(self, candidates: Dataset, loss: LossPass | None = None) -> Perturber:
        """Return what perturbs the model.

        Args:
            candidates (`datasets.Dataset`): The training data where no other was given.
            loss (`LossPass`, *optional*): The pass over them. The last perturber, which stays in memory, is used
                again where its fingerprint is the same.
        """
        training = candidates if self.training is None else self.training

        def made() -> Perturber:
            return Perturber(self.adapter, self.ascent, training, self.cache_dir)

        if loss is None or not loss.cached or not is_caching_enabled():
            return made()
        return self._perturbers.get(fingerprint(loss.fingerprint, training._fingerprint), made)

    def candidate_pass(self, candidates: Dataset, scratch: Path | None = None, first_row: int = 0) -> LossPass:
        """Return the pass that measures the candidates under one model after another; arguments as in [`score`].

        Raises:
            TypeError: If there is a baseline model, which only [`ForwardInf.trace`] subtracts.
        """
        if self.baseline_model is not None:
            raise TypeError(
                "baseline_model= is subtracted by trace(queries, candidates) alone: for streams, plans, tuning take "
                "tracer.with_options(baseline_model=None)."
            )
        made: Callable[..., LossPass] = ShiftPass if self.measure == "shift" else LossPass
        if self.falls != 1:
            made = partial(WeighedPass, falls=self.falls)
        return made(
            self.adapter, candidates, cache_dir=scratch or self.cache_dir,
            max_batch_length=self.max_batch_length, first_row=first_row,
        )  # fmt: skip

    def in_units(self, scores: np.ndarray, loss: LossPass, first_row: int = 0) -> np.ndarray:
        """Convert the scores that [`score`] returns to the attributor's units, given the pass over the candidates.

        Raises:
            ValueError: If the units are base losses, and one is negative.
        """
        return scores if self.units == "loss" else self.divided(scores, self.unit(loss.base(), loss.terms, first_row))

    def unit(self, base: np.ndarray, terms: np.ndarray, first_row: int = 0) -> np.ndarray:
        """Return what scores are divided by, `[candidates]`: 1, or the candidates' base losses.

        Raises:
            ValueError: If the units are base losses, and one is negative.
        """
        if self.units == "loss":
            return np.ones_like(base)
        if (base < 0).any():
            row = first_row + int(np.argmax(base < 0))
            raise ValueError(f"units='base_loss' divides by losses, and that of candidate {row} is negative.")
        return base / terms if self.reduction == "mean" else base

    @staticmethod
    def divided(scores: np.ndarray, unit: np.ndarray) -> np.ndarray:
        """Return scores, `[..., candidates]`, divided by units, `[candidates]`; NaN where a unit is 0."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(unit > 0, scores / unit, np.nan).astype(np.float32)


def _check(options: Mapping[str, Any]) -> None:
    """Refuse options that mean nothing, each by itself, or a screen where none is used."""
    for option, known in CHOICES.items():
        if options[option] not in known:
            raise ValueError(f"{option}={options[option]!r} must be one of {known}.")
    for option, least in LEAST.items():
        count = options[option]
        unset = count is None and option == "keep"
        if not unset and (isinstance(count, bool) or not isinstance(count, int) or count < least):
            raise ValueError(f"{option}={count!r} must be a whole number of at least {least}.")
    falls = options["falls"]
    if falls is not None and not (isinstance(falls, int | float) and 0 <= falls <= 1):
        raise ValueError(f"falls={falls!r} must be between 0 and 1.")
    if not (isinstance(options["storage"], int | float) and options["storage"] >= 0):
        raise ValueError(f"storage={options['storage']!r} must be at least 0 GB.")
    screen = options["screen"]
    if isinstance(screen, str):
        for name in screen.split("+"):
            if name not in ATTRIBUTORS:
                raise ValueError(f"screen={name!r} is no attributor. Known are {', '.join(ATTRIBUTORS)}.")
    elif screen is not None and not hasattr(screen, "trace"):
        raise TypeError(f"screen={screen!r} must be the name of an attributor, or an attributor.")
    if screen is not None and options["strategy"] == "full":
        raise ValueError("strategy='full' scores all candidates: leave out screen, or strategy.")


@cache
def _warn_of_mode(mode: str, loss: str) -> None:
    """Warn once, not for each attributor that is derived from another."""
    warnings.warn(
        f"mode={mode!r} {loss} on a language model, against mode='ascent': its gain is in the step up alone.",
        stacklevel=4,
    )
