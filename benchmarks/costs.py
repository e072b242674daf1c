"""Cost of a trace by number of queries, in plain forward passes over the same candidates.

    python benchmarks/costs.py

Uses the built-in facts with their tiny mT5 (trained once), or `--model`, `--candidates`, `--queries` as in
`recipes/ftrace.py`. The cache is off: base losses and everything that a method fits first are included. Times are
single runs, except for the plain pass (median of three), so that small differences mean nothing.
"""

import argparse

from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.baselines import TracIn, attributors_for
from hf_forward_inf.data import builtin_facts, load_rows
from hf_forward_inf.evaluation.cost import plain_pass, timed
from hf_forward_inf.toys.tiny_models import tiny_mt5
from hf_forward_inf.utils.fingerprints import uncached
from hf_forward_inf.utils.processes import progress_bars
from hf_forward_inf.utils.rows import sample_rows

QUERIES = (1, 10, 100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--candidates")
    parser.add_argument("--queries")
    parser.add_argument("--num_candidates", type=int, default=1200)
    parser.add_argument("--only", nargs="*", help="Methods to run, by their names in the table.")
    options = parser.parse_args()
    if options.model:
        model = AutoModelForSeq2SeqLM.from_pretrained(options.model).eval()
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        candidates, queries = load_rows(options.candidates, "abstracts"), load_rows(options.queries, "queries")
    else:
        corpus = builtin_facts()
        model, tokenizer = tiny_mt5(corpus["abstracts"])
        candidates, queries = corpus["abstracts"], corpus["queries"]
    candidates = sample_rows(candidates, options.num_candidates)
    tracer = ForwardInf(model, tokenizer)
    plain = tracer.with_options(ascent=AscentConfig(direction="gradient"))
    everything = tracer.with_options(ascent=AscentConfig(direction="gradient", modules=["all"]))
    baselines = attributors_for(tracer, ("tracin", "trackstar", "influence_functions"))
    methods = {
        "Forward-INF": tracer,
        "Forward-INF (decoder, gradient)": plain,
        "Forward-INF (all parameters, gradient)": everything,
        "TracIn": baselines["tracin"],
        "TracIn (decoder)": TracIn(model, tokenizer, modules=["decoder"]),
        "TrackStar": baselines["trackstar"],
        "influence functions (cg)": baselines["influence_functions"],
    }
    seconds_plain, _ = plain_pass(tracer, candidates)
    counts = [count for count in QUERIES if count <= len(queries)]
    print(f"| passes for ... queries | {' | '.join(map(str, counts))} |\n|{' --- |' * (len(counts) + 1)}", flush=True)
    for name, method in methods.items():
        if options.only and name not in options.only:
            continue
        cells = []
        for count in counts:
            rows = queries.select(range(count))
            with uncached(), progress_bars(False):
                seconds, _ = timed(lambda method=method, rows=rows: method.trace(rows, candidates))
            cells.append(f"{seconds / seconds_plain:.1f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
