"""Memorisation: test images beside the training images that the model remembers; features under ascent (Figure 8).

    python recipes/memorization.py
    python recipes/memorization.py --model resnet20_cifar10 --candidates train_10k.parquet --queries test_2k.parquet

With no option: scikit-learn's digits and a small network trained on four fifths of them once. `--help` lists all
options.
"""

import sys

from experiments.memorization import MemorizationOptions, memorization_run

from hf_forward_inf.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command(memorization_run, MemorizationOptions))
