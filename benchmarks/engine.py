"""Cost and quality of a trace by numbers of queries and candidates, from nothing and from a warm cache.

    python benchmarks/engine.py
    python benchmarks/engine.py --num_candidates 1000 10000 --data DIR --more_candidates ABSTRACTS
    python benchmarks/engine.py --baselines

Every strategy traces 1, 10 and 100 queries from nothing (`cold`: base pass, fit, screen, ascents and all), then a few
other queries, one at a time, over the same candidates (`warm`). Costs are in plain forward passes over the same
candidates, f, in the processor's time of this process (on a GPU, in seconds). MRR and recall@10 are those of the
queries that were traced; `minus full` is the mean difference of the reciprocal ranks to the full pass on the same
queries, with its standard error.

Uses the built-in facts with their tiny mT5 (trained once), or `--data`, a folder with `model`, `candidates.parquet`
and `queries.parquet` in FTRACE's format; `--more_candidates` names sentences that fill up larger sets. Writes
`engine.json` and a plot, `engine.svg`, into `--output`.
"""

import argparse
import json
import statistics
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_forward_inf import Attribution, ForwardInf
from hf_forward_inf.baselines import attributors_for
from hf_forward_inf.data import builtin_facts, load_rows, proponents
from hf_forward_inf.evaluation.cost import clock, plain_pass
from hf_forward_inf.evaluation.fact_tracing import draw_candidates, with_proponents
from hf_forward_inf.report.plots import as_svg, figure_class
from hf_forward_inf.scores.metrics import recalls_at_k, reciprocal_ranks
from hf_forward_inf.toys.tiny_models import tiny_mt5
from hf_forward_inf.utils.fingerprints import uncached
from hf_forward_inf.utils.processes import progress_bars

