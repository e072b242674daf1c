"""What all runs have in common: the output folder, and the record of what made the figures."""

import importlib.metadata
import json
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_forward_inf.attribution import Attribution
from hf_forward_inf.commands.answers import answers, show
from hf_forward_inf.evaluation.figures import save_figures
from hf_forward_inf.evaluation.tables import Table
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.report.plots import interval_plot
from hf_forward_inf.utils.options import RunOptions
from hf_forward_inf.utils.processes import process_state, say
from hf_forward_inf.utils.storage import finish, write_all

OUTPUTS = ("attribution", "report.html", "metrics.json")
"""What a run writes, in this order: a folder with metrics.json holds a finished run."""
COMPARED = "compared"
"""Folder with other attributors' results, where there are any."""
COLUMNS = ("mrr", "mrr_se", "precision@1", "precision@10", "recall@10")
"""Figures in the report's table, unless a run names others."""


class Run:
    """A run from its options to its output folder: what all runs do at their beginning and end.

    Args:
        options (`RunOptions`): The output folder, and all that is recorded in `metrics.json`.

    Raises:
        FileExistsError: If the folder holds a finished run and `overwrite` is not set.
        OSError: If the folder can't be written to. Both before anything is computed.
    """

    def __init__(self, options: RunOptions):
        self.options = options
        self.folder = check_output(options.output, options.overwrite)
        self.started = time.perf_counter()

    def write(
        self,
        found: Attribution,
        metrics: Mapping[str, Any],
        tracer: ForwardInf | None = None,
        *,
        table: Table | None = None,
        columns: Sequence[str] = COLUMNS,
        intervals: str | None = None,
        more: Mapping[str, Callable[[Path], object]] | None = None,
        **report: Any,
    ) -> dict[str, Any]:
        """Write `attribution/`, `report.html` and `metrics.json` into the output folder, and a table's `figures.json`.

        Args:
            found (`Attribution`): The best `top_k` candidates of each query are kept.
            metrics (`dict`): Its figures. Added are seconds, versions, device, seed, all options and, unless they are
                given, the numbers of queries and candidates.
            tracer (`ForwardInf`, *optional*): The attributor whose options are recorded too.
            table (`dict[str, dict[str, float]]`, *optional*): Figures by method, for the report.
            columns (`Sequence[str]`, *optional*): The figures of the table that the report shows.
            intervals (`str`, *optional*): The figure of the table that it plots with its 95% intervals.
            more (`dict[str, Callable]`, *optional*): Functions that write other files, by name of the file.
            **report: Options of [`Attribution.to_html`].

        Returns:
            `dict`: What `metrics.json` holds.
        """
        sizes = {"queries": len(found), "candidates": found.total}
        if table and intervals is not None:
            report["plot"] = plotted(partial(interval_plot, intervals), table)
        if found.indices is None:
            found = found.keep(min(self.options.top_k, len(found.candidates)))
        made_by = {} if tracer is None else settings(tracer)
        complete = {
            **sizes, **metrics, "seconds": time.perf_counter() - self.started, **environment(self.options), **made_by,
            "seed": self.options.seed,
        }  # fmt: skip
        shown = {method: {key: row[key] for key in columns if key in row} for method, row in (table or {}).items()}
        writers: dict[str, Callable[[Path], object]] = {
            "attribution": found.save_to_disk,
            "report.html": lambda path: found.to_html(path, metrics=shown, about=about(self.options), **report),
            **({"figures.json": lambda path: _write_figures(path, table, columns)} if table else {}),
            **(more or {}),
            **self._compared(report.get("compare", ())),
            "metrics.json": lambda path: _write_json(path, complete),
        }
        _write_all(self.folder, writers)
        say(f"Written: {', '.join(str(self.folder / name) for name in writers)}")
        return complete

    def _compared(self, others: Sequence[Attribution]) -> dict[str, Callable[[Path], object]]:
        """Return what writes other attributors' results, for the explorer; those of an earlier run are removed."""
        if not others:
            if process_state().is_main_process:
                shutil.rmtree(self.folder / COMPARED, ignore_errors=True)
            return {}

        def write(folder: Path) -> None:
            for other in others:
                other.keep(min(self.options.top_k, other.scores.shape[1])).save_to_disk(folder / other.method)

        return {COMPARED: write}

    def answer(self, found: Attribution) -> list[dict[str, Any]]:
        """Print the best candidates of each query, and return them ([`answers.answers`])."""
        best = answers(found)
        show(best, str(self.folder / "report.html"))
        return best


def plotted(draw: Callable[[Any], str], data: Any) -> str:
    """Return a plot for the report; an empty text, and a message, where matplotlib is not installed."""
    try:
        return draw(data)
    except ImportError as error:
        say(f"The report has no plot. {error}")
        return ""


def settings(tracer: ForwardInf) -> dict[str, Any]:
    """Return the options of the tracer's ascent, as `metrics.json` names them."""
    return {f"ascent/{name}": value for name, value in asdict(tracer.ascent).items() if value is not None}


def environment(options: Any) -> dict[str, Any]:
    """Return versions, device, and every option of a dataclass that is set, as `metrics.json` names them."""
    packages = ("hf-forward-inf", "torch", "transformers", "datasets", "accelerate")
    state = process_state()
    return {
        **{f"version/{name}": importlib.metadata.version(name) for name in packages},
        **{f"option/{name}": value for name, value in asdict(options).items() if value is not None},
        "device": torch.cuda.get_device_name() if state.device.type == "cuda" else state.device.type,
        "processes": state.num_processes,
    }


def about(options: Any) -> dict[str, str]:
    """Return what the page's foot says: model, data, versions, device and command."""
    known = environment(options)
    named = {name: known.get(f"option/{name}") for name in ("model", "candidates", "queries")}
    versions = [f"{name} {known[f'version/{name}']}" for name in ("torch", "transformers")]
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    made = {**named, "made with": ", ".join(versions), "device": known["device"], "command": command}
    return {name: str(value) for name, value in made.items() if value}


def check_output(output: str, overwrite: bool) -> Path:
    """Return the output folder, made if need be; refuse one that holds a run or can't be written to."""
    if not output.strip():
        raise ValueError("--output is empty: name a folder.")
    folder = Path(output)
    if process_state().is_main_process:
        finish(folder)
    taken = [name for name in OUTPUTS if (folder / name).exists()]
    if taken and not overwrite:
        raise FileExistsError(f"{folder} already holds a run ({', '.join(taken)}): --overwrite, or another --output.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OSError(
            f"Can't write to the output folder {folder}: {error.strerror}. Give another --output."
        ) from error
    return folder


def _write_all(folder: Path, writers: dict[str, Callable[[Path], object]]) -> None:
    """Write on the main process, while the others wait."""
    if process_state().is_main_process:
        write_all(folder, writers)
    process_state().wait_for_everyone()


def _write_figures(path: Path, table: Table, columns: Sequence[str]) -> None:
    """Write a table's figures, of which the report's columns are shown by default."""
    known = {name for row in table.values() for name in row}
    save_figures(path, table, columns={name: name for name in columns if name in known})


def _write_json(path: Path, metrics: dict[str, Any]) -> None:
    path.write_text(json.dumps(metrics, indent=2) + "\n")
