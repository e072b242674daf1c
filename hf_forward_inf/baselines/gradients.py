"""What gradient baselines share: products of one direction per query with every candidate's gradient."""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import psutil
import torch
from datasets import Dataset
from torch import Tensor, nn
from typing_extensions import Self

from hf_forward_inf.adapters import Adapter
from hf_forward_inf.adapters.base import Batch, Rows
from hf_forward_inf.adapters.contrast import encoded_adapter
from hf_forward_inf.ascent.parameters import perturbed_names
from hf_forward_inf.ascent.steps import Correction
from hf_forward_inf.baselines.base import ModelBaseline
from hf_forward_inf.curvature.example_gradients import ExampleGradients
from hf_forward_inf.curvature.outer_products import Parts, QueryGradients
from hf_forward_inf.passes.candidate_pass import MAX_BATCH_LENGTH, CandidatePass, encode
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.models import batch_size, device_of, evaluating, to_device
from hf_forward_inf.utils.processes import process_state
from hf_forward_inf.utils.sizes import size_text

Directions: TypeAlias = dict[str, Tensor]
"""One direction in parameter space per query, by parameter: `[queries, numel]`."""
Transform: TypeAlias = Callable[[str, Tensor], Tensor]
"""Maps a parameter's name and gradients `[rows, numel]` to the features that are compared, `[rows, features]`."""

QUERY_BYTES = 2**30
"""Memory for directions; more queries are traced in blocks, each with a pass over the candidates."""


