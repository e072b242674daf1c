"""What a run writes, and what it says about how it came about."""

import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hf_forward_inf.attribution import Attribution
from hf_forward_inf.evaluation.tables import Table
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.utils.processes import process_state, say

OUTPUTS = ("attribution", "report.html", "metrics.json")
"""What a run writes, in this order: a folder with metrics.json holds a finished run."""


def plotted(draw: Callable[[Any], str], data: Any) -> str:
    """Draw a report's plot; nothing, and a word about it, where matplotlib is not installed."""
    try:
        return draw(data)
    except ImportError as error:
        say(f"The report goes without its plot. {error}")
        return ""


def about(options: Any, tracer: ForwardInf) -> dict[str, Any]:
    """What made the figures: versions, device, seed and every option."""
    return {
        **environment(options),
        **{f"ascent/{name}": value for name, value in asdict(tracer.ascent).items() if value is not None},
        "hubs_corrected": tracer.references is not None,
        "seed": tracer.ascent.seed,
    }


def environment(options: Any) -> dict[str, Any]:
    """Versions, device, and every option of a dataclass."""
    packages = ("hf-forward-inf", "torch", "transformers", "datasets", "accelerate")
    state = process_state()
    return {
        **{f"version/{name}": importlib.metadata.version(name) for name in packages},
        **{f"option/{name}": value for name, value in asdict(options).items() if value is not None},
        "device": torch.cuda.get_device_name() if state.device.type == "cuda" else state.device.type,
        "processes": state.num_processes,
    }


def check_output(output: str, overwrite: bool) -> Path:
    """Give the output folder; refuse one that holds a finished run or can't be written to, before all computing."""
    folder = Path(output)
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


def write_outputs(
    folder: Path,
    attribution: Attribution,
    metrics: dict[str, Any],
    table: Table,
    truth: list[list[int]] | None,
    plot: str,
    *,
    columns: Sequence[str] = ("mrr", "mrr_se", "precision@1", "precision@10", "recall@10"),
    title: str | None = None,
    note: str = "",
    plot_caption: str | None = None,
    more: Mapping[str, Callable[[Path], None]] | None = None,
) -> None:
    """Write everything, and `more` files by name.

    Beside the old outputs first, then the new ones are put in their places: no moment leaves half a file.
    """
    shown = {method: {key: row[key] for key in columns if key in row} for method, row in table.items()}
    writers: dict[str, Callable[[Path], None]] = {
        "attribution": attribution.save_to_disk,
        "report.html": lambda path: attribution.to_html(
            path,
            proponents=truth,
            metrics=shown,
            note=note,
            plot=plot,
            title=title,
            plot_caption=plot_caption,
        ),
        **(more or {}),
        "metrics.json": lambda path: _write_json(path, metrics),
    }
    _write_all(folder, writers)


def _write_all(folder: Path, writers: dict[str, Callable[[Path], None]]) -> None:
    """Write on the main process; the others wait."""
    if process_state().is_main_process:
        _replace_all(folder, writers)
    process_state().wait_for_everyone()


def _replace_all(folder: Path, writers: dict[str, Callable[[Path], None]]) -> None:
    staging = Path(tempfile.mkdtemp(dir=folder, prefix=".writing-"))
    try:
        for name, write in writers.items():
            write(staging / name)
        for name in writers:
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
            (staging / name).replace(folder / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_json(path: Path, metrics: dict[str, Any]) -> None:
    path.write_text(json.dumps(metrics, indent=2) + "\n")
