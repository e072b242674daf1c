"""Algorithm 1 with a screen: a cheap attributor ranks all candidates, the finite step is run on the best of them."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from accelerate.utils import gather_object
from datasets import Dataset

from hf_forward_inf.adapters.base import Adapter, Rows
from hf_forward_inf.algorithm import Scorer
from hf_forward_inf.ascent.parameters import names_for
from hf_forward_inf.ascent.steps import Mirrored, PerturbedModels
from hf_forward_inf.attribution import Attributor
from hf_forward_inf.baselines import Fusion, RepresentationSimilarity
from hf_forward_inf.passes.base_pass import BasePass
from hf_forward_inf.passes.encoding import encode
from hf_forward_inf.passes.kept_pass import KeptPass
from hf_forward_inf.passes.loss_pass import LossPass
from hf_forward_inf.passes.shared_states import SharedStates
from hf_forward_inf.tracing.audit import Scored
from hf_forward_inf.tracing.time_budget import slices
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.models import evaluating
from hf_forward_inf.utils.processes import process_state
from hf_forward_inf.utils.progress import counting, progress
from hf_forward_inf.utils.sizes import GB

AUDITED_ABOVE = 0.1
"""The share of a query's audited candidates that lie above its floor."""
ABOVE_FLOOR = 25
"""A query's best candidates that have scores of their own whatever the audit finds."""
Model: TypeAlias = tuple[PerturbedModels, int]
"""Perturbed models, and which of them is meant."""


