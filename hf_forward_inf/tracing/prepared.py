"""Perturbed models of all queries, computed once: for streams and clusters, which pass over candidates in parts."""

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_forward_inf.adapters.base import Adapter
from hf_forward_inf.algorithm import Blocks, Scorer
from hf_forward_inf.ascent.low_rank import LowRank
from hf_forward_inf.ascent.parameters import Parameters
from hf_forward_inf.ascent.steps import PerturbedModels
from hf_forward_inf.passes.encoding import encode
from hf_forward_inf.utils.models import evaluating, is_sharded
from hf_forward_inf.utils.processes import process_state
from hf_forward_inf.utils.storage import Tensors, written

WHOLE = "whole"
"""The part of a perturbed parameter that is all of it; low-rank changes have several."""


class StoredModels:
    """The perturbed models of a block of queries in a safetensors file ([`PerturbedModels`]), read when first used.

    Args:
        file (`Path`): Written by [`prepare`].
        adapter (`Adapter`): Knows the model.
    """

    def __init__(self, file: Path, adapter: Adapter):
        self.file, self.adapter = file, adapter
        with safe_open(file, "pt") as opened:
            about = json.loads(opened.metadata()["about"])
        self.fingerprint: str = about["fingerprint"]
        self.rows = slice(*about["rows"])
        self.moved: list[bool] = about["moved"]

    def __len__(self) -> int:
        return len(self.moved)

    @cached_property
    def thetas(self) -> list[Parameters | None]:
        """theta_K of each query, `None` where its gradient is zero or not finite."""
        places = {name: p.device for name, p in self.adapter.model.named_parameters()}
        parts: dict[tuple[int, str], Tensors] = {}
        for key, value in load_file(self.file).items():
            query, name, part = key.split("/")
            parts.setdefault((int(query), name), {})[part] = value.to(places[name])
        found: list[Parameters | None] = [{} if moved else None for moved in self.moved]
        for (place, name), tensors in parts.items():
            theta = found[place]
            assert theta is not None
            theta[name] = tensors[WHOLE] if WHOLE in tensors else LowRank(**tensors)
        return found


def prepare(tracer: Scorer, queries: Dataset, folder: Path, in_memory: bool = False) -> Blocks:
    """Perturb the model for all queries, and return the blocks of perturbed models.

    Args:
        tracer (`Scorer`): With training data, if its direction needs any.
        queries (`datasets.Dataset`): Outputs to explain.
        folder (`Path`): Where the models are written, by the main process.
        in_memory (`bool`, defaults to `False`): Whether the models of a single block stay in memory instead.
    """
    encoded = encode(tracer.adapter, queries, "queries", tracer.cache_dir)
    with evaluating(tracer.adapter.model):
        blocks = list(tracer.perturber(queries if tracer.training is None else tracer.training).blocks(encoded))
    if len(blocks) == 1 and in_memory:
        return lambda: iter(blocks)
    for number, (rows, models) in enumerate(blocks):
        file = folder / f"{number:05}.safetensors"
        with evaluating(tracer.adapter.model):
            thetas = models.thetas if is_sharded(tracer.adapter.model) else None  # all processes run such a model
            with process_state().main_process_first():
                if not file.exists():
                    _write(file, rows, models)
        del thetas
        vars(models).pop("thetas", None)
    return load(folder, tracer.adapter)


def load(folder: Path, adapter: Adapter) -> Blocks:
    """Return the blocks that [`prepare`] has written: all are read again in every pass, one at a time.

    Raises:
        FileNotFoundError: If there are none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"There are no perturbed models in {folder}.")

    def blocks() -> Iterator[tuple[slice, PerturbedModels]]:
        for file in files:
            models = StoredModels(file, adapter)
            yield models.rows, models

    return blocks


def _write(file: Path, rows: slice, models: PerturbedModels) -> None:
    tensors: Tensors = {}
    for query, theta in enumerate(models.thetas):
        for name, value in (theta or {}).items():
            parts: Tensors = vars(value) if isinstance(value, LowRank) else {WHOLE: value}
            tensors |= {f"{query}/{name}/{part}": tensor.contiguous().cpu() for part, tensor in parts.items()}
    moved = [theta is not None for theta in models.thetas]
    about = {"fingerprint": models.fingerprint, "rows": [rows.start, rows.stop], "moved": moved}
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with written(file, needed) as part:
        save_file(tensors, part, metadata={"about": json.dumps(about)})
