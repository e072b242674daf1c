"""A whole run of fact tracing: load, trace, evaluate, write. The recipe and the console command share it."""

import importlib.metadata
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_forward_inf import cost
from hf_forward_inf.ascent import AscentConfig
from hf_forward_inf.attribution import Attribution
from hf_forward_inf.baselines import BM25
from hf_forward_inf.datasets import builtin_facts, candidate_pool, load_rows, proponents, sample_rows
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.metrics import random_figures
from hf_forward_inf.processes import process_state, say
from hf_forward_inf.tiny_models import tiny_mt5

FIXED_LEARNING_RATES = ((0.1, 1), (1.0, 1), (0.1, 3))
"""Learning rates and steps of the paper's fixed-rate ascent that are tried; the best by its true MRR is reported."""
OUTPUTS = ("attribution", "report.html", "metrics.json")
"""What a run writes, in this order: a folder with metrics.json holds a finished run."""
BUILTIN_CANDIDATES = 1200
"""Candidates traced of the built-in facts, unless the user says how many."""
TRAINED_QUERIES = 4
"""Queries asked of a model that is yet to be trained, for each one wanted: it will not answer them all."""


@dataclass
class TraceOptions:
    """What to trace, and where the results go.

    With none of `model`, `candidates` and `queries`, the built-in facts are traced with a tiny mT5 trained on them.
    """

    output: str = field(default="outputs/ftrace", metadata={"help": "Folder for metrics, attribution and report."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a finished run in the output folder."})
    model: str | None = field(default=None, metadata={"help": "Seq2seq model: hub name or local folder."})
    candidates: str | None = field(
        default=None, metadata={"help": "Training examples: hub name[:config], local folder, parquet, JSON or CSV."}
    )
    queries: str | None = field(default=None, metadata={"help": "Outputs to explain, as --candidates."})
    train: bool = field(default=False, metadata={"help": "Train a tiny mT5 on the candidates instead of --model."})
    epochs: int = field(default=25, metadata={"help": "Epochs of that training."})
    num_candidates: int | None = field(
        default=None,
        metadata={"help": "Candidates: the queries' proponents, filled up with distractors. All if unset."},
    )
    num_queries: int = field(default=60, metadata={"help": "Queries traced at most, drawn at random."})
    unanswered: bool = field(default=False, metadata={"help": "Trace also queries that the model answers otherwise."})
    strict: bool = field(
        default=False, metadata={"help": "Proponents are only those in which the queried object is masked."}
    )
    tune: bool = field(
        default=True,
        metadata={"help": "Choose the radius by self-retrieval, without labels. Off if a step is given."},
    )
    reduction: Literal["sum", "mean"] = field(
        default="sum", metadata={"help": "A candidate's loss: sum or mean over its target tokens."}
    )
    top_k: int = field(default=100, metadata={"help": "Candidates of each query kept in the attribution."})
    baselines: bool = field(
        default=True, metadata={"help": "Also run BM25 and the paper's fixed learning rates, if proponents are known."}
    )

    def __post_init__(self) -> None:
        given = [name for name in ("model", "candidates", "queries") if getattr(self, name)]
        if given and not (self.candidates and self.queries):
            raise ValueError(f"--{given[0]} is given: give --candidates and --queries with it.")
        if given and not self.model and not self.train:
            raise ValueError("Which model? Give --model, or --train for a tiny one trained on the candidates.")
        if self.model and self.train:
            raise ValueError("Give either --model or --train: a model that was trained before, or a new one.")
        for name in ("num_queries", "top_k", "epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}.")


@dataclass
class Task:
    """What is traced: a model, its queries and candidates, and the truth where it is known."""

    model: Any
    tokenizer: Any
    queries: Dataset
    candidates: Dataset
    proponents: list[list[int]] | None
    figures: dict[str, float]


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
    table = evaluate_all(found, task)
    for method, figures in table.items():
        metrics |= {key if method == "forward_inf" else f"{method}/{key}": v for key, v in figures.items()}
    metrics |= cost.measure(tracer, task.queries, task.candidates)
    metrics |= {"seconds": time.perf_counter() - started, **about(options, tracer)}
    if table:
        say(as_table(table))
    say(
        f"A query costs {metrics['forward_passes_per_query']:.2f} forward passes over the candidates, "
        f"measured in this process."
    )
    if process_state().is_main_process:
        write_outputs(folder, found["forward_inf"].keep(options.top_k), metrics, table, task.proponents)
    process_state().wait_for_everyone()
    say(f"Written: {', '.join(str(folder / name) for name in OUTPUTS)}")
    return metrics


def load_task(options: TraceOptions, seed: int) -> Task:
    """Load or train the model, and draw queries that it answers and candidates."""
    if options.model:
        task = _task_of_model(options, seed)
    elif options.train:
        task = _task_of_trained_model(options, seed)
    else:
        task = _builtin_task(options, seed)
    figures = {**task.figures, "queries": len(task.queries), "candidates": len(task.candidates)}
    return replace(task, figures=figures)


def _task_of_model(options: TraceOptions, seed: int) -> Task:
    abstracts, queries = load_rows(str(options.candidates), "abstracts"), load_rows(str(options.queries), "queries")
    say(f"Tracing {options.queries} over {options.candidates} with {options.model}.")
    model = AutoModelForSeq2SeqLM.from_pretrained(str(options.model)).to(process_state().device).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(options.model))
    return _drawn(model, tokenizer, queries, abstracts, options.num_candidates, options, seed)


def _builtin_task(options: TraceOptions, seed: int) -> Task:
    say("Tracing the built-in facts with a tiny mT5 trained on them; --model, --candidates, --queries for yours.")
    corpus = builtin_facts()
    model, tokenizer = tiny_mt5(corpus["abstracts"], epochs=options.epochs)
    count = options.num_candidates or BUILTIN_CANDIDATES
    return _drawn(model, tokenizer, corpus["queries"], corpus["abstracts"], count, options, seed)


def _task_of_trained_model(options: TraceOptions, seed: int) -> Task:
    """Draw the candidates first: the model is trained on them, and on them alone."""
    abstracts, queries = load_rows(str(options.candidates), "abstracts"), load_rows(str(options.queries), "queries")
    say(f"Tracing {options.queries} over {options.candidates} with a tiny mT5 trained on the candidates.")
    queries = with_proponents(queries, abstracts, options.strict)
    queries = sample_rows(queries, TRAINED_QUERIES * options.num_queries, seed)
    candidates = draw_candidates(queries, abstracts, options.num_candidates, seed)
    model, tokenizer = tiny_mt5(candidates, epochs=options.epochs)
    return _drawn(model, tokenizer, queries, candidates, None, options, seed)


def _drawn(
    model: Any,
    tokenizer: Any,
    queries: Dataset,
    abstracts: Dataset,
    num_candidates: int | None,
    options: TraceOptions,
    seed: int,
) -> Task:
    """Draw queries that the model answers, candidates for them, and find the proponents."""
    queries = with_proponents(queries, abstracts, options.strict)
    queries, figures = answered(model, tokenizer, queries, options)
    queries = sample_rows(queries, options.num_queries, seed)
    candidates = draw_candidates(queries, abstracts, num_candidates, seed)
    truth = proponents(queries, candidates, options.strict) if has_facts(queries, candidates) else None
    return Task(model, tokenizer, queries, candidates, truth, figures)


def has_facts(queries: Dataset, rows: Dataset) -> bool:
    """Whether columns tell which facts rows state and queries ask for."""
    return "facts" in rows.column_names and "predicate_id" in queries.column_names


def with_proponents(queries: Dataset, abstracts: Dataset, strict: bool) -> Dataset:
    """Leave out queries whose fact no row states; keep all where facts are unknown.

    Raises:
        ValueError: If none is left.
    """
    if not has_facts(queries, abstracts):
        return queries
    known = [i for i, rows in enumerate(proponents(queries, abstracts, strict)) if rows]
    if not known:
        raise ValueError("No candidate states the fact of any query: are these the right candidates?")
    if len(known) < len(queries):
        say(f"{len(queries) - len(known)} of {len(queries)} queries have no proponent: they are left out.")
    return queries.select(known)


def draw_candidates(queries: Dataset, abstracts: Dataset, num_candidates: int | None, seed: int) -> Dataset:
    """All abstracts, or as many as asked for: proponents, and distractors as FTRACE takes them."""
    if num_candidates is None or num_candidates >= len(abstracts):
        return abstracts
    candidates, counts = candidate_pool(queries, abstracts, num_candidates, seed)
    say("Candidates: " + ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in counts.items()))
    return candidates


