"""From queries to perturbed models: which parameters move, in which direction, a block of queries at a time."""

from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset

from hf_forward_inf.adapters.base import Adapter, Rows
from hf_forward_inf.adapters.contrast import encoded_adapter
from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.ascent.parameters import (
    TOKENS,
    bytes_of_change,
    copies_in_memory,
    is_low_rank,
    names_for,
    warn_of_full_steps,
)
from hf_forward_inf.ascent.steps import Direction, Perturbation
from hf_forward_inf.curvature.directions import direction_for
from hf_forward_inf.curvature.sample import Sample
from hf_forward_inf.curvature.trust import ROWS, TrustRegion
from hf_forward_inf.utils.fingerprints import fingerprint


class Perturber:
    """Perturbs a model for one query after another.

    The direction is prepared here, so that what is fitted once for all queries is fitted once.

    Args:
        adapter (`Adapter`): Knows the model.
        ascent (`AscentConfig`): Parameters, direction and length; completed ([`AscentConfig.completed`]).
        training (`datasets.Dataset`, *optional*): What the model was trained on: only directions that are corrected by
            curvature read it, and trust.
        cache_dir (`Path`, *optional*): As in [`ForwardInf`].

    Raises:
        ValueError: If `ascent.modules` names nothing, or the direction or `ascent.trust` needs training data and there
            is none.
    """

    def __init__(
        self, adapter: Adapter, ascent: AscentConfig, training: Dataset | None = None, cache_dir: Path | None = None
    ):
        self.adapter, self.ascent = adapter, ascent
        self.names = names_for(adapter, ascent)
        if is_low_rank(adapter, ascent):
            warn_of_full_steps(adapter.model, self.names)
        self.direction: Direction | None = direction_for(ascent, adapter, training, self.names, cache_dir)
        self.length = None if ascent.trust is None else self._trust_region(training, cache_dir)

    def _trust_region(self, training: Dataset | None, cache_dir: Path | None) -> TrustRegion:
        assert self.ascent.trust is not None
        if training is None:
            raise ValueError("trust is measured on training data: give ForwardInf(..., training=...), or a radius.")
        sample = Sample(self.adapter, training, ROWS, self.ascent.seed, cache_dir)
        return TrustRegion(sample, self.names, self.ascent.trust)

    @property
    def block_size(self) -> int:
        """How many perturbed models are held in memory at once, for queries of ordinary length."""
        return self._block_size(TOKENS)

    def _block_size(self, tokens: int) -> int:
        """Return how many models fit into a tenth of the model, or 64 MB; for `"pcg"` with all shared products."""
        rank = tokens * self.ascent.steps if is_low_rank(self.adapter, self.ascent) else None
        copies = 1 + 2 * (self.ascent.iterations or 0) if self.shares else 1
        return copies_in_memory(self.adapter.model, copies * bytes_of_change(self.adapter.model, self.names, rank))

    def perturbation(self, queries: Rows) -> Perturbation:
        """Return the models theta_K of some encoded queries, computed when first used."""
        return Perturbation(self.adapter, queries, self.names, self.ascent, self.direction, self.length)

    @property
    def shares(self) -> bool:
        """Whether theta_K of a query depends on the queries of its block: `"pcg"` gives them a common Krylov space."""
        return self.ascent.direction == "pcg"

    def keys(self, queries: Rows) -> list[str]:
        """Return a fingerprint of each query's model, where possible the same in every block."""
        count = len(queries["terms"])
        if self.shares:
            together = self.perturbation(queries).fingerprint
            return [fingerprint(together, i) for i in range(count)]
        alone = ({name: values[i : i + 1] for name, values in queries.items()} for i in range(count))
        return [self.perturbation(query).fingerprint for query in alone]

    def blocks(self, queries: Dataset) -> Iterator[tuple[slice, Perturbation]]:
        """Perturb the model for all encoded queries: yield the rows of each block and their models."""
        adapter = encoded_adapter(self.adapter, queries.column_names)
        longest = int(adapter.lengths(queries.with_format(None)).sum(1).max()) if len(queries) else 0
        size = self._block_size(max(TOKENS, longest))
        for start in range(0, len(queries), size):
            rows = slice(start, min(start + size, len(queries)))
            yield rows, self.perturbation(queries[rows])