LATER = 4
"""Queries that are traced one at a time with a warm cache."""
BASELINES = ("tracin", "trackstar", "influence_functions")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--more_candidates", type=Path)
    parser.add_argument("--num_candidates", type=int, nargs="+", default=[1000])
    parser.add_argument("--num_queries", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--full_queries", type=int, nargs="*", help="Numbers for the full pass; the same if unset.")
    parser.add_argument("--keep", type=int, help="Candidates that the screen keeps; the default if unset.")
    parser.add_argument("--screens", nargs="*", default=[], help="Other screens to compare.")
    parser.add_argument("--baselines", action="store_true", help="Also time gradients and influence functions.")
    parser.add_argument("--output", type=Path, default=Path("outputs/engine"))
    return parser.parse_args()


def load(options: argparse.Namespace) -> tuple[Any, Any, Dataset, Dataset]:
    """Return model, tokenizer, queries with a proponent, and sentences."""
    if options.data is None:
        corpus = builtin_facts()
        return (*tiny_mt5(corpus["abstracts"]), corpus["queries"], corpus["abstracts"])
    model = AutoModelForSeq2SeqLM.from_pretrained(options.data / "model").eval()
    queries = load_rows(str(options.data / "queries.parquet"), "queries")
    if "answered" in queries.column_names:
        queries = queries.filter(lambda answered: answered, input_columns="answered")
    sentences = load_rows(str(options.data / "candidates.parquet"), "abstracts")
    return model, AutoTokenizer.from_pretrained(options.data / "model"), queries, sentences


def candidates_of(options: argparse.Namespace, queries: Dataset, sentences: Dataset, count: int) -> Dataset:
    """Return so many candidates, the queries' proponents among them."""
    if count <= len(sentences) or options.more_candidates is None:
        return draw_candidates(queries, sentences, count, seed=0)
    known = set(sentences["inputs_pretokenized"])
    others = load_rows(str(options.more_candidates), "abstracts")
    rows = [i for i, text in enumerate(others["inputs_pretokenized"]) if text not in known]
    chosen = np.random.default_rng(0).permutation(rows)[: count - len(sentences)]
    shared = [name for name in sentences.column_names if name in others.column_names]
    return concatenate_datasets([sentences.select_columns(shared), others.select_columns(shared).select(chosen)])


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that some work takes ([`cost.clock`]), and what it returns."""
    start = clock()
    result = work()
    return clock() - start, result


def quality(found: Attribution, full: Attribution | None, truth: list[list[int]]) -> dict[str, float]:
    """Return MRR and recall@10, and the mean paired differences to the full pass."""
    measured = {"mrr": lambda scores: reciprocal_ranks(scores, truth)}
    measured["recall@10"] = lambda scores: recalls_at_k(scores, truth, 10)
    figures: dict[str, float] = {}
    for name, of in measured.items():
        own = of(found.scores)
        figures |= {name: own.mean(), f"{name}_se": own.std() / len(own) ** 0.5}
        if full is not None and full is not found:
            difference = own - of(full.scores)
            figures[f"{name} minus full"] = difference.mean()
            figures[f"{name} minus full_se"] = difference.std() / len(own) ** 0.5
    if found.plan is not None and found.plan.audits:
        figures["audited recall"] = found.plan.audits[-1].recall
    return {name: float(value) for name, value in figures.items()}


def compare(options: argparse.Namespace, tracer: ForwardInf, queries: Dataset, candidates: Dataset) -> list[dict]:
    """Trace by every strategy, and return a row for each strategy and number of queries."""
    plain, truth = plain_pass(tracer, candidates)[0], proponents(queries, candidates)
    print(f"{len(candidates):,} candidates, f = {plain:.2f} s", flush=True)
    screened = {name: tracer.with_options(strategy="screen", screen=name, keep=options.keep)
                for name in (None, *options.screens)}  # fmt: skip
    methods: dict[str, Any] = {"full": tracer.with_options(strategy="full")}
    methods |= {f"screen {name}" if name else "screen": one for name, one in screened.items()}
    rows, full = [], {}
    for name, one in methods.items():
        counts = options.full_queries if name == "full" and options.full_queries is not None else options.num_queries
        for count in sorted({min(count, len(queries) - LATER) for count in counts}):
            with tempfile.TemporaryDirectory() as folder:
                fresh = one.with_options(cache_dir=folder)
                cold, found = seconds(partial(fresh.trace, queries.select(range(count)), candidates))
                later = [
                    seconds(partial(fresh.trace, queries.select([len(queries) - 1 - i]), candidates))[0]
                    for i in range(LATER)
                ]
            if name == "full":
                full[count] = found
            figures = quality(found, full.get(count), truth[:count])
            costs = {"cold": cold / plain, "a query": cold / plain / count, "warm": statistics.median(later) / plain}
            rows.append({"candidates": len(candidates), "strategy": name, "queries": count, **costs, **figures})
            show(rows[-1])
    return rows + (baselines(options, tracer, queries, candidates, plain) if options.baselines else [])


def baselines(
    options: argparse.Namespace, tracer: ForwardInf, queries: Dataset, candidates: Dataset, plain: float
) -> list[dict]:
    """Time other attributors."""
    rows = []
    for name, one in attributors_for(tracer, BASELINES).items():
        for count in sorted({min(count, len(queries)) for count in options.num_queries}):
            some = queries.select(range(count))
            with uncached():
                taken, found = seconds(partial(one.trace, some, candidates))
            figures = quality(found, None, proponents(some, candidates))
            costs = {"cold": taken / plain, "a query": taken / plain / count}
            rows.append({"candidates": len(candidates), "strategy": name, "queries": count, **costs, **figures})
            show(rows[-1])
    return rows


def show(row: dict[str, Any]) -> None:
    cells = {name: f"{value:.3f}" if isinstance(value, float) else str(value) for name, value in row.items()}
    print(", ".join(f"{name} {value}" for name, value in cells.items() if not name.endswith("_se")), flush=True)


def plot(rows: list[dict]) -> str:
    """Plot the cold cost by number of queries, a panel for each number of candidates, as SVG text."""
    figure = figure_class()(figsize=(9, 3.6), layout="constrained")
    sizes = sorted({row["candidates"] for row in rows})
    for axis, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        for name in dict.fromkeys(row["strategy"] for row in rows if row["candidates"] == size):
            own = [row for row in rows if row["candidates"] == size and row["strategy"] == name]
            axis.plot([row["queries"] for row in own], [row["cold"] for row in own], marker="o", label=name)
        axis.set(xscale="log", yscale="log", xlabel="queries", title=f"{size:,} candidates")
        axis.set_ylabel("plain forward passes, all included")
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
    return as_svg(figure)


def main() -> None:
    options = arguments()
    options.output.mkdir(parents=True, exist_ok=True)
    model, tokenizer, queries, sentences = load(options)
    queries = with_proponents(queries, sentences)
    tracer, rows = ForwardInf(model, tokenizer), []
    with progress_bars(False), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for count in options.num_candidates:
            rows += compare(options, tracer, queries, candidates_of(options, queries, sentences, count))
            (options.output / "engine.json").write_text(json.dumps(rows, indent=2))
    (options.output / "engine.svg").write_text(plot(rows))


if __name__ == "__main__":
    main()
