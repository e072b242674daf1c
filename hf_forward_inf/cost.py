"""What a query costs: in plain forward passes over the same candidates, and in memory beside plain inference."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from datasets import Dataset, disable_caching, enable_caching, is_caching_enabled

from hf_forward_inf.ascent import Mirrored, Perturbation, evaluating, perturbed_names
from hf_forward_inf.candidate_pass import encode
from hf_forward_inf.directions import direction_for
from hf_forward_inf.loss_pass import LossPass
from hf_forward_inf.processes import progress_bars

if TYPE_CHECKING:
    from hf_forward_inf.forward_inf import ForwardInf

QUERIES = 16
"""Queries that the measurement traces at most; the longer the block, the less the shared encoder weighs."""
REPEATS = 3
"""Plain passes and passes for queries, in turn, of which the medians count."""


def measure(tracer: "ForwardInf", queries: Dataset, candidates: Dataset) -> dict[str, float]:
    """Measure the cost of a query, in this process and with nothing taken from the cache.

    Args:
        tracer (`ForwardInf`): Its model and settings.
        queries (`datasets.Dataset`): The first 16 are traced together, as `trace` would.
        candidates (`datasets.Dataset`): The candidates.

    Returns:
        `dict[str, float]`: `forward_passes_per_query`, time of a query's ascent and loss pass / time of one plain
        forward pass over the same candidates; `forward_passes_to_fit`, the same of what a corrected direction fits
        once for all queries; where the system tells peak memory (Linux, CUDA) `peak_memory_ratio`, peak of the loss
        pass / peak of the plain pass, each with all that the process holds.
    """
    adapter = tracer.adapter
    names = perturbed_names(adapter, tracer.ascent.modules)
    with uncached(), evaluating(adapter.model), progress_bars(False):
        loss = LossPass(adapter, candidates, cache_dir=tracer.cache_dir, max_batch_length=tracer.max_batch_length)
        few = min(QUERIES, len(queries), loss.queries_a_pass(names))
        rows = encode(adapter, queries.select(range(few)), "queries", tracer.cache_dir)[:]
        start = time.perf_counter()
        direction = direction_for(tracer.ascent, adapter, candidates, names, tracer.cache_dir)
        fit = time.perf_counter() - start
        plain, perturbed = [], []
        for _ in range(REPEATS):
            plain.append(_run(loss.base))
            # A new perturbation each time: it keeps the models that it computes.
            again = Perturbation(adapter, rows, names, tracer.ascent, direction)
            perturbed.append(_run(partial(_passes, loss, again, tracer.ascent.mode)))
    seconds = [statistics.median(run[0] for run in runs) for runs in (plain, perturbed)]
    figures = {"forward_passes_per_query": seconds[1] / few / seconds[0]}
    if direction is not None:
        figures["forward_passes_to_fit"] = fit / seconds[0]
    peaks = [statistics.median(run[1] for run in runs) for runs in (plain, perturbed)]
    if all(peaks):
        figures["peak_memory_ratio"] = peaks[1] / peaks[0]
    return figures


def seconds_of_a_plain_pass(tracer: "ForwardInf", candidates: Dataset) -> float:
    """Time one plain forward pass over the candidates: the median of three."""
    with uncached(), evaluating(tracer.adapter.model), progress_bars(False):
        loss = LossPass(
            tracer.adapter, candidates, cache_dir=tracer.cache_dir, max_batch_length=tracer.max_batch_length
        )
        return statistics.median(_run(loss.base)[0] for _ in range(REPEATS))


def _passes(loss: LossPass, perturbation: Perturbation, mode: str) -> None:
    loss(perturbation, "measuring")
    if mode == "symmetric":
        loss(Mirrored(perturbation), "measuring")


@contextmanager
def uncached() -> Iterator[None]:
    """Take nothing from datasets' cache and write nothing to it."""
    cached = is_caching_enabled()
    disable_caching()
    try:
        yield
    finally:
        if cached:
            enable_caching()


def _run(work: Callable[[], object]) -> tuple[float, float]:
    """Run something: seconds, and peak memory in bytes (0 where unknown)."""
    gc.collect()
    _reset_peak()
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    return seconds, _peak()


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM to what is held now (proc(5))


def _peak() -> float:
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    if not status.exists():
        return 0.0
    high = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return float(high.split()[1]) * 1024
