"""Run one method of a library once, and measure its cost relative to plain inference in the same process."""

import gc
import json
import multiprocessing
import os
import resource
import signal
import statistics
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peer_runs.task import Task, plain_batches, plain_pass

Method = Callable[..., Any]
"""Maps a task, and the method's options, to scores `[queries, candidates]`, higher for a stronger proponent.

Its folder is the current one. What it finds there was stored by an earlier run with other queries, and may be used;
what belongs to those queries must not be.
"""

REPEATS = 3
"""Number of plain passes, whose median is taken."""


def main(methods: Mapping[str, Method]) -> None:
    """Run `python -m peer_runs.LIBRARY JOB`.

    `JOB` is JSON: `task`, a folder; `limit`, in seconds of processor time; and `runs`, each with `method`, `queries`
    (first and last), `options`, `store`, the folder that the library stores its files in, and `result`, a folder for
    scores and figures, or the error. Each run is a process of its own, a copy of this one, which has only imported the
    library.
    """
    torch.set_num_threads(1)
    job = json.loads(sys.argv[1])
    for run in job["runs"]:
        result = Path(run["result"])
        result.mkdir(parents=True, exist_ok=True)
        process = multiprocessing.get_context("fork").Process(target=_run, args=(methods, job, run))
        process.start()
        process.join()
        if process.exitcode == -signal.SIGXCPU:
            (result / "error.txt").write_text(f"no result within {job['limit']} s")
        elif process.exitcode:
            (result / "error.txt").write_text(f"ended with status {process.exitcode}, below 0 by a signal")


def _run(methods: Mapping[str, Method], job: dict[str, Any], run: dict[str, Any]) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (job["limit"], resource.RLIM_INFINITY))
    task, result, store = Task(Path(job["task"]), slice(*run["queries"])), Path(run["result"]), Path(run["store"])
    (store / "tmp").mkdir(parents=True, exist_ok=True)
    os.chdir(store)
    os.environ |= {"HF_FORWARD_INF_CACHE": str(store / "cache"), "TMPDIR": str(store / "tmp")}
    tempfile.tempdir = None
    try:
        scores, figures = measured(task, lambda: methods[run["method"]](task, **run["options"]))
    except Exception as error:
        traceback.print_exc()
        (result / "error.txt").write_text(f"{type(error).__name__}: {error}")
    else:
        np.save(result / "scores.npy", scores)
        (result / "figures.json").write_text(json.dumps(figures))


def measured(task: Task, work: Callable[[], Any]) -> tuple[np.ndarray, dict[str, float]]:
    """Return what a method gives for a task, and what it costs.

    Raises:
        ValueError: If the scores have another shape.
    """
    batches = plain_batches(task)
    plain_pass(task, batches)  # the first pass also warms up
    plain = [timed(lambda: plain_pass(task, batches)) for _ in range(REPEATS)]
    found: list[Any] = []
    seconds, peak = timed(lambda: found.append(work()))
    scores = np.asarray(found[0], dtype=np.float32)
    expected = (len(task.queries), len(task.candidates))
    if scores.shape != expected:
        raise ValueError(f"Scores are {scores.shape}, not {expected}.")
    files = [file for file in Path.cwd().rglob("*") if file.is_file() and not file.is_symlink()]
    pass_seconds = statistics.median(run[0] for run in plain)
    return scores, {
        "seconds": seconds,
        "plain_seconds": pass_seconds,
        "passes": seconds / pass_seconds,
        "memory": peak / max(run[1] for run in plain),
        "disk": sum(file.stat().st_size for file in files),
    }


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
