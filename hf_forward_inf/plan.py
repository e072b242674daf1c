"""The plan of a trace: what is computed, what is taken from the cache, and what that costs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hf_forward_inf.utils.sizes import size_text

DEPTH = 10
"""An audit asks how many of so many best candidates a screen has found."""


@dataclass(frozen=True)
class Part:
    """One of the things that a trace computes.

    Args:
        name (`str`): What it is.
        passes (`float`, defaults to 0.0): Its cost, in plain forward passes over all candidates.
        cached (`bool`, defaults to `False`): Whether it is in the cache, and costs nothing.
        stored (`int`, defaults to 0): Bytes that it takes on disk.
    """

    name: str
    passes: float = 0.0
    cached: bool = False
    stored: int = 0


@dataclass(frozen=True)
class Audit:
    """How a screen did, by random others of each query that got the finite step, too.

    Args:
        screen (`str`): Its name.
        drawn (`int`): Candidates that were drawn, all queries together.
        above (`int`): Those of them that score above their query's 10th best.
        recall (`float`): Estimated share of the 10 best candidates that the screen has found, the mean over queries.
        error (`float`): Its standard error.
    """

    screen: str
    drawn: int
    above: int
    recall: float
    error: float

    def __str__(self) -> str:
        return (
            f"{self.screen} finds {self.recall:.2f} +- {self.error:.2f} of each query's {DEPTH} best candidates "
            f"({self.above} of {self.drawn} random others score above the {DEPTH}th)"
        )


def _passes_text(passes: float, noun: str = "pass") -> str:
    """Return a number of passes for people, with two digits that count: `1 pass`, `340 passes`."""
    count = float(f"{passes:.2g}")
    return f"{count:,.15g} {noun}{'' if count == 1 else 'es'}"


@dataclass(frozen=True)
class Plan:
    """What a trace does. `str(plan)` is for people.

    Args:
        strategy (`str`): `"full"`: the finite step is run on all candidates; or `"screen"`: on the best of a screen.
        reason (`str`): Why this strategy.
        queries (`int`): Number of queries.
        candidates (`int`): Number of candidates.
        screen (`str`, *optional*): The screen's name.
        keep (`int`, *optional*): Candidates of each query that a screen keeps; with `"full"`, those that are not set
            to the lowest score.
        audit (`int`, defaults to 0): Random others of each query that are scored, too.
        parts (`tuple[Part]`, defaults to none): What is computed, in this order.
        memory (`int`, defaults to 0): Bytes of memory needed besides the model and a batch.
        audits (`tuple[Audit]`, defaults to none): Known after the trace: of each screen that was tried, the last one
            that of the result.
    """

    strategy: str
    reason: str
    queries: int
    candidates: int
    screen: str | None = None
    keep: int | None = None
    audit: int = 0
    parts: tuple[Part, ...] = ()
    memory: int = 0
    audits: tuple[Audit, ...] = ()

    @property
    def passes(self) -> float:
        """Cost of all parts that are not cached, in plain forward passes over all candidates."""
        return sum(part.passes for part in self.parts if not part.cached)

    @property
    def stored(self) -> int:
        """Bytes on disk of all parts."""
        return sum(part.stored for part in self.parts)

    def __str__(self) -> str:
        how = {
            "full": f"the finite step on all {self.candidates:,} candidates",
            "screen": f"screened by {self.screen}; the finite step on each query's best {self.keep} of "
            f"{self.candidates:,} candidates and {self.audit} random others",
        }[self.strategy]
        lines = [f"{self.queries:,} {'query' if self.queries == 1 else 'queries'}: {how} ({self.reason})."]
        for part in self.parts:
            cost = "cached" if part.cached else _passes_text(part.passes) if part.passes else "no pass"
            lines.append(f"  {part.name}: {cost}{f', {size_text(part.stored)} on disk' if part.stored else ''}")
        total = _passes_text(self.passes, "plain forward pass")
        lines.append(
            f"  together: about {total} over the candidates, {size_text(self.memory)} of memory besides the model."
        )
        return "\n".join([*lines, *(f"  audit: {audit}." for audit in self.audits)])

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON can hold it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "Plan":
        """Return the plan that [`to_dict`] has returned."""
        parts = tuple(Part(**part) for part in saved["parts"])
        return cls(**{**saved, "parts": parts, "audits": tuple(Audit(**audit) for audit in saved["audits"])})
