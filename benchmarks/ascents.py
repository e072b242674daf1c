"""The ascent: normalised or at the paper's fixed learning rate, on the decoder or all parameters, at several radii.

    python benchmarks/ascents.py

Uses the built-in facts with their tiny mT5 (trained once), or `--model`, `--candidates`, `--queries` as in
`recipes/ftrace.py`. The column `self` is the measure of tuning, which needs no labels: self-retrieval x share of
distinct candidates. `*` is the setting that tuning chooses.
"""

import argparse
from dataclasses import replace

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.data import builtin_facts, load_rows
from hf_forward_inf.evaluation.cost import measure
from hf_forward_inf.evaluation.fact_tracing import draw_task, with_answered, with_proponents
from hf_forward_inf.toys.tiny_models import tiny_mt5
from hf_forward_inf.utils.loading import load_model

RADII = (0.1, 0.3, 1.0, 3.0, 10.0)
FIXED = [(0.1, 1), (1.0, 1), (0.1, 3)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--candidates")
    parser.add_argument("--queries")
    parser.add_argument("--num_candidates", type=int)
    parser.add_argument("--num_queries", type=int, default=60)
    given = parser.parse_args()
    if given.model:
        sentences, queries = load_rows(given.candidates, "abstracts"), load_rows(given.queries, "queries")
        model, tokenizer = load_model(given.model)
    else:
        sentences, queries = (builtin_facts()[name] for name in ("abstracts", "queries"))
        model, tokenizer = tiny_mt5(sentences)
        given.num_candidates = given.num_candidates or 1200
    tracer = ForwardInf(model, tokenizer, ascent=AscentConfig(direction="gradient"))
    queries = with_answered(tracer.adapter, with_proponents(queries, sentences))
    task = draw_task(queries, sentences, num_queries=given.num_queries, num_candidates=given.num_candidates)
    assert task.proponents is not None
    ascents = {f"radius {r:g}, decoder": AscentConfig(direction="gradient", radius=r) for r in RADII}
    ascents |= {"radius 1 in K = 3 steps, decoder": AscentConfig(direction="gradient", radius=1.0, steps=3)}
    ascents |= {f"radius {r:g}, all": AscentConfig(direction="gradient", radius=r, modules=["all"]) for r in RADII}
    ascents |= {f"rate {a:g}, K = {k}, all": AscentConfig(learning_rate=a, steps=k, modules=["all"]) for a, k in FIXED}
    tuned = tracer.tune(task.candidates, [replace(tracer.ascent, radius=radius) for radius in RADII])
    trials = tuned.tuning.trials if tuned.tuning else []
    own = {trial["radius"]: trial["self_mrr"] * trial["distinct"] for trial in trials}
    print("| step | MRR (s.e.) | recall@10 | self |\n| --- | --- | --- | --- |", flush=True)
    for name, ascent in ascents.items():
        row = tracer.with_options(ascent=ascent).trace(task.queries, task.candidates).evaluate(task.proponents)
        seen = f"{own[ascent.radius]:.3f}" if name.endswith("decoder") and ascent.steps == 1 else ""
        print(f"| {name} | {row['mrr']:.3f} ({row['mrr_se']:.3f}) | {row['recall@10']:.3f} | {seen} |", flush=True)
    row = tuned.trace(task.queries, task.candidates).evaluate(task.proponents)
    print(f"| *, decoder | {row['mrr']:.3f} ({row['mrr_se']:.3f}) | {row['recall@10']:.3f} | |\n\n{tuned.tuning}")
    for part, modules in {"decoder": None, "all": ["all"]}.items():
        cost = measure(tracer.with_options(ascent=AscentConfig(modules=modules)), task.queries, task.candidates)
        print(
            f"A query, {part}: {cost['forward_passes_per_query']:.2f} passes; memory {cost['peak_memory_ratio']:.2f}"
        )


if __name__ == "__main__":
    main()
