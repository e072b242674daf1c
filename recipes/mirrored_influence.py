"""The paper's hypothesis (Tables 1, 4, 5, 7, Figure 2): does what an example does to a query mirror the reverse?

    python recipes/mirrored_influence.py
    python recipes/mirrored_influence.py --candidates train_10k.parquet --group_size 30
    python recipes/mirrored_influence.py --query_counts 50 100 --ratios 0.2 0.3

With no option: scikit-learn's digits. Every example of a logistic regression is left out in turn, and each query is
added; a small convolutional network is trained without each of 30 groups with more and more wrong labels, and with the
queries added; Forward-INF's scores of the groups are compared with both. What is trained is cached. `--help` lists all
options.
"""

import sys
from dataclasses import replace
from typing import Any

from experiments.hypothesis import (
    CAPTION,
    HypothesisOptions,
    correlations,
    draw_images,
    groups_of_examples,
    single_examples,
)

from hf_forward_inf.cli import run_command
from hf_forward_inf.commands.image_task import captioned
from hf_forward_inf.commands.outputs import Run, plotted
from hf_forward_inf.report.image_plots import scatter_plot
from hf_forward_inf.utils.processes import say


def main(options: HypothesisOptions) -> dict[str, Any]:
    """Correlate what examples do to queries with what queries do to examples.

    `noiseless/...`: of single examples of a logistic regression (Table 1). `noisy/...`: of groups, by retraining a
    network. `forward_inf/...` and `forward_inf_cg/...`: Forward-INF's scores of the groups with the influence they
    estimate (Table 7). `queries_50/...` and `mislabelled_0.2/...`: for other numbers of queries and shares of wrong
    labels (Tables 4 and 5).
    """
    run = Run(options)
    rows, inputs, labels = draw_images(options)

    # One example, one query: both influences are exact.
    found, single = single_examples(rows, inputs, labels, options)
    figures = {"noiseless": correlations(single.to_query, single.from_query)}

    # Groups of examples, all queries: by retraining, and by Forward-INF.
    grouped, scores, of_groups = groups_of_examples(rows, inputs, labels, options)
    figures |= of_groups
    variants = {f"queries_{count}": replace(options, group_queries=count) for count in options.query_counts}
    variants |= {f"mislabelled_{ratio:g}": replace(options, mislabelled=ratio) for ratio in options.ratios}
    for variant, changed in variants.items():
        _, _, of_groups = groups_of_examples(rows, inputs, labels, changed)
        figures |= {f"{variant}/{name}": row for name, row in of_groups.items()}

    for name, row in figures.items():
        say(f"{name:28} Pearson {row['pearson']:.4f}  Spearman {row['spearman']:.4f}")
    metrics: dict[str, Any] = {"queries": options.num_queries, "candidates": options.num_candidates}
    metrics |= {f"{name}/{key}": value for name, row in figures.items() for key, value in row.items()}
    panels = {
        "One example, one query": (single.to_query.ravel(), single.from_query.ravel()),
        "Groups, by retraining": (grouped.to_query.mean(0), grouped.from_query.mean(0)),
        "Groups, Forward-INF": (grouped.from_query.mean(0), scores),
    }
    return run.write(
        captioned(found),
        metrics,
        table=figures,
        columns=("pearson", "spearman"),
        plot=plotted(scatter_plot, panels),
        plot_caption=CAPTION,
        title="Does the mirror hold? Leaving one example out, against adding the query",
    )


if __name__ == "__main__":
    sys.exit(run_command(main, HypothesisOptions, bars=False))
