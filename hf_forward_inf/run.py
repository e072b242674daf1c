"""A whole run of fact tracing: load, trace, evaluate, write. The recipe and the console command share it."""

import importlib.metadata
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hf_forward_inf import cost
from hf_forward_inf.ascent import AscentConfig
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.comparison import as_table, evaluate_all, run_baselines, run_comparison
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.processes import process_state, say
from hf_forward_inf.task import TraceOptions, load_task

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
    folder = Path(options.output)
    check_output(folder, options.overwrite)
    task = load_task(options, ascent.seed)
    tracer = ForwardInf(task.model, task.tokenizer, ascent=ascent, reduction=options.reduction)
    if options.tune:
        tracer = tracer.tune(task.candidates)
        say(f"Self-retrieval among the candidates (* is used):\n{tracer.tuning}")
    say(f"Tracing {len(task.queries)} queries over {len(task.candidates):,} candidates ...")
    found = {"forward_inf": tracer.trace(task.queries, task.candidates)}
    metrics: dict[str, Any] = dict(task.figures)
    if options.baselines:
        found |= run_baselines(task, tracer)
    if options.compare:
        compared, costs = run_comparison(task, tracer)
        found |= compared
        metrics |= costs
    table = evaluate_all(found, task)
    for method, figures in table.items():
        metrics |= {key if method == "forward_inf" else f"{method}/{key}": v for key, v in figures.items()}
    metrics |= cost.measure(tracer, task.queries, task.candidates)
    metrics |= {"seconds": time.perf_counter() - started, **about(options, tracer)}
    if table:
        say(as_table(table, metrics))
    say(
        f"A query costs {metrics['forward_passes_per_query']:.2f} forward passes over the candidates, "
        f"measured in this process."
    )
    if process_state().is_main_process:
        write_outputs(folder, found["forward_inf"].keep(options.top_k), metrics, table, task.proponents)
    process_state().wait_for_everyone()
    say(f"Written: {', '.join(str(folder / name) for name in OUTPUTS)}")
    return metrics


def about(options: TraceOptions, tracer: ForwardInf) -> dict[str, Any]:
    """What made the figures: versions, device, seed and every option."""
    packages = ("hf-forward-inf", "torch", "transformers", "datasets", "accelerate")
    state = process_state()
    return {
        **{f"version/{name}": importlib.metadata.version(name) for name in packages},
        **{f"option/{name}": value for name, value in asdict(options).items() if value is not None},
        **{f"ascent/{name}": value for name, value in asdict(tracer.ascent).items() if value is not None},
        "hubs_corrected": tracer.references is not None,
        "seed": tracer.ascent.seed,
        "device": torch.cuda.get_device_name() if state.device.type == "cuda" else state.device.type,
        "processes": state.num_processes,
    }


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds a finished run or can't be written to, before anything is computed."""
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


def write_outputs(
    folder: Path,
    attribution: Attribution,
    metrics: dict[str, Any],
    table: dict[str, dict[str, float]],
    truth: list[list[int]] | None,
) -> None:
    """Write beside the old outputs first, then put the new ones in their places: no moment leaves half a file."""
    columns = ("mrr", "mrr_se", "precision@1", "precision@10", "recall@10")
    shown = {method: {key: row[key] for key in columns if key in row} for method, row in table.items()}
    writers: dict[str, Callable[[Path], None]] = {
        "attribution": attribution.save_to_disk,
        "report.html": lambda path: attribution.to_html(path, proponents=truth, metrics=shown),
        "metrics.json": lambda path: _write_json(path, metrics),
    }
    staging = Path(tempfile.mkdtemp(dir=folder, prefix=".writing-"))
    try:
        for name in OUTPUTS:
            writers[name](staging / name)
        for name in OUTPUTS:
            if (folder / name).is_dir():
                shutil.rmtree(folder / name)
            (staging / name).replace(folder / name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _write_json(path: Path, metrics: dict[str, Any]) -> None:
    path.write_text(json.dumps(metrics, indent=2) + "\n")