def answered(model: Any, tokenizer: Any, queries: Dataset, options: TraceOptions) -> tuple[Dataset, dict[str, float]]:
    """Keep the queries that the model answers exactly, and tell their share.

    Queries without a target column get the model's own answer.
    """
    adapter = ForwardInf(model, tokenizer).adapter
    answers = adapter.answer(queries[:])  # type: ignore[attr-defined]
    target = adapter.columns[-1]
    if target not in queries.column_names:
        say("The queries have no targets: the model's own answers are traced.")
        return queries.add_column(target, answers), {}
    right = [i for i, (said, true) in enumerate(zip(answers, queries[target], strict=True)) if said == true.strip()]
    say(f"The model answers {len(right)} of {len(queries)} queries exactly ({len(right) / len(queries):.0%}).")
    figures = {"answered": len(right) / len(queries)}
    if options.unanswered:
        return queries, figures
    if not right:
        raise ValueError(
            "The model answers none of the queries exactly, so there is nothing it knows to trace. "
            "Trace what it was taught anyway with --unanswered."
        )
    return queries.select(right), figures


def run_baselines(task: Task, tracer: ForwardInf) -> dict[str, Attribution]:
    """Trace with BM25, and, where the truth is known to choose by, the paper's fixed learning rates."""
    found = {
        "bm25": BM25().trace(task.queries, task.candidates),
        "bm25_without_answer": BM25(with_answer=False).trace(task.queries, task.candidates),
    }
    if task.proponents is None:
        return found
    tries = []
    for rate, steps in FIXED_LEARNING_RATES:
        say(f"The paper's fixed learning rate {rate:g}, {steps} step{'s' if steps > 1 else ''}, all parameters ...")
        config = AscentConfig(learning_rate=rate, steps=steps, modules=["all"], seed=tracer.ascent.seed)
        tries.append(tracer.with_options(ascent=config, references=None).trace(task.queries, task.candidates))
    truth = task.proponents
    best = max(tries, key=lambda one: one.evaluate(truth)["mrr"])
    return {"fixed_learning_rate": best, **found}


