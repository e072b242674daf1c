"""Fact tracing (the paper's section 5.2): which sentences taught an mT5 the facts that it states?

    accelerate launch recipes/ftrace.py
    accelerate launch recipes/ftrace.py --model google/mt5-base --num_candidates 15000 --candidates ekinakyurek/ftrace
        --queries ekinakyurek/ftrace

With no option it traces the built-in facts with a tiny mT5 that it trains once. `--help` lists all options; they are
those of `hf-forward-inf trace`.
"""

import sys

from hf_forward_inf import AscentConfig
from hf_forward_inf.cli import run_command
from hf_forward_inf.commands.options import TraceOptions
from hf_forward_inf.commands.trace import trace_run

if __name__ == "__main__":
    sys.exit(run_command(trace_run, TraceOptions, AscentConfig))
