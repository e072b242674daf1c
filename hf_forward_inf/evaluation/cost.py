"""Cost of a query, in plain forward passes over the same candidates and in memory relative to plain inference.

Seconds are the processor's, which other processes on the machine do not change; on a GPU, the clock's.
"""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from datasets import Dataset

from hf_forward_inf.algorithm import Scorer
from hf_forward_inf.ascent.steps import Mirrored, Perturbation
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.passes.candidate_pass import encode
from hf_forward_inf.passes.loss_pass import LossPass
from hf_forward_inf.utils.fingerprints import uncached
from hf_forward_inf.utils.models import evaluating
from hf_forward_inf.utils.processes import progress_bars

QUERIES = 16
"""Maximum number of queries that are traced for a measurement; what they share weighs less the more there are."""
REPEATS = 3
"""Number of plain passes and of passes for queries, alternating, whose median is taken."""


def measure(tracer: Scorer, queries: Dataset, candidates: Dataset) -> dict[str, float]:
    """Measure the cost of a query, in this process and without the cache.

    Args:
        tracer (`ForwardInf`): The attributor.
        queries (`datasets.Dataset`): The first 16 are traced together, as `trace` would.
        candidates (`datasets.Dataset`): The candidates.

    Returns:
        `dict[str, float]`: `forward_passes_per_query`, the time of a query's ascent and loss pass divided by that of
        one plain forward pass over the same candidates; `forward_passes_to_fit`, the same for what a corrected
        direction fits once for all queries; `peak_memory_ratio`, the peak memory of the process during the loss pass
        divided by that during the plain pass, only where it can be measured (Linux, CUDA).
    """
    adapter = tracer.adapter
    with uncached(), evaluating(adapter.model), progress_bars(False):
        loss = LossPass(adapter, candidates, cache_dir=tracer.cache_dir, max_batch_length=tracer.max_batch_length)
        start = clock()
        perturber = tracer.perturber(candidates)
        fit = clock() - start
        few = min(QUERIES, len(queries), perturber.block_size)
        rows = encode(adapter, queries.select(range(few)), "queries", tracer.cache_dir)[:]
        loss.base()  # computed once for all queries: no part of what one of them costs
        plain, perturbed = [], []
        for _ in range(REPEATS):
            plain.append(timed(loss.plain))
            # A new perturbation each time, since it caches the models that it computes.
            again = perturber.perturbation(rows)
            perturbed.append(timed(partial(_passes, loss, again, tracer.ascent.mode)))
    seconds = [statistics.median(run[0] for run in runs) for runs in (plain, perturbed)]
    figures = {"forward_passes_per_query": seconds[1] / few / seconds[0]}
    if perturber.direction is not None:
        figures["forward_passes_to_fit"] = fit / seconds[0]
    peaks = [statistics.median(run[1] for run in runs) for runs in (plain, perturbed)]
    if all(peaks):
        figures["peak_memory_ratio"] = peaks[1] / peaks[0]
    return figures


def measure_screened(tracer: ForwardInf, queries: Dataset, candidates: Dataset) -> dict[str, float]:
    """Measure the cost of a further query of a screened trace, once its base pass, fit and screen are cached.

    Args:
        tracer (`ForwardInf`): The attributor, with a screen.
        queries (`datasets.Dataset`): The first is traced before, up to 16 others are measured.
        candidates (`datasets.Dataset`): The candidates.

    Returns:
        `dict[str, float]`: `screened_forward_passes_per_query`, the time of a query divided by that of one plain
        forward pass over the candidates; nothing if there is one query, or no screen is used.
    """
    if len(queries) < 2 or tracer.plan(queries, candidates).strategy != "screen":
        return {}
    further = queries.select(range(1, min(QUERIES + 1, len(queries))))
    with progress_bars(False), TemporaryDirectory() as folder:
        fresh = tracer.with_options(cache_dir=folder)
        fresh.trace(queries.select([0]), candidates)
        seconds, _ = timed(lambda: fresh.trace(further, candidates))
    return {"screened_forward_passes_per_query": seconds / len(further) / plain_pass(tracer, candidates)[0]}


def plain_pass(tracer: Scorer, candidates: Dataset) -> tuple[float, float]:
    """Return seconds (the median of three) and peak memory in bytes of a plain forward pass over the candidates."""
    with uncached(), evaluating(tracer.adapter.model), progress_bars(False):
        loss = LossPass(
            tracer.adapter, candidates, cache_dir=tracer.cache_dir, max_batch_length=tracer.max_batch_length
        )
        runs = [timed(loss.plain) for _ in range(REPEATS)]
    return statistics.median(run[0] for run in runs), max(run[1] for run in runs)


def _passes(loss: LossPass, perturbation: Perturbation, mode: str) -> None:
    loss(perturbation, "measuring")
    if mode == "symmetric":
        loss(Mirrored(perturbation), "measuring")


@dataclass(frozen=True)
class Pace:
    """Progress of an attributor through the candidates.

    Args:
        setup (`float`): Seconds until it begins with the first candidate.
        seconds (`float`): Seconds until all candidates are scored.
    """

    setup: float
    seconds: float

    def inspected(self, seconds: float) -> float:
        """Return the share of the candidates that are scored after some seconds."""
        if seconds >= self.seconds:
            return 1.0
        if seconds <= self.setup:  # setup may take all of the time: no division by 0
            return 0.0
        return (seconds - self.setup) / (self.seconds - self.setup)


def pace(
    trace: Callable[[Dataset, Dataset], Attribution],
    queries: Dataset,
    candidates: Dataset,
) -> tuple[Attribution, Pace, float]:
    """Trace without the cache, and time it.

    Args:
        trace (`Callable[[Dataset, Dataset], Attribution]`): An attributor's `trace`.
        queries (`datasets.Dataset`): The queries.
        candidates (`datasets.Dataset`): The candidates.

    Returns:
        `tuple`: The attribution over all candidates, the pace, and the peak memory in bytes (0 if unknown). The pace
        begins with the first candidate where the line through the times for an eighth of the candidates and for all
        of them begins.
    """
    found: list[Attribution] = []
    with uncached():
        all_, peak = timed(lambda: found.append(trace(queries, candidates)))
        eighth = candidates.select(range(0, len(candidates), 8))
        few, _ = timed(lambda: trace(queries, eighth))
        part = len(eighth) / len(candidates)
        setup = (few - part * all_) / (1 - part) if part < 1 else 0.0
    return found[0], Pace(min(max(0.0, setup), all_), all_), peak


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Run a function, and return its seconds and peak memory in bytes (0 if unknown)."""
    gc.collect()
    _reset_peak()
    start = clock()
    work()
    return clock() - start, _peak()


def clock() -> float:
    """Return seconds of this process's processor time; with a GPU, of the clock, once the GPU has finished."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the current memory (proc(5))


def _peak() -> float:
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if not status.exists():
        return 0.0
    high = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return float(high.split()[1]) * 1024
