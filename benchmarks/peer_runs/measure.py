"""Run one method of a library once, and measure its cost relative to plain inference in the same process."""

import gc
import json
import resource
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from peer_runs.task import Task, plain_batches, plain_pass

Method = Callable[[Task], np.ndarray]
"""Maps a task to scores `[queries, candidates]`, higher for a stronger proponent."""

REPEATS = 3
"""Number of plain passes, whose median is taken."""


def main(methods: Mapping[str, Method]) -> None:
    """Run `python -m peer_runs.LIBRARY TASK METHOD RESULT` in an empty folder, which the library may write to.

    The model is loaded before the measurement; everything that the library does with it is measured.
    """
    torch.set_num_threads(1)
    task, name, result = Task(Path(sys.argv[1])), sys.argv[2], Path(sys.argv[3])
    batches = plain_batches(task)
    plain_pass(task, batches)  # the first pass also warms up
    plain = [timed(lambda: plain_pass(task, batches)) for _ in range(REPEATS)]
    found: list[np.ndarray] = []
    seconds, peak = timed(lambda: found.append(methods[name](task)))
    disk = sum(file.stat().st_size for file in Path.cwd().rglob("*") if file.is_file())
    scores = np.asarray(found[0], dtype=np.float32)
    expected = (len(task.queries), len(task.candidates))
    if scores.shape != expected:
        raise ValueError(f"Scores are {scores.shape}, not {expected}.")
    pass_seconds = statistics.median(run[0] for run in plain)
    figures = {
        "seconds": seconds,
        "plain_seconds": pass_seconds,
        "passes": seconds / pass_seconds,
        "memory": peak / max(run[1] for run in plain),
        "disk": disk,
    }
    np.save(result / "scores.npy", scores)
    (result / "figures.json").write_text(json.dumps(figures))


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Run a function, and return seconds of processor time and peak resident memory in bytes, with child processes.

    Wall time would include other processes; every library computes on one core.
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the current memory (proc(5))
    start = _processor_time()
    work()
    seconds = _processor_time() - start
    status = Path("/proc/self/status").read_text().splitlines()
    own = float(next(line for line in status if line.startswith("VmHWM")).split()[1])
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return seconds, max(own, children) * 1024


def _processor_time() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