class ScreenedStep:
    """What queries share: the base pass, the direction that was fitted, and what is stored of the candidates.

    Args:
        tracer (`ForwardInf`): Perturbs the model.
        queries (`datasets.Dataset`): D_tst, one a row.
        candidates (`datasets.Dataset`): The training examples D_i.
        loss (`LossPass`): The pass over them.
    """

    def __init__(self, tracer: Scorer, queries: Dataset, candidates: Dataset, loss: LossPass):
        self.tracer, self.queries, self.candidates, self.loss = tracer, queries, candidates, loss
        self.d_tst = encode(tracer.adapter, queries, "queries", tracer.cache_dir)
        with evaluating(tracer.adapter.model):
            states = states_of(tracer, loss)
            self.base_pass, self.kept = BasePass(loss, states), KeptPass(loss, states)
            joint = tracer.measure == "rise" and tracer.falls == 1 and self.base_pass.joint
            self.base = self.base_pass.losses if joint else loss.base()  # L(theta, D_i)
            self.unit = tracer.unit(self.base, self.loss.terms)
            self.perturber = tracer.perturber(candidates, loss)

    def ranking(self, screen: Attributor, keep: int) -> np.ndarray:
        """Return the best candidates of each query by a screen, best first, int64 `[queries, keep]`."""
        parts = screen.attributors if isinstance(screen, Fusion) else [screen]
        own = [one for one in parts if isinstance(one, RepresentationSimilarity)]
        own = [one for one in own if one.adapter is self.tracer.adapter]
        try:
            for one in own:
                one.base = self.base_pass
            with progress(f"ranking by {screen.name}", None, "rows"):
                indices = screen.trace(self.queries, self.candidates, top_k=keep).indices
        finally:
            for one in own:  # it may be the user's, and rank other candidates next
                one.base = None
        assert indices is not None
        return indices

    def run(self, best: np.ndarray, queries: range, audit: int = 0, seconds: float | None = None) -> dict[int, Scored]:
        """Run the finite step on the best candidates of some queries, and on some random others.

        Processes share the queries. A query's losses are cached as soon as they are computed.

        Args:
            best (`np.ndarray`): Row numbers of all queries, `[queries, keep]`.
            queries (`range`): Some of them.
            audit (`int`, defaults to 0): Random others of each query.
            seconds (`float`, *optional*): Time for all queries, an equal share for each: its candidates are scored
                best first until the time is over, the first 64 in any case.

        Returns:
            `dict[int, Scored]`: By query.
        """
        state = process_state()
        units = list(self._units(queries))[state.process_index :: state.num_processes]
        found: dict[int, Scored] = {}
        ends = None if seconds is None else time.perf_counter() + seconds
        left = sum(len(unit) for unit in units)
        with evaluating(self.tracer.adapter.model):
            for unit in units:
                choices = [self._choice(i, best[i], audit) for i in unit]
                share = None if ends is None else len(unit) * (ends - time.perf_counter()) / left
                with counting(len(unit)):
                    found |= zip(unit, self._scored(unit, choices, share), strict=True)
                left -= len(unit)
        gathered = gather_object([*found.items()]) if state.num_processes > 1 else [*found.items()]
        return dict(gathered)

    def _units(self, queries: range) -> Iterator[list[int]]:
        """Yield the queries that are perturbed together: as many as memory holds, or as share a Krylov space."""
        size = self.perturber.block_size
        state = process_state()
        if not self.perturber.shares:  # every process gets some
            size = max(1, min(size, len(queries) // state.num_processes))
        for start in range(queries.start, queries.stop, size):
            yield list(range(start, min(start + size, queries.stop)))

    def _choice(self, query: int, kept: np.ndarray, audit: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Return the kept candidates, some random others, and the number of all others."""
        is_other = np.ones(len(self.base), dtype=bool)
        is_other[kept] = False
        others = np.flatnonzero(is_other)
        # By the query's content: it is audited by the same candidates whatever it is traced with.
        seed = int(fingerprint(self.d_tst[query : query + 1], self.tracer.ascent.seed), 16)
        drawn = np.random.default_rng(seed).choice(others, min(audit, len(others)), replace=False)
        return kept, np.sort(drawn), len(others)

    def _scored(
        self, unit: Sequence[int], choices: Sequence[tuple[np.ndarray, np.ndarray, int]], seconds: float | None
    ) -> Iterator[Scored]:
        """Score the chosen candidates of queries that are perturbed together."""
        queries = self.d_tst[unit[0] : unit[-1] + 1]
        keys, chosen = self.perturber.keys(queries), [np.concatenate([kept, drawn]) for kept, drawn, _ in choices]
        models = self._models(queries, keys, chosen)
        ends = None if seconds is None else time.perf_counter() + seconds
        for i, (key, rows, (kept, drawn, others)) in enumerate(zip(keys, chosen, choices, strict=True)):
            share = None if ends is None else max((ends - time.perf_counter()) / (len(keys) - i), 1e-9)
            scores = np.full(len(rows), np.nan, dtype=np.float32)
            for part in [np.arange(len(rows))] if share is None else slices(np.arange(len(rows)), share, alone=True):
                scores[part] = self._rises(models, key, rows[part])
            reached = len(kept) if share is None else int(part[-1]) + 1
            yield Scored(kept[:reached], scores[:reached], drawn, scores[len(kept) :], others)

    def _models(self, queries: Rows, keys: Sequence[str], chosen: Sequence[np.ndarray]) -> dict[str, Model]:
        """Return the models of queries by their keys, computed when first needed: of those alone that lack losses."""
        symmetric = self.tracer.ascent.mode == "symmetric"
        both = [(key, mirrored(key)) if symmetric else (key,) for key in keys]
        lacking = [
            i
            for i, rows in enumerate(chosen)
            if self.perturber.shares or not all(self.kept.known(key)[1][rows].all() for key in both[i])
        ]
        # K steps of gradient ascent on the loss of each D_tst: theta -> theta_K.
        theta_k = self.perturber.perturbation({name: [values[i] for i in lacking] for name, values in queries.items()})
        other = Mirrored(theta_k)
        models: dict[str, Model] = {keys[i]: (theta_k, j) for j, i in enumerate(lacking)}
        return models | ({mirrored(keys[i]): (other, j) for j, i in enumerate(lacking)} if symmetric else {})

    def _rises(self, models: Mapping[str, Model], key: str, rows: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            rises = self._losses(models, key, rows) - self.base[rows]  # L(theta_K, D_i) - L(theta, D_i)
            if self.tracer.ascent.mode == "symmetric":
                rises = (rises - (self._losses(models, mirrored(key), rows) - self.base[rows])) / 2
        return self.tracer.divided(self.tracer.finished(rises, self.loss.terms[rows]), self.unit[rows])

    def _losses(self, models: Mapping[str, Model], key: str, rows: np.ndarray) -> np.ndarray:
        losses, stored = self.kept.known(key)
        missing = rows[~stored[rows]]
        if len(missing):
            perturbed, i = models[key]
            losses[missing] = self.kept.run(perturbed.thetas[i], key, missing)
        return losses[rows]


def states_of(tracer: Scorer, loss: LossPass) -> SharedStates:
    """Return what makes batches of the candidates, from stored states as far as there are any."""
    return SharedStates(loss, set(names_for(tracer.adapter, tracer.ascent)), tracer.storage * GB)


def mirrored(key: str) -> str:
    """Return the key of the model after the same steps to the other side."""
    return fingerprint(key, "mirrored")


def assembled(found: dict[int, Scored], lost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return scores, float32 `[queries, candidates]`, and which are a candidate's own, bool; all others are the floor.

    Of the candidates that a screen keeps and those that were drawn, all above the floor ([`floor_under`]) have scores
    of their own.

    Args:
        found (`dict[int, Scored]`): By query.
        lost (`np.ndarray`): bool `[candidates]`, those without a finite base loss.
    """
    scores = np.full((len(found), len(lost)), np.nan, dtype=np.float32)
    stage = np.zeros(scores.shape, dtype=bool)
    for i, one in found.items():
        known = one.scores[~np.isnan(one.scores)]
        if not len(known):
            stage[i] = True  # the query can't move the model: no score is a floor
            continue
        floor = floor_under(known, one.audited)
        scores[i] = floor
        for rows, values, is_own in (
            (one.rows, one.scores, ~(one.scores < floor)),
            (one.drawn, one.audited, ~(one.audited <= floor)),
        ):
            scores[i, rows[is_own]], stage[i, rows[is_own]] = values[is_own], True
    scores[:, lost] = np.nan
    return scores, stage


def floor_under(kept: np.ndarray, audited: np.ndarray) -> float:
    """Return the score of all candidates that a screen does not keep: what one in ten random others reaches.

    Not below the lowest of the kept, and not above the 25th best of them. Scores below are noise, which makes an
    attribution worse: on 5,000 sentences the LDS of a screened trace is .78 with this floor and .69 with
    the lowest of the kept, on two smaller sets .65 and .74 instead of .62 and .73.

    Args:
        kept (`np.ndarray`): Scores of the candidates that were kept, without NaN.
        audited (`np.ndarray`): Scores of random others, if there are any.
    """
    known = np.sort(kept)[::-1]
    audited = audited[~np.isnan(audited)]
    reached = np.quantile(audited, 1 - AUDITED_ABOVE) if len(audited) else -np.inf
    return float(np.clip(reached, known[-1], known[min(ABOVE_FLOOR, len(known)) - 1]))


def background_scores(one: Scored) -> np.ndarray:
    """Return what all scores of a query look like: the kept, and the drawn repeated for all that were not kept."""
    return np.concatenate([one.scores, np.resize(one.audited, one.others if len(one.audited) else 0)])


def floored(scores: np.ndarray, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """Set all scores beyond each query's best `keep` to the lowest of these; return which were not, too."""
    if keep >= scores.shape[1]:
        return scores, np.ones(scores.shape, dtype=bool)
    ordered = np.sort(np.where(np.isnan(scores), -np.inf, scores), axis=1)
    floor = ordered[:, [-keep]]
    floored = np.where(scores < floor, np.where(np.isinf(floor), np.nan, floor), scores).astype(np.float32)
    return floored, ~(scores < floor)


def has_representation(adapter: Adapter) -> bool:
    """Return whether an adapter says which hidden states represent an example."""
    return RepresentationSimilarity.misfit(adapter) is None