def evaluate_all(found: dict[str, Attribution], task: Task) -> dict[str, dict[str, float]]:
    """Compare every attributor with the truth, a random order beside them; nothing where it is unknown."""
    if task.proponents is None:
        return {}
    table = {method: attribution.evaluate(task.proponents) for method, attribution in found.items()}
    for method, attribution in found.items():
        if attribution.config.get("learning_rate"):
            table[method] |= {key: attribution.config[key] for key in ("learning_rate", "steps")}
    sizes = [len(rows) for rows in task.proponents]
    return {**table, "random": random_figures(len(task.candidates), sizes)}


def as_table(table: dict[str, dict[str, float]]) -> str:
    """Lay the main figures out for a terminal."""
    columns = ["mrr", "precision@1", "recall@1", "recall@5", "recall@10"]
    width = max(map(len, table))
    lines = [f"{'':{width}}  {'mrr (s.e.)':>13}" + "".join(f"{name:>13}" for name in columns[1:])]
    for method, figures in table.items():
        error = f" ({figures['mrr_se']:.3f})" if "mrr_se" in figures else " " * 8
        rest = "".join(f"{figures[name]:13.3f}" if name in figures else " " * 13 for name in columns[1:])
        lines.append(f"{method:{width}}  {figures['mrr']:5.3f}{error}{rest}")
    return "\n".join(lines)


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
