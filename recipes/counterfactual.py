"""Does the answer go away if the found examples are taken out of the training data?

    python recipes/counterfactual.py
    python recipes/counterfactual.py --network conv --share 0.05
    python recipes/counterfactual.py --task facts

With no option: the digits and network of `recipes/lds.py`, whose retraining it shares. For each of 40 answers the 2%
of the training examples that an attributor ranks first are taken away and the network is trained again, with 3 seeds:
how much does the answer's loss rise, how often is another answer given? Random examples are the yardstick.
`--task facts` explains 24 answers of a tiny mT5: 24 trainings of five seconds for each attributor. What is trained is
kept: an interrupted run goes on where it was. `--help` lists all options.
"""

import sys

from experiments.counterfactual import CounterfactualOptions, counterfactual_run

from hf_forward_inf.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command(counterfactual_run, CounterfactualOptions))
