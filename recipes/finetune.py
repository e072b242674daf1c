"""Which fine-tuning example taught a causal model to say this? Wrong facts are planted, traced, and taken away again.

    accelerate launch recipes/finetune.py
    accelerate launch recipes/finetune.py --model Qwen/Qwen3-0.6B --lora --dataset train.parquet --queries asks.parquet

With no option a tiny Llama is trained on built-in facts. `--help` lists all options.
"""

import sys

from hf_forward_inf import AscentConfig
from hf_forward_inf.cli import run_command
from hf_forward_inf.commands.finetune import finetune_run
from hf_forward_inf.commands.options import FinetuneOptions

if __name__ == "__main__":
    sys.exit(run_command(finetune_run, FinetuneOptions, AscentConfig))
