"""What is measured of a method: its scores, with default and with chosen settings, and its cost, cold and warm."""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from peer_environments import environment
from peer_methods import Method

from hf_forward_inf.scores.retraining import lds_by_query

NONE: Mapping[str, Any] = {}
HERE = Path(__file__).resolve().parent
COUNTS = (1, 10, 100)
"""Numbers of queries whose cost is measured."""
FEW = 5
"""Queries by which the settings of a costly method are chosen."""

ENDS = ("figures.json", "error.txt")
"""A run's folder with one of these files is complete."""


@dataclass(frozen=True)
class Run:
    """One call of a method.

    Args:
        method (`str`): Its name in the library's module.
        name (`str`): The folder of its result.
        queries (`tuple`): First and last query, as of a slice.
        options (`dict`): The method's options.
        store (`str`): The folder in which its library stores files, which runs may share.
    """

    method: str
    name: str
    queries: tuple[int, int | None]
    options: Mapping[str, Any]
    store: str


@dataclass(frozen=True)
class Measured:
    """A task, its measurements on disk, and how they are made.

    Args:
        task (`Path`): The task's folder.
        folder (`Path`): Where measurements are stored, a folder for each method.
        environments (`Path`): The peers' environments.
        limit (`int`): Maximum seconds of processor time for one run.
        tries (`int`, *optional*): Maximum settings of a method that are tried.
    """

    task: Path
    folder: Path
    environments: Path
    limit: int
    tries: int | None = None
    facts: Mapping[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "facts", json.loads((self.task / "task.json").read_text()))

    @property
    def judged(self) -> int | None:
        """The number of queries that are judged, the first ones; `None` for all."""
        return self.facts.get("judged")

    @property
    def truths(self) -> list[str]:
        """The names of what the scores are judged by."""
        return self.facts.get("truths", [])

    def task_rows(self, name: str) -> list[dict[str, Any]]:
        """Return the task's `"queries"` or `"candidates"`."""
        return json.loads((self.task / f"{name}.json").read_text())

    def truth(self, name: str, choosing: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return subsets, and the losses of the judged or of the choosing queries."""
        kept = np.load(self.task / f"truth_{name}.npz")
        own = slice(self.judged, None) if choosing else slice(None, self.judged)
        return kept["subsets"], kept["losses"][:, own]

    def measure(self, library: str, methods: Sequence[Method], costs: bool) -> None:
        """Measure what is missing of a library's methods, in one process; errors are stored in place of results.

        Methods that read models of the training are left out where the task has none.
        """
        methods = [method for method in methods if "checkpoints" in self.facts or not method.training]
        first, then = [], []
        for method in methods:
            trials = self._trials(method)
            # Many steps for each query: only with the settings that are chosen.
            first += [] if trials and method.costly else [self._run(method, "default", (0, self.judged))]
            first += trials
            if costs and method.priced and not method.costly:
                first += self._costs(method)
        self._make(library, first)
        for method in methods:
            found = {self.choice(method, truth) for truth in self.truths if method.costly}
            for i in sorted(i for i in found if i is not None):
                then.append(self._run(method, f"chosen-{i}", (0, self.judged), self.settings(method)[i]))
            if costs and method.priced and method.costly:
                then += self._costs(method)
        self._make(library, then)

    def settings(self, method: Method) -> list[dict[str, Any]]:
        """Return the settings that are tried."""
        return method.choices()[: self.tries] if method.grid and self.truths else []

    def _trials(self, method: Method) -> list[Run]:
        """Return a run with each of a method's settings; they share what can be shared.

        A costly method's are for some of the choosing queries, others for the judged ones too: another query costs
        them less than to compute what depends on the candidates once more.
        """
        if self.judged is None:
            return []
        others = self.truth(self.truths[0], choosing=True)[1].shape[1]
        own = (self.judged, self.judged + min(FEW, others)) if method.costly else (0, self.judged + others)
        settings = enumerate(self.settings(method))
        return [self._run(method, f"tried-{i}", own, options, "tried") for i, options in settings]

    def _costs(self, method: Method) -> list[Run]:
        """Return runs of 1, 10 and 100 queries in empty folders, and of as many others in the folder of the first.

        Numbers for which there are too few queries are left out.
        """
        last = len(self.task_rows("queries"))
        counts = [count for count, total in zip(COUNTS, accumulate(COUNTS), strict=True) if total < last]
        counts = counts[:1] if method.costly else counts
        best: Mapping[str, Any] = NONE
        if method.costly and self.truths and (i := self.choice(method, self.truths[0])) is not None:
            best = self.settings(method)[i]
        found = [self._run(method, f"cold-{count}", (0, count), best) for count in counts]
        for count in counts:
            found.append(self._run(method, f"warm-{count}", (last - count, last), best, f"cold-{counts[0]}"))
            last -= count
        return found

    def choice(self, method: Method, truth: str) -> int | None:
        """Return the number of the settings with which the choosing queries have the best mean LDS, if any has one."""
        values = self.tried(method, truth)
        return max(values, key=lambda i: values[i]) if values else None

    def chosen(self, method: Method, truth: str) -> np.ndarray | None:
        """Return the scores of the judged queries with the settings that the others chose, if there are any."""
        i = self.choice(method, truth)
        if i is None:
            return None
        if method.costly:
            return self.scores(method, f"chosen-{i}")
        tried = self.scores(method, f"tried-{i}")
        return None if tried is None else tried[: self.judged]

    def tried(self, method: Method, truth: str) -> dict[int, float]:
        """Return the mean LDS of the choosing queries, by the number of the settings."""
        subsets, losses = self.truth(truth, choosing=True)
        found = {i: self.scores(method, f"tried-{i}") for i in range(len(self.settings(method)))}
        own = {
            i: scores if method.costly else scores[self.judged :] for i, scores in found.items() if scores is not None
        }
        return {
            i: float(lds_by_query(scores, subsets, losses[:, : len(scores)]).mean())
            for i, scores in own.items()
            if np.isfinite(scores).all()
        }

    def scores(self, method: Method, run: str) -> np.ndarray | None:
        """Return the scores of a run, `[queries, candidates]`, if it had a result."""
        kept = self.folder / method.key / run / "scores.npy"
        return np.load(kept) if kept.exists() else None

    def figures(self, method: Method, run: str) -> dict[str, float] | None:
        """Return the costs of a run, if it had a result."""
        kept = self.folder / method.key / run / "figures.json"
        return json.loads(kept.read_text()) if kept.exists() else None

    def error(self, method: Method, run: str) -> str | None:
        """Return why a run had no result."""
        kept = self.folder / method.key / run / "error.txt"
        return kept.read_text() if kept.exists() else None

    def _run(
        self, method: Method, name: str, queries: tuple[int, int | None], options: Mapping[str, Any] = NONE,
        store: str | None = None,
    ) -> Run:  # fmt: skip
        options = {**method.options, **options}
        return Run(method.name, f"{method.key}/{name}", queries, options, f"{method.key}/{store or name}")

    def _make(self, library: str, runs: Sequence[Run]) -> None:
        """Make the runs that are missing, in one process of the library's environment."""
        own = self.folder.resolve()
        missing = [run for run in runs if not any((own / run.name / end).exists() for end in ENDS)]
        if not missing:
            return
        # What is stored between runs lasts as long as the process: the run that stores it is made again.
        needed = {run.name for run in missing} | {run.store for run in missing}
        why: str | None
        with tempfile.TemporaryDirectory() as stores:
            jobs = [
                asdict(run) | {"store": str(Path(stores, run.store)), "result": str(own / run.name)}
                for run in runs
                if run.name in needed
            ]
            job = {"task": str(self.task.resolve()), "limit": self.limit, "runs": jobs}
            try:
                python = Path(sys.executable) if library == "ours" else environment(library, self.environments)
                why = finished(python, library, job)
            except (OSError, subprocess.CalledProcessError) as error:
                why = str(error)
        for run in missing:
            if not any((own / run.name / end).exists() for end in ENDS):
                (own / run.name).mkdir(parents=True, exist_ok=True)
                (own / run.name / "error.txt").write_text(why or "no result")


def finished(python: Path, library: str, job: dict[str, Any]) -> str | None:
    """Make runs with a library, and return why it failed, if it did."""
    command = [str(python), "-m", f"peer_runs.{library}", json.dumps(job)]
    # This library may be on the path without being installed; others must not find what is not theirs.
    path = [str(HERE), *([os.environ.get("PYTHONPATH", "")] if library == "ours" else [])]
    with tempfile.TemporaryDirectory() as scratch:
        private = {
            "PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": "1", "HF_HOME": scratch,
        }  # fmt: skip
        ended = subprocess.run(command, cwd=scratch, env={**os.environ, **private}, text=True, capture_output=True)
    if not ended.returncode:
        return None
    # The first line of a message names the error.
    lines = ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"]
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return (named or lines)[-1]
