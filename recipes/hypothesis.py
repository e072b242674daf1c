"""The paper's hypothesis (Tables 1, 4, 5, 7, Figure 2): does what an example does to a query mirror the reverse?

    python recipes/hypothesis.py
    python recipes/hypothesis.py --candidates train_10k.parquet --group_size 30
    python recipes/hypothesis.py --query_counts 50 100 --ratios 0.2 0.3

With no option: scikit-learn's digits. Every example of a logistic regression is left out in turn, and each query
added; a small convolutional network is trained without each of 30 groups of rising mislabel ratio, and with the
queries added; Forward-INF's scores stand beside. What is trained is kept. `--help` lists all options.
"""

import sys

from experiments.hypothesis import HypothesisOptions, hypothesis_run

from hf_forward_inf.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command(hypothesis_run, HypothesisOptions))
