"""A whole run of fact tracing: load, trace, evaluate, write. The recipe and the console command share it."""

import importlib.metadata
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hf_forward_inf.ascent import AscentConfig
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.experiments import cost
from hf_forward_inf.experiments.comparison import attributors, run_baselines, run_comparison
from hf_forward_inf.experiments.evaluation import Table, as_text, average, compare, flat
from hf_forward_inf.experiments.task import TraceOptions, load_source
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.processes import process_state, say
from hf_forward_inf.report.plots import budget_plot

OUTPUTS = ("attribution", "report.html", "metrics.json")
"""What a run writes, in this order: a folder with metrics.json holds a finished run."""


def trace_run(options: TraceOptions, ascent: AscentConfig) -> dict[str, Any]:
    """Run it all and write `metrics.json`, `attribution/` and `report.html` into the output folder.

    Losses are cached as they are computed: a run that was interrupted goes on from there when it is started again.

    Returns:
        `dict`: What `metrics.json` holds.

    Raises:
        FileExistsError: If the folder holds a finished run and `overwrite` is not set.
        OSError: If the folder can't be written to. Both before anything is computed.
    """
    started = time.perf_counter()
    folder = check_output(options.output, options.overwrite)
    source = load_source(options, ascent.seed)
    first = source.draw(options, ascent.seed)
    tracer = ForwardInf(source.model, source.tokenizer, ascent=ascent, reduction=options.reduction)
    if options.tune:
        tracer = tracer.tune(first.candidates)
        say(f"Self-retrieval among the candidates (* is used):\n{tracer.tuning}")
    tables, costs, plot = [], {}, ""
    for repeat in range(options.repeats):
        task = source.draw(options, ascent.seed + repeat) if repeat else first
        say(f"Tracing {len(task.queries)} queries over {len(task.candidates):,} candidates ...")
        found = {"forward_inf": tracer.trace(task.queries, task.candidates, time_budget=options.time_budget)}
        if options.baselines:
            found |= run_baselines(task, tracer)
        if options.compare and repeat == 0:
            comparison = run_comparison(task, tracer)
            found |= comparison.found
            costs = comparison.costs
            plot = plotted(budget_plot, comparison.curves) if comparison.curves else ""
        elif options.compare:
            others = attributors(tracer, task.candidates).items()
            found |= {name: other.trace(task.queries, task.candidates) for name, other in others}
        tables.append(compare(found, task))
        if repeat == 0:
            kept = found["forward_inf"].keep(options.top_k)
            if options.tokens:
                kept = tracer.explain(kept)
            chosen = found.get("fixed_learning_rate")
    table = average(tables)
    metrics: dict[str, Any] = {**source.figures, "queries": len(first.queries), "candidates": len(first.candidates)}
    metrics |= flat(table)
    if chosen is not None:
        metrics |= {f"fixed_learning_rate/{key}": chosen.config[key] for key in ("learning_rate", "steps")}
    metrics |= {**costs, **cost.measure(tracer, first.queries, first.candidates)}
    metrics |= {"seconds": time.perf_counter() - started, **about(options, tracer)}
    if table:
        say(as_text(table, costs))
    say(
        f"A query costs {metrics['forward_passes_per_query']:.2f} forward passes over the candidates, "
        f"measured in this process."
    )
    write_outputs(folder, kept, metrics, table, first.proponents, plot)
    say(f"Written: {', '.join(str(folder / name) for name in OUTPUTS)}")
    return metrics


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
