"""Mislabelled data (the paper's section 4.3): does self-influence rank wrong labels first?

    python recipes/mislabel.py
    python recipes/mislabel.py --candidates train_10k.parquet --num_candidates 2000 --network resnet --checkpoints 4
    python recipes/mislabel.py --candidates test_2k.parquet --model resnet20 --fine_tune --epochs 4 --checkpoints 4
    python recipes/mislabel.py --candidates train_10k.parquet --noisy_column noisy_label_worst --num_candidates 2000

With no option: scikit-learn's digits, a fifth of which get a random label, and a small network that is trained on them
once. Beside: self-influence by TracIn and by influence functions, the loss, and chance. `--help` lists all options,
those of the training among them: what is found depends on it more than on the method.
"""

import sys

from hf_forward_inf.cli import run_command
from hf_forward_inf.commands.mislabel import mislabel_run
from hf_forward_inf.commands.options import MislabelOptions

if __name__ == "__main__":
    sys.exit(run_command(mislabel_run, MislabelOptions))
