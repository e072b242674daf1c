"""Which of many captioned pictures drew this? They are streamed: nothing but the best of them stays in memory.

    accelerate launch recipes/laion.py
    accelerate launch recipes/laion.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --candidates laion-shards
        --prompt "a red bicycle in the snow"

With no option a tiny model learns to draw handwritten digits first. `hf-forward-inf laion` does the same and more: it
traces pictures that were drawn before, standardises scores by drawings of other captions, and resumes.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

from datasets import IterableDataset

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import DiffusionAdapter
from hf_forward_inf.cli import run_command
from hf_forward_inf.commands.outputs import Run
from hf_forward_inf.data import load_captioned
from hf_forward_inf.data.digits import captioned_digits
from hf_forward_inf.toys.drawings import Drawing, Teaching, drawings, tiny_drawer
from hf_forward_inf.utils.options import RunOptions
from hf_forward_inf.utils.processes import process_state, say


@dataclass
class Options(RunOptions):
    """Which pipeline, captions and pictures, and where the results go.

    Args:
        model (`str`, *optional*): Text-to-image pipeline: hub name or local folder.
        candidates (`str`, *optional*): Captioned pictures: webdataset shards or parquet, a folder, or a hub name.
        prompt (`list[str]`): Captions; each is drawn, and traced.
        num_images (`int`, defaults to 4): Pictures drawn for each caption.
        timesteps (`int`, defaults to 8): Timesteps at which the loss of a picture is taken.
        training_steps (`int`, defaults to 1000): Steps of training a tiny denoiser.
    """

    output: str = "outputs/laion"
    model: str | None = None
    candidates: str | None = None
    prompt: list[str] = field(default_factory=lambda: ["a handwritten seven", "a thin handwritten zero"])
    num_images: int = field(default=4, metadata={"min": 1})
    timesteps: int = field(default=8, metadata={"min": 1})
    training_steps: int = field(default=1000, metadata={"min": 1})

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.model is None) != (self.candidates is None):
            raise ValueError("Give --model and --candidates together: what drew, and what it was trained on.")


def load(options: Options) -> tuple[DiffusionAdapter, IterableDataset]:
    """Load the pipeline and open the stream; without a model, train a tiny one on handwritten digits."""
    if options.model is None or options.candidates is None:
        digits = captioned_digits()
        teaching = Teaching(training_steps=options.training_steps)
        adapter = tiny_drawer(digits, digits, teaching, 8, options.timesteps, options.seed)
        return adapter, digits.to_iterable_dataset()
    from diffusers import DiffusionPipeline

    stream = load_captioned(options.candidates, streaming=True)
    assert isinstance(stream, IterableDataset)
    pipe = DiffusionPipeline.from_pretrained(options.model).to(process_state().device)
    return DiffusionAdapter(pipe, timesteps=options.timesteps, seed=options.seed), stream


def main(options: Options, ascent: AscentConfig) -> dict[str, Any]:
    """Draw, and trace the drawings over the stream."""
    run = Run(options)
    adapter, stream = load(options)

    # A query is a caption with the pictures that the model draws of it.
    say(f"Drawing {len(options.prompt)} captions, {options.num_images} times each ...")
    queries = drawings(adapter, options.prompt, Drawing(options.num_images, options.seed))

    # Candidates are read in chunks; the best top_k of each query are kept. What an interrupted run has found is in a
    # folder, and the same call goes on from there.
    tracer = ForwardInf(adapter=adapter, ascent=ascent)
    found = tracer.trace_stream(queries, stream, top_k=options.top_k, folder=run.folder / "unfinished")
    say(f"{found.config['streamed']:,} candidates traced, {found.config['unscored']:,} of them without a score.")
    for row in found.top(0, 3):
        say(f"{row['score']:10.3g}  {row['caption']}")

    metrics = {"queries": len(queries), "candidates": found.config["streamed"], "unscored": found.config["unscored"]}
    return run.write(found, metrics, tracer)


if __name__ == "__main__":
    sys.exit(run_command(main, Options, AscentConfig, extra="diffusion"))
