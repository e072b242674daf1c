"""The registry of attributors: every method by name, and how it is made to explain the same model as a tracer."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from typing_extensions import Self

from hf_forward_inf.adapters import Adapter
from hf_forward_inf.ascent.config import AscentConfig
from hf_forward_inf.ascent.parameters import perturbed_names
from hf_forward_inf.attribution import Attributor
from hf_forward_inf.baselines.base import Baseline
from hf_forward_inf.baselines.bm25 import BM25
from hf_forward_inf.baselines.denoiser_features import DenoiserFeatures
from hf_forward_inf.baselines.ensembles import Fusion
from hf_forward_inf.baselines.first_order import FirstOrder
from hf_forward_inf.baselines.influence_functions import InfluenceFunctions
from hf_forward_inf.baselines.pixels import PixelDistance
from hf_forward_inf.baselines.random import Random
from hf_forward_inf.baselines.representation import RepresentationSimilarity
from hf_forward_inf.baselines.tracin import TracIn
from hf_forward_inf.baselines.trackstar import TrackStar


class Tracer(Attributor, Protocol):
    """[`ForwardInf`], as far as other attributors are made like it."""

    adapter: Adapter
    ascent: AscentConfig
    cache_dir: Path | None

    def with_options(self, **options: Any) -> Self:
        """Return the same with other options."""
        ...


Factory: TypeAlias = Callable[[Any], Attributor]
"""Makes an attributor for a [`Tracer`]'s model."""


@dataclass(frozen=True)
class Entry:
    """A registered attributor.

    Args:
        make (`Callable[[Tracer], Attributor]`): Makes it for a tracer's model.
        misfit (`Callable[[Adapter], str | None]`): Returns why it can't trace an adapter's model, `None` if it can.
    """

    make: Factory
    misfit: Callable[[Adapter], str | None] = Baseline.misfit

    @classmethod
    def of(cls, kind: type[Baseline], seeded: bool = False, **options: Any) -> "Entry":
        """Return the entry of a baseline with fixed options; `seeded` if it takes the tracer's seed."""

        def make(tracer: Tracer) -> Attributor:
            seed = {"seed": tracer.ascent.seed} if seeded else {}
            return kind(adapter=tracer.adapter, cache_dir=tracer.cache_dir, **seed, **options)  # type: ignore[call-arg]

        return cls(make, kind.misfit)


def _along_the_gradient(tracer: Tracer) -> Attributor:
    # The default radius, not the tracer's: the best length of a corrected step is not that of the gradient.
    ascent = AscentConfig(direction="gradient", modules=tracer.ascent.modules, seed=tracer.ascent.seed)
    return tracer.with_options(ascent=ascent, strategy="full", screen=None, keep=None)


def _first_order(tracer: Tracer) -> Attributor:
    names = perturbed_names(tracer.adapter, tracer.ascent.modules)
    return FirstOrder(adapter=tracer.adapter, cache_dir=tracer.cache_dir, ascent=tracer.ascent, modules=names)


def _influence_cosine(tracer: Tracer) -> Attributor:
    names = perturbed_names(tracer.adapter, tracer.ascent.modules)
    entry = Entry.of(InfluenceFunctions, seeded=True, similarity="cosine", modules=names)
    return entry.make(tracer)


def _fused(tracer: Tracer) -> Attributor:
    return Fusion([BM25(adapter=tracer.adapter), tracer])


def _similar(tracer: Tracer) -> Attributor:
    states = RepresentationSimilarity(adapter=tracer.adapter, cache_dir=tracer.cache_dir, whitened=True)
    return Fusion([BM25(adapter=tracer.adapter), states])


def _neither_words_nor_states(adapter: Adapter) -> str | None:
    return BM25.misfit(adapter) or RepresentationSimilarity.misfit(adapter)


ATTRIBUTORS: dict[str, Entry] = {
    "forward_inf": Entry(lambda tracer: tracer),
    "forward_inf_gradient": Entry(_along_the_gradient),
    "first_order": Entry(_first_order),
    "tracin": Entry.of(TracIn),
    "tracin_cosine": Entry.of(TracIn, similarity="cosine"),
    "trackstar": Entry.of(TrackStar, seeded=True),
    "influence_functions": Entry.of(InfluenceFunctions, seeded=True),
    "influence_functions_cosine": Entry(_influence_cosine),
    "influence_functions_lissa": Entry.of(InfluenceFunctions, seeded=True, solver="lissa"),
    "representation": Entry.of(RepresentationSimilarity),
    "denoiser_features": Entry.of(DenoiserFeatures),
    "pixel_distance": Entry.of(PixelDistance),
    "bm25": Entry.of(BM25),
    "bm25_without_answer": Entry.of(BM25, with_answer=False),
    "bm25+representation": Entry(_similar, _neither_words_nor_states),
    "bm25+forward_inf": Entry(_fused, BM25.misfit),
    "random": Entry.of(Random, seeded=True),
}
"""Every attributor by name; add an [`Entry`] to have a method of your own in comparisons."""

DEFAULT_SET = (
    "forward_inf", "forward_inf_gradient", "tracin", "tracin_cosine", "trackstar", "influence_functions_cosine",
    "representation", "denoiser_features", "pixel_distance", "bm25", "bm25_without_answer", "bm25+forward_inf",
)  # fmt: skip
"""Attributors that a comparison runs by default, as far as they fit the model."""


def attributors_for(tracer: Tracer, names: Iterable[str] = DEFAULT_SET) -> dict[str, Attributor]:
    """Return attributors that explain a tracer's model, by name.

    Args:
        tracer (`ForwardInf`): Its adapter, cache, seed and perturbed modules are used.
        names (`Iterable[str]`, *optional*): Names in [`ATTRIBUTORS`]. Defaults to [`DEFAULT_SET`].

    Returns:
        `dict[str, Attributor]`: In the order of `names`, without those that can't trace this kind of model.

    Raises:
        ValueError: If a name is not registered.

    Example:
        >>> for name, attributor in attributors_for(ForwardInf(model, tokenizer)).items():
        ...     print(name, attributor.trace(queries, candidates).evaluate(proponents)["mrr"])
    """
    entries = {name: _entry(name) for name in names}
    return {name: one.make(tracer) for name, one in entries.items() if one.misfit(tracer.adapter) is None}


def _entry(name: str) -> Entry:
    if name not in ATTRIBUTORS:
        raise ValueError(f"There is no attributor {name!r}. Known are {', '.join(ATTRIBUTORS)}.")
    return ATTRIBUTORS[name]
