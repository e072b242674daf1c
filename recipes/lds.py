"""The linear datamodeling score: who foretells what training without half of the data does?

    python recipes/lds.py
    python recipes/lds.py --network conv

With no option: scikit-learn's digits and a network of 1,810 parameters, trained again on 120 random halves of 800
examples with 3 seeds. Every direction of Forward-INF is judged by it, first order along the same directions, means
over seeds, and every baseline. What is trained is kept: an interrupted run goes on where it was. `--help` lists all
options.
"""

import sys

from experiments.lds import LdsOptions, lds_run

from hf_forward_inf.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command(lds_run, LdsOptions))
