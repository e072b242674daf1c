"""What drew this? A diffusion model is taught 20 pictures together, draws them, and every drawing is traced.

    accelerate launch recipes/diffusion.py
    accelerate launch recipes/diffusion.py --candidates pictures.parquet --size 32 --width 48 --batch_size 32
    accelerate launch recipes/diffusion.py --alone --finetuning_steps 100 --finetuning_rate 3e-4 --timesteps 4
        --num_candidates 101 1000    # the paper's task: each exemplar taught to a model of its own
    accelerate launch recipes/diffusion.py --change inverted    # drawings that differ from their exemplar
    accelerate launch recipes/diffusion.py --removed 50    # no exemplars: trained again without the best candidates
    accelerate launch recipes/diffusion.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --candidates laion

With no option a tiny model learns to draw handwritten digits first. `--help` lists all options.
"""

import sys

from experiments.diffusion import DiffusionOptions, diffusion_run

from hf_forward_inf import AscentConfig
from hf_forward_inf.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command(diffusion_run, DiffusionOptions, AscentConfig))
