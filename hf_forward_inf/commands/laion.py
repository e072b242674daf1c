"""The run of `laion`: pictures that a pipeline drew, traced over a stream of captioned pictures."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset, load_from_disk

from hf_forward_inf.adapters import DiffusionAdapter
from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.commands.options import LaionOptions
from hf_forward_inf.commands.outputs import Run
from hf_forward_inf.data import load_captioned
from hf_forward_inf.data.digits import captioned_digits
from hf_forward_inf.forward_inf import ForwardInf
from hf_forward_inf.report import SHOWN
from hf_forward_inf.toys.drawings import CAPTION, Teaching, as_queries, tiny_drawer
from hf_forward_inf.tracing.streaming import first_chunk
from hf_forward_inf.utils.fingerprints import fingerprint, fingerprint_of_model
from hf_forward_inf.utils.images import read_image
from hf_forward_inf.utils.loading import load_diffusion
from hf_forward_inf.utils.processes import process_state, say
from hf_forward_inf.utils.rows import sample_rows
from hf_forward_inf.utils.storage import write_folder

UNFINISHED = "unfinished"
"""Folder in the output folder with what an unfinished run has drawn and found so far."""


DIGITS = ("a bold handwritten three", "a thin handwritten zero, leaning right", "a handwritten seven")
"""Default captions for the tiny model."""


def laion_run(options: LaionOptions, ascent: AscentConfig) -> dict[str, Any]:
    """Trace drawings over a stream, and write `metrics.json`, `attribution/` and `report.html` into the output folder.

    With 3 or more queries, the references included, scores are standardised over them: the losses of some candidates
    change whatever a picture shows. A reference costs as much as a query.

    Drawings, and the best candidates after each chunk, are in the output folder until the run is finished: the same
    call resumes.

    Raises:
        FileExistsError: If the folder holds a finished run and `overwrite` is not set.
        OSError: If the folder can't be written to. Both before anything is computed.
        ValueError: If the pipeline draws without captions, or the folder holds what another run has found so far.
    """
    run = Run(options)
    adapter, stream = _source(options, options.seed)
    if CAPTION not in adapter.columns:
        raise ValueError(
            f"{type(adapter.pipe).__name__} draws without captions: give a text-to-image pipeline as --model."
        )
    first = first_chunk(stream, options.chunk_size)
    asked = options.prompt or ([""] if options.images else list(DIGITS))
    queries = _queries(
        adapter, asked, _others(first, asked, options.num_references, options.seed), options, options.seed
    )
    tracer = ForwardInf(adapter=adapter, ascent=ascent)
    if tracer.ascent.sample is not None:
        tracer.training = sample_rows(first, tracer.ascent.sample, options.seed)
    say(f"Tracing {len(asked)} drawings, and {len(queries) - len(asked)} drawings of other captions ...")
    found = tracer.trace_stream(
        queries, stream, top_k=options.top_k, chunk_size=options.chunk_size, standardise=len(queries) >= 3,
        folder=run.folder / UNFINISHED,
    )  # fmt: skip
    found = found.select(range(len(asked))).compact()
    streamed, unscored = found.config["streamed"], found.config["unscored"]
    say(f"{streamed:,} candidates traced, {unscored:,} of them without a score.")
    metrics = {
        "queries": len(asked),
        "candidates": streamed,
        "unscored": unscored,
    }
    found = tracer.explain(found, SHOWN) if options.heatmaps else found
    written = run.write(found, metrics, tracer)
    if process_state().is_main_process:
        shutil.rmtree(run.folder / UNFINISHED)
    return {**written, "answers": run.answer(found)}


def _source(options: LaionOptions, seed: int) -> tuple[DiffusionAdapter, IterableDataset]:
    """Load what draws, or train it, and open the stream."""
    if options.model is None or options.candidates is None:
        say("A tiny model learns to draw handwritten digits; --model, --candidates for yours.")
        digits = captioned_digits()
        adapter = tiny_drawer(digits, digits, Teaching(), 8, options.timesteps, seed)
        return adapter, digits.to_iterable_dataset()
    stream = load_captioned(
        options.candidates, image_column=options.image_column, caption_column=options.caption_column, streaming=True
    )
    assert isinstance(stream, IterableDataset)
    say(f"Tracing what {options.model} draws over {options.candidates}.")
    return DiffusionAdapter(load_diffusion(options.model), timesteps=options.timesteps, seed=seed), stream


def _others(first: Dataset, asked: list[str], count: int, seed: int) -> list[str]:
    """Draw captions of candidates that nobody asked for, each once."""
    captions = dict.fromkeys(caption for caption in first[CAPTION][:] if caption and caption not in asked)
    return np.random.default_rng(seed).permutation(list(captions))[:count].tolist()


def _queries(
    adapter: DiffusionAdapter, asked: list[str], others: list[str], options: LaionOptions, seed: int
) -> Dataset:
    """Return drawings of all captions, those asked for first; an interrupted run reads what it has drawn."""
    given = [read_image(path) for path in options.images]
    key = fingerprint(
        fingerprint_of_model(adapter.model), adapter.cache_key, asked, others, options.num_images, seed,
        [image.tobytes() for image in given],
    )  # fmt: skip
    folder = Path(options.output) / UNFINISHED / f"drawn-{key}"
    with process_state().main_process_first():
        if not folder.exists():
            write_folder(folder, _drawn(adapter, asked, others, given, options.num_images, seed).save_to_disk)
        return load_from_disk(str(folder))


def _drawn(
    adapter: DiffusionAdapter, asked: list[str], others: list[str], given: list[Any], num_images: int, seed: int
) -> Dataset:
    captions = others if given else [*asked, *others]
    say(f"Drawing {len(captions)} captions, {num_images} times each ...")
    pictures = adapter.answer({CAPTION: captions}, num_images=num_images, seed=seed)
    return as_queries([*asked, *others], [given, *pictures] if given else pictures)