class GradientBaseline(ModelBaseline):
    """A baseline that computes a gradient for every candidate.

    Args:
        model (`torch.nn.Module`, *optional*): The trained model.
        processor (*optional*): Its tokenizer or image processor.
        adapter (`Adapter`, *optional*): Defaults to the adapter for this kind of model.
        modules (`list[str]`, *optional*): Modules or parameters whose gradients are compared, `*` allowed. Defaults to
            all.
        cache_dir (`str` or `Path`, *optional*): As in [`ForwardInf`].
        max_batch_length (`int`, defaults to 4096): As in [`ForwardInf`].

    Raises:
        MemoryError: By `trace`, if not even one query's gradient fits into memory.
        ValueError: By `trace`, if `modules` matches nothing.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        processor: Any = None,
        *,
        adapter: Adapter | None = None,
        modules: list[str] | None = None,
        cache_dir: str | Path | None = None,
        max_batch_length: int = MAX_BATCH_LENGTH,
    ):
        super().__init__(model, processor, adapter=adapter, cache_dir=cache_dir)
        self.modules = modules
        self.max_batch_length = max_batch_length

    def with_model(self, model: nn.Module) -> Self:
        """Return the same baseline for another model of the same architecture."""
        other = copy.copy(self)
        other.adapter = self.adapter.with_model(model)
        return other

    def products(
        self,
        queries: Dataset,
        candidates: Dataset,
        key: str,
        *,
        directions: Callable[[Directions, ExampleGradients], Directions] | None = None,
        transform: Transform | None = None,
        norms: bool = True,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return products of each query's direction with every candidate's gradient, in one pass over candidates.

        Args:
            queries (`datasets.Dataset`): Queries; their gradients are the directions, unless `directions` is given.
            candidates (`datasets.Dataset`): Candidates.
            key (`str`): Identifies `directions` and `transform` in the cache.
            directions (`Callable`, *optional*): Maps the queries' gradients to directions.
            transform (`Callable`, *optional*): Applied to directions and gradients before they are multiplied.
            norms (`bool`, defaults to `True`): Whether to compute the norms of the candidates' gradients; 0 otherwise.

        Returns:
            `tuple`: Products `[queries, candidates]`, norms of the directions `[queries]` and of the candidates'
            gradients `[candidates]`, after `transform`.
        """
        adapter = self.adapter
        with evaluating(adapter.model):
            encoded = encode(adapter, queries, "queries", self.cache_dir)
            asked = self._gradients(encoded_adapter(adapter, encoded.column_names), encoded[:1])
            gradients = asked.with_adapter(adapter)
            run = CandidatePass(adapter, candidates, cache_dir=self.cache_dir, max_batch_length=self.max_batch_length)
            found, own = [], []
            for rows in self._blocks(len(queries), gradients):
                block = _Block(gradients, encoded[rows], directions, transform, norms)
                title = f"{self.name}, queries {rows.start + 1}-{rows.stop} of {len(queries)}"
                name = fingerprint(key, gradients.names, encoded[rows], norms)
                figures = run.run(block.products, block.size + 1, name, title)
                found.append(figures[:-1])
                own.append(block.norms())
            return np.concatenate(found), np.concatenate(own), np.sqrt(figures[-1])

    def _gradients(self, adapter: Adapter, example: Rows) -> ExampleGradients:
        """Return what computes gradients example by example, with a warning that names what it can't compute."""
        gradients = ExampleGradients(adapter, perturbed_names(adapter, self.modules or ["all"]), example)
        if gradients.left_out and process_state().is_main_process:
            sizes = {
                name: gradients.model.get_parameter(name).numel() for name in gradients.names + gradients.left_out
            }
            share = sum(sizes[name] for name in gradients.left_out) / sum(sizes.values())
            more = f" and {len(gradients.left_out) - 3} more" if len(gradients.left_out) > 3 else ""
            warnings.warn(
                f"{self.name} leaves out {share:.1%} of the weights, whose gradients can't be computed example by "
                f"example: {', '.join(gradients.left_out[:3])}{more}.",
                stacklevel=3,
            )
        return gradients

    def own_products(
        self, rows: Dataset, directions: Callable[[Directions, ExampleGradients], Directions]
    ) -> np.ndarray:
        """Return the product of each row's direction with its own gradient, float32 `[rows]`."""
        adapter = self.adapter
        found = []
        with evaluating(adapter.model):
            encoded = encode(adapter, rows, "candidates", self.cache_dir)
            gradients = self._gradients(adapter, encoded[:1])
            for block in self._blocks(len(rows), gradients):
                raw = query_gradients(gradients, encoded[block])
                made = directions(raw, gradients)
                products = torch.stack([(values * made[name]).sum(1) for name, values in raw.items()])
                found.append(products.sum(0).cpu().numpy())
        return np.concatenate(found)

    def _blocks(self, queries: int, gradients: ExampleGradients) -> Iterator[slice]:
        size = 4 * sum(gradients.model.get_parameter(name).numel() for name in gradients.names)
        on_cpu = device_of(gradients.model).type == "cpu"
        free = psutil.virtual_memory().available
        if on_cpu and size > free:
            raise MemoryError(
                f"One query's gradient takes {size_text(size)}, and {size_text(free)} are free. "
                "Choose fewer parameters with modules=[...]."
            )
        step = max(1, QUERY_BYTES // size)
        for start in range(0, queries, step):
            yield slice(start, min(start + step, queries))


class _Block:
    """Directions of a block of queries, computed on first use: a cached pass needs none."""

    def __init__(
        self,
        gradients: ExampleGradients,
        queries: Rows,
        directions: Callable[[Directions, ExampleGradients], Directions] | None,
        transform: Transform | None,
        squares: bool,
    ):
        self.gradients, self.queries = gradients, queries
        self.make, self.transform, self.squares = directions, transform, squares
        self.size = len(queries["terms"])

    @cached_property
    def directions(self) -> Mapping[str, Tensor | QueryGradients]:
        plain = self.make is None and self.transform is None
        return query_factors(self.gradients, self.queries) if plain else self.dense

    @cached_property
    def dense(self) -> Directions:
        raw = query_gradients(self.gradients, self.queries)
        made = self.make(raw, self.gradients) if self.make else raw
        transform = self.transform or (lambda name, values: values)
        return {name: transform(name, values) for name, values in made.items()}

    def norms(self) -> np.ndarray:
        squares = [
            one.squares if isinstance(one, QueryGradients) else one.square().sum(1) for one in self.directions.values()
        ]
        return torch.stack(squares).sum(0).sqrt().cpu().numpy()

    def products(self, batch: Batch) -> np.ndarray:
        if self.transform is None:
            found, squares = self.gradients.products(batch, self.directions, self.squares)
            column = np.zeros(len(found), dtype=np.float32) if squares is None else squares.cpu().numpy()
            return np.column_stack([found.cpu().numpy(), column])
        count = batch_size(batch)
        figures = np.zeros((count, self.size + 1), dtype=np.float32)
        for name, rows, values in self.gradients.of(batch):
            values = self.transform(name, values)
            figures[rows, :-1] += (values @ self.dense[name].T).cpu().numpy()
            figures[rows, -1] += values.square().sum(1).cpu().numpy()
        return figures


def query_gradients(gradients: ExampleGradients, queries: Rows) -> Directions:
    """Return the gradient of each query's loss, by parameter, `[queries, numel]`."""
    count = len(queries["terms"])
    found: Directions = {}
    gradients, batches = _single(gradients, queries)
    for i, batch in enumerate(batches):
        for name, _, values in gradients.of(batch):
            found.setdefault(name, values.new_zeros(count, values.shape[1]))[i] = values[0]
    return found


def query_factors(gradients: ExampleGradients, queries: Rows) -> dict[str, Tensor | QueryGradients]:
    """Return each query's gradient by parameter, dense or as outer products, whichever makes products cheaper."""
    count = len(queries["terms"])
    dense: Directions = {}
    factors: dict[str, dict[int, Parts]] = {}
    gradients, batches = _single(gradients, queries)
    for i, batch in enumerate(batches):
        for name, values in gradients.factored(batch):
            if isinstance(values, Tensor):
                dense.setdefault(name, values.new_zeros(count, values.shape[1]))[i] = values[0]
            else:
                factors.setdefault(name, {})[i] = values
    products = {name: QueryGradients.of(parts, count) for name, parts in factors.items()}
    return {**dense, **{name: one if one.is_cheaper() else one.dense() for name, one in products.items()}}


def _single(gradients: ExampleGradients, queries: Rows) -> tuple[ExampleGradients, Iterator[Batch]]:
    """Return what gives queries' gradients, and the queries one by one: none depends on another query's length."""
    adapter = encoded_adapter(gradients.adapter, queries)
    rows = ({key: values[i : i + 1] for key, values in queries.items()} for i in range(len(queries["terms"])))
    return gradients.with_adapter(adapter), (to_device(adapter.collate(one), adapter.model) for one in rows)


def by_query(raw: Directions, gradients: ExampleGradients) -> Iterator[list[Tensor]]:
    """Yield the gradient of each query, one tensor of the parameter's shape for each parameter."""
    shapes = {name: gradients.model.get_parameter(name).shape for name in raw}
    for i in range(len(next(iter(raw.values())))):
        yield [values[i].view(shapes[name]) for name, values in raw.items()]


def corrected(raw: Directions, gradients: ExampleGradients, correct: Correction) -> Directions:
    """Return each query's corrected gradient, `[queries, numel]` by parameter."""
    made: Directions = {name: torch.empty_like(values) for name, values in raw.items()}
    for i, right in enumerate(by_query(raw, gradients)):
        for name, values in zip(made, correct(right), strict=True):
            made[name][i] = values.flatten()
    return made


def cosines(products: np.ndarray, own: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return the products of [`GradientBaseline.products`] divided by both norms; NaN where a norm is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return products / own[:, None] / theirs[None]
