"""Fact tracing with every direction of the step: retrieval metrics, and the cost of a query.

    python benchmarks/directions.py
    python benchmarks/directions.py --model DIR --candidates FILE --queries FILE --training FILE

Uses the built-in facts with their tiny mT5 (trained once), or your own in FTRACE's format; if queries have a column
`answered`, only those that the model answers. The default modules are perturbed. Kronecker factors are fitted to
targets sampled from the model (the true Fisher matrix) or, marked `empirical`, to the targets in the data. Costs, of
the fit and of a query, are in plain forward passes over the candidates. `--tune` shows what self-retrieval chooses.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import Seq2SeqAdapter
from hf_forward_inf.adapters.base import Batch, Forward
from hf_forward_inf.data import builtin_facts, load_rows, proponents
from hf_forward_inf.evaluation.candidate_sets import candidate_pool
from hf_forward_inf.evaluation.cost import measure
from hf_forward_inf.toys.tiny_models import tiny_mt5
from hf_forward_inf.utils.rows import sample_rows


class EmpiricalFisher(Seq2SeqAdapter):
    """Fits Kronecker factors to gradients at the targets in the data instead of sampled ones."""

    @property
    def cache_key(self) -> str:
        """The key of the adapter's cache, different for these factors."""
        return f"{super().cache_key}, empirical Fisher"

    def outputs_and_loss(self, forward: Forward, batch: Batch) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Return the outputs and their loss, and store the loss for [`sampled_output_gradients`]."""
        outputs, self.loss_of = super().outputs_and_loss(forward, batch)
        return outputs, self.loss_of

    def sampled_output_gradients(self, outputs: Tensor, generator: torch.Generator) -> Tensor:
        """Return the gradient of the stored loss: nothing is sampled."""
        with torch.enable_grad():
            leaf = outputs.detach().requires_grad_()
            return torch.autograd.grad(self.loss_of(leaf), leaf)[0]


FISHER: dict[str, type[Seq2SeqAdapter]] = {"true": Seq2SeqAdapter, "empirical": EmpiricalFisher}
"""Targets that Kronecker factors are fitted to: sampled ones, or those in the data."""


def load(options: argparse.Namespace) -> tuple[Any, Any, Dataset, Dataset, Dataset]:
    """Return model, tokenizer, queries, candidates and training data."""
    model: Any
    tokenizer: Any
    if not options.model:
        corpus = builtin_facts()
        model, tokenizer = tiny_mt5(corpus["abstracts"])
        queries = sample_rows(corpus["queries"], options.num_queries)
        answers = Seq2SeqAdapter(model, tokenizer).answer(queries[:])
        right = [i for i, said in enumerate(answers) if said == queries[i]["targets_pretokenized"].strip()]
        queries = queries.select(right)
        candidates, _ = candidate_pool(queries, corpus["abstracts"], options.num_candidates, 0)
        return model, tokenizer, queries, candidates, corpus["abstracts"]
    model = AutoModelForSeq2SeqLM.from_pretrained(options.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    queries, candidates = load_rows(options.queries, "queries"), load_rows(options.candidates, "abstracts")
    if "answered" in queries.column_names:
        queries = queries.select([i for i, known in enumerate(queries["answered"]) if known])
    training = load_rows(options.training, "abstracts") if options.training else candidates
    return model, tokenizer, sample_rows(queries, options.num_queries), candidates, training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("model", "candidates", "queries", "training"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--num_queries", type=int, default=50)
    parser.add_argument("--num_candidates", type=int, default=1200, help="Number of candidates of the built-in facts.")
    parser.add_argument("--directions", nargs="*", default=["gradient", "kfac", "ekfac", "cg", "pcg"])
    parser.add_argument("--dampings", type=float, nargs="*", default=[1.0, 0.1, 0.01])
    parser.add_argument("--radii", type=float, nargs="*", default=[0.3, 1.0])
    parser.add_argument("--tune", action="store_true", help="Also let self-retrieval choose among the same settings.")
    parser.add_argument("--modules", nargs="*", help="Perturbed modules, `all` for every one (default: the decoder).")
    parser.add_argument(
        "--fisher",
        nargs="*",
        choices=FISHER,
        default=list(FISHER),
        help="Targets for fitting Kronecker factors.",
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/directions"))
    options = parser.parse_args()
    model, tokenizer, queries, candidates, training = load(options)
    truth = proponents(queries, candidates)
    print(f"{len(queries)} queries, {len(candidates)} candidates, {len(training)} training rows\n")
    print("| direction | damping | radius | MRR (s.e.) | recall@10 | passes to fit | passes a query |")
    print(f"|{' --- |' * 7}", flush=True)
    rows = []
    for kind in (FISHER[name] for name in options.fisher):
        for direction in options.directions:
            if kind is EmpiricalFisher and direction not in ("kfac", "ekfac"):
                continue
            for damping in (None,) if direction == "gradient" else options.dampings:
                cost: dict[str, float] = {}
                for radius in options.radii:
                    ascent = AscentConfig(direction=direction, damping=damping, radius=radius, modules=options.modules)
                    tracer = ForwardInf(adapter=kind(model, tokenizer), ascent=ascent, training=training)
                    figures = tracer.trace(queries, candidates).evaluate(truth)
                    cost = cost or measure(tracer, queries.select(range(min(4, len(queries)))), candidates)
                    name = direction + (" (empirical)" if kind is EmpiricalFisher else "")
                    row = {"direction": name, "damping": damping, "radius": radius, **figures, **cost}
                    rows.append(row)
                    fit = f"{cost['forward_passes_to_fit']:.1f}" if "forward_passes_to_fit" in cost else ""
                    print(
                        f"| {name} | {damping or ''} | {radius:g} | {row['mrr']:.3f} ({row['mrr_se']:.3f}) | "
                        f"{row['recall@10']:.3f} | {fit} | {cost['forward_passes_per_query']:.2f} |",
                        flush=True,
                    )
    if options.tune:
        tracer = ForwardInf(model, tokenizer, ascent=AscentConfig(modules=options.modules), training=training)
        settings = [
            AscentConfig(direction=name, damping=damping, radius=radius, modules=options.modules)
            for name in options.directions
            for damping in ([None] if name == "gradient" else options.dampings)
            for radius in options.radii
        ]
        tuned = tracer.tune(candidates, settings, pool=400)
        print(f"\nBy self-retrieval among 400 candidates (* is used):\n{tuned.tuning}")
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "metrics.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
