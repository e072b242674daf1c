"""Which of millions of captioned pictures drew this? They are streamed: nothing but the best of them stays on disk.

    accelerate launch recipes/laion.py
    accelerate launch recipes/laion.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --candidates laion-shards
        --prompt "a red bicycle in the snow"
    accelerate launch recipes/laion.py --model my-pipeline --candidates "shards/*.tar" --prompt "a cat" --images a.png

With no option a tiny model learns to draw handwritten digits first. An interrupted run goes on when it is started
again. `--help` lists all options; they are those of `hf-forward-inf laion`.
"""

import sys

from hf_forward_inf import AscentConfig
from hf_forward_inf.cli import run_command
from hf_forward_inf.commands.laion import laion_run
from hf_forward_inf.commands.options import LaionOptions

if __name__ == "__main__":
    sys.exit(run_command(laion_run, LaionOptions, AscentConfig))
