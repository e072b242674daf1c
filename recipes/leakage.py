"""Data leakage (the paper's Table 2): training images in the test set; does each find its training copy?

    python recipes/leakage.py
    python recipes/leakage.py --change none shifted recoloured recompressed
    python recipes/leakage.py --model resnet20_cifar10 --candidates train_10k.parquet

With no option: scikit-learn's digits and a small network that is trained on them once. What is scored (a rise of
the loss, or a shift of the prediction), how, and the radius are chosen on a fifth of the leaked images; the others are
judged, beside TracIn, influence functions and representations. `--help` lists all options.
"""

import sys

from hf_forward_inf.cli import run_command
from hf_forward_inf.commands.leakage import leakage_run
from hf_forward_inf.commands.options import LeakageOptions

if __name__ == "__main__":
    sys.exit(run_command(leakage_run, LeakageOptions))
