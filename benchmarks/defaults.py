"""Truth and retrieval of language models by the settings of the step: the table behind the defaults.

    python benchmarks/defaults.py
    python benchmarks/defaults.py --mt5_facts DIR --webnlg DIR

Truth is the LDS on two models that are trained again without halves of their data (`recipes/lds.py`, a tiny mT5 and a
tiny Llama): of the queries by which settings may be chosen, and of as many others by which they are judged. Retrieval
is MRR and recall@10 on the built-in facts, and on two more sets where they are given: a folder with `model`,
`queries.parquet` and `candidates.parquet` in FTRACE's format, and one with WebNLG's `abstracts.parquet`
(`benchmarks/webnlg.py`). All candidates get the finite step; the floor is that of `strategy="auto"`. Trained models
and losses are cached.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
from webnlg import answered_queries, training_rows

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import Adapter, Seq2SeqAdapter
from hf_forward_inf.data import builtin_facts, load_rows, proponents
from hf_forward_inf.evaluation.fact_tracing import draw_candidates, draw_task, with_answered, with_proponents
from hf_forward_inf.scores.metrics import recalls_at_k, reciprocal_ranks
from hf_forward_inf.scores.retraining import lds_by_query, random_subsets
from hf_forward_inf.toys.tiny_models import tiny_mt5
from hf_forward_inf.tracing.planning import kept
from hf_forward_inf.tracing.screened import floored
from hf_forward_inf.utils.processes import progress_bars

sys.path.append(str(Path(__file__).parents[1] / "recipes"))

from experiments.retrainable_facts import facts
from experiments.retrainable_sentences import sentences

SETTINGS: dict[str, AscentConfig] = {
    "default": AscentConfig(),
    "default, full weights": AscentConfig(step="full"),
    "damping .1, radius 2": AscentConfig(damping=0.1, radius=2.0),
    "damping .01, radius 1": AscentConfig(damping=0.01, radius=1.0),
    "damping .01, radius 2": AscentConfig(damping=0.01, radius=2.0),
    "damping .003, radius 1": AscentConfig(damping=0.003, radius=1.0),
    "damping .01, trust .01": AscentConfig(damping=0.01, trust=0.01),
    "damping .01, radius 1, 2 steps": AscentConfig(damping=0.01, radius=1.0, steps=2),
    "damping .003, trust .01, 3 steps": AscentConfig(damping=0.003, trust=0.01, steps=3),
    "symmetric": AscentConfig(mode="symmetric"),
    "all modules": AscentConfig(modules=["all"], sample=1024),
    "all modules, symmetric": AscentConfig(modules=["all"], sample=1024, mode="symmetric"),
    "gradient, radius 1": AscentConfig(direction="gradient", radius=1.0),
}
HALVES, SEEDS = 60, 2


@dataclass
class Truth:
    """Losses after training on halves."""

    name: str
    adapter: Adapter
    queries: Dataset
    candidates: Dataset
    subsets: np.ndarray
    losses: np.ndarray

    def figures(self, scores: np.ndarray) -> dict[str, float]:
        """Return the LDS of the queries to choose by and of those to judge by."""
        found = lds_by_query(scores, self.subsets, self.losses)
        half = len(found) // 2
        error = found.std(ddof=1) / len(found) ** 0.5
        return {"chosen": found[half:].mean(), "judged": found[:half].mean(), "both": found.mean(), "error": error}


@dataclass
class Facts:
    """Facts to be found."""

    name: str
    adapter: Adapter
    queries: Dataset
    candidates: Dataset
    proponents: list[list[int]]

    def figures(self, scores: np.ndarray) -> dict[str, float]:
        """Return MRR, its standard error, and recall@10."""
        ranks, recalls = reciprocal_ranks(scores, self.proponents), recalls_at_k(scores, self.proponents, 10)
        error = ranks.std(ddof=1) / len(ranks) ** 0.5
        return {"mrr": ranks.mean(), "error": error, "recall@10": np.mean(recalls)}


def sets(options: argparse.Namespace) -> Iterator[Truth | Facts]:
    """Load, train or read from the cache one set after another."""
    for name, task in (("facts, mT5", facts()), ("sentences, Llama", sentences())):
        asked = concatenate_datasets([task.queries, task.others])
        subsets = random_subsets(len(task.candidates), HALVES)
        losses = task.retrained(asked, subsets, SEEDS)[..., 0].mean(axis=0)
        yield Truth(name, task.adapter(0), asked, task.candidates, subsets, losses)
    corpus = builtin_facts()
    adapter = Seq2SeqAdapter(*tiny_mt5(corpus["abstracts"]))
    queries = with_proponents(corpus["queries"], corpus["abstracts"], False)
    queries = with_answered(adapter, queries).filter(lambda row: row["answered"])
    candidates = draw_candidates(queries, corpus["abstracts"], 1200, 0)
    yield Facts("built-in facts", adapter, queries, candidates, proponents(queries, candidates))
    if options.mt5_facts is not None:
        folder = options.mt5_facts
        model = AutoModelForSeq2SeqLM.from_pretrained(folder / "model").eval()
        adapter = Seq2SeqAdapter(model, AutoTokenizer.from_pretrained(folder / "model"))
        candidates = load_rows(str(folder / "candidates.parquet"), "abstracts")
        queries = with_proponents(load_rows(str(folder / "queries.parquet"), "queries"), candidates, False)
        queries = queries.filter(lambda row: row.get("answered", True), desc="answered")
        yield Facts("mt5_facts", adapter, queries, candidates, proponents(queries, candidates))
    if options.webnlg is not None:
        abstracts = load_rows(str(options.webnlg / "abstracts.parquet"), "abstracts")
        train = training_rows(abstracts, None)
        tracer, queries = answered_queries(abstracts, train, epochs=30)
        drawn = draw_task(queries, train, num_queries=100, num_candidates=1800, seed=0)
        assert drawn.proponents is not None
        yield Facts("WebNLG", tracer.adapter, drawn.queries, drawn.candidates, drawn.proponents)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mt5_facts", type=Path)
    parser.add_argument("--webnlg", type=Path)
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--output", type=Path, default=Path("outputs/defaults"))
    options = parser.parse_args()
    rows = []
    for one in sets(options):
        print(f"\n{one.name}: {len(one.queries)} queries, {len(one.candidates)} candidates", flush=True)
        for name in options.settings:
            with progress_bars(False):
                tracer = ForwardInf(adapter=one.adapter, ascent=SETTINGS[name], strategy="full")
                scores = tracer.trace(one.queries, one.candidates).dense()
            for floor, values in (("", scores), ("floor", floored(scores, kept(tracer, len(one.candidates)))[0])):
                figures = {key: float(value) for key, value in one.figures(values).items()}
                rows.append({"set": one.name, "setting": name, "floor": bool(floor), **figures})
                cells = "  ".join(f"{key} {value:.3f}" for key, value in figures.items())
                print(f"{name:34} {floor:6} {cells}", flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "metrics.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
