"""What a tiny denoiser's training pictures did: it is trained again on random halves, and without some of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from hf_forward_inf.adapters import DiffusionAdapter
from hf_forward_inf.scores.retraining import Retrained, random_subsets, retrained_outcomes, without_best
from hf_forward_inf.toys.denoisers import StackedDenoisers
from hf_forward_inf.toys.drawings import CAPTION, IMAGE, Drawing, as_queries, drawings
from hf_forward_inf.toys.pixel_mlp import PixelMLP
from hf_forward_inf.toys.pixel_pipeline import pipeline_of, unet_of
from hf_forward_inf.utils.images import read_image
from hf_forward_inf.utils.processes import process_state

NETWORKS = {"perceptron": PixelMLP, "unet": unet_of}
"""Denoisers by name: called with size, channels and width."""
TOGETHER = {"cpu": 20, "cuda": 128}
"""Denoisers trained in a batch, by the kind of device."""


@dataclass(frozen=True)
class DenoiserTruth:
    """A denoiser's pictures, queries to explain, and what retraining does to the queries' losses.

    Half of the queries are pictures that the denoiser was not trained on, half are drawings by it, each of another
    caption.

    Args:
        rows (`datasets.Dataset`): Pictures with captions, more than are trained on.
        size (`int`): Height and width of pictures in pixels.
        num_candidates (`int`): Pictures that are trained on.
        num_queries (`int`): Queries that are evaluated; as many others serve to choose settings.
        network (`str`, defaults to `"perceptron"`): Kind of denoiser, of [`NETWORKS`].
        width (`int`, defaults to 128): Features of a perceptron's hidden layers, or channels of a UNet at full size.
        steps (`int`, defaults to 500): Training steps.
        timesteps (`int`, defaults to 64): Timesteps of a query's loss after retraining.
        traced_at (`int`, defaults to 8): Timesteps of the losses of the explained models.
        queries_at (`int`, *optional*): Timesteps of a query's loss there. Defaults to four times as many.
        seed (`int`, defaults to 0): Seed of the choice of pictures, and of the subsets.
    """

    rows: Dataset
    size: int
    num_candidates: int
    num_queries: int
    network: str = "perceptron"
    width: int = 128
    steps: int = 500
    timesteps: int = 64
    traced_at: int = 8
    queries_at: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        need = self.num_candidates + 2 * self.num_queries
        if len(self.rows) < need:
            raise ValueError(f"Candidates and queries need {need} pictures; there are {len(self.rows)}.")

    @cached_property
    def candidates(self) -> Dataset:
        """The pictures that are trained on."""
        return self.rows.select(self._order[: self.num_candidates])

    @cached_property
    def _order(self) -> np.ndarray:
        return np.random.default_rng(self.seed).permutation(len(self.rows))

    @cached_property
    def _all_queries(self) -> Dataset:
        """Unseen pictures and drawings in turns."""
        asked = self.rows.select(self._order[self.num_candidates :][: 2 * self.num_queries])
        captions, pictures = asked[CAPTION][:], asked[IMAGE][:]
        unseen = as_queries(captions[::2], [[picture] for picture in pictures[::2]])
        (first,) = self.explained(1)
        drawn = drawings(first, captions[1::2], Drawing(num_images=1))
        both = concatenate_datasets([unseen, drawn])
        return both.select(np.arange(len(both)).reshape(2, -1).T.flatten()).flatten_indices()

    @property
    def queries(self) -> Dataset:
        """The queries that are evaluated, `2i` unseen pictures and `2i + 1` drawings."""
        return self._all_queries.select(range(self.num_queries))

    @property
    def others(self) -> Dataset:
        """As many other queries, to choose settings by."""
        return self._all_queries.select(range(self.num_queries, 2 * self.num_queries))

    def explained(self, models: int) -> list[DiffusionAdapter]:
        """Return the adapters of denoisers that are trained on all candidates, each with another seed."""
        return self._training(self.candidates).explained(range(models))

    def halves(self, subsets: int, seeds: int) -> tuple[Retrained, Retrained, np.ndarray]:
        """Train on random halves, or read the cached losses.

        Returns:
            `tuple`: Losses of the queries and of the others, means over seeds; and the losses of the queries with each
            seed, `[seeds, subsets, queries]`.
        """
        halves = random_subsets(len(self.candidates), subsets, seed=self.seed)
        losses = self._losses(self._all_queries, halves, seeds)
        count, mean = self.num_queries, losses.mean(0)
        return (
            Retrained(self.queries, halves, mean[:, :count]),
            Retrained(self.others, halves, mean[:, count:]),
            losses[..., :count],
        )

    def rises(self, scores: Mapping[str, np.ndarray], count: int, seeds: int) -> dict[str, np.ndarray]:
        """Train without the best pictures of some queries, and return the relative rise of their losses, `[queries]`.

        Args:
            scores (`dict[str, np.ndarray]`): Scores of the first queries by each method, `[queries, candidates]`.
            count (`int`): Pictures that are removed for each.
            seeds (`int`): Trainings without them and with all pictures, averaged.
        """
        asked = len(next(iter(scores.values())))
        some = self.queries.select(range(asked))
        everyone = np.ones((1, len(self.candidates)), dtype=bool)
        kept = np.concatenate([everyone, *(without_best(one, count) for one in scores.values())])
        whole, *without = self._losses(some, kept, seeds).mean(0)
        own = np.reshape(without, (len(scores), asked, asked)).diagonal(axis1=1, axis2=2)
        return {name: losses / whole - 1 for name, losses in zip(scores, own, strict=True)}

    def _losses(self, queries: Dataset, subsets: np.ndarray, seeds: int) -> np.ndarray:
        training = self._training(queries)
        together = TOGETHER.get(process_state().device.type, TOGETHER["cpu"])
        return retrained_outcomes(training, subsets, key=training.key, seeds=seeds, together=together)

    @cached_property
    def _blank(self) -> DiffusionAdapter:
        pipe = pipeline_of(self._untrained, self.rows[CAPTION][:], self.seed).to(process_state().device)
        return DiffusionAdapter(pipe, timesteps=self.traced_at, query_timesteps=self.queries_at, seed=self.seed)

    @cached_property
    def _untrained(self) -> partial[Any]:
        channels = 1 if read_image(self.rows[0][IMAGE]).mode in ("L", "1") else 3
        return partial(NETWORKS[self.network], self.size, channels, self.width)

    def _training(self, queries: Dataset) -> StackedDenoisers:
        return StackedDenoisers(
            self._blank, self._untrained, self.candidates, queries, steps=self.steps, timesteps=self.timesteps
        )
