"""How far a query moves the model, in nats: until its predictions have changed by a given divergence."""

import math
import warnings
from functools import partial

import torch
from torch import Tensor

from hf_forward_inf.adapters.base import Batch
from hf_forward_inf.ascent.low_rank import LowRank
from hf_forward_inf.ascent.parameters import Parameters, call
from hf_forward_inf.curvature.sample import Sample
from hf_forward_inf.utils.fingerprints import fingerprint
from hf_forward_inf.utils.models import batch_size, room_beside

ROWS = 32
"""Training examples on which the divergence is measured."""
MEASUREMENTS = 5
"""Maximum number of measurements for a query."""
CLOSE = 0.15
"""A divergence is accepted within this relative distance, about."""
LARGEST_FACTOR = 30.0
"""The length changes at most by this factor from one measurement to the next."""
OUTPUT_BYTES = 256 * 2**20
"""Memory for the model's own outputs; those beyond it are computed again for each measurement."""


class TrustRegion:
    """Scales a change of the model so that its predictions move by a given divergence.

    The divergence is the mean, over the predictions on some training examples, of KL(before, after)
    ([`Adapter.divergence`]). It grows with the square of a small change's length, so that few measurements suffice:
    from the second on, the exponent is taken from the last two.

    A radius in weight space does not transfer from one model to another, nor from one query to another; a divergence
    does.

    Args:
        sample (`Sample`): Training examples, forwarded once for each measurement.
        names (`list[str]`): The perturbed parameters.
        trust (`float`): The divergence, in nats for each prediction.
    """

    def __init__(self, sample: Sample, names: list[str], trust: float):
        self.adapter, self.trust = sample.adapter, trust
        self.fingerprint = fingerprint(sample.fingerprint, trust)
        self.batches = list(sample.batches(set(names), self._batch_length(sample, names)))
        self.before: dict[int, Tensor] = {}
        """The model's own outputs, by batch."""
        self.warned = False

    @torch.no_grad()
    def _batch_length(self, sample: Sample, names: list[str]) -> int:
        """Return how long batches may be: outputs before and after, and their logarithms, take [`room_beside`]."""
        first = next(sample.batches(set(names), 1))
        length = sample.lengths[: batch_size(first)].sum(1).max()
        return max(1, int(room_beside(self.adapter.model) * length / (24 * self._outputs({}, first).numel())))

    @torch.no_grad()
    def divergence(self, theta: Parameters) -> float:
        """Return the mean divergence of the predictions under theta from those of the model itself."""
        total, count = 0.0, 0
        for number, batch in enumerate(self.batches):
            each = self.adapter.divergence(self._before(number), self._outputs(theta, batch))
            total, count = total + each.double().sum().item(), count + len(each)
        return total / max(count, 1)

    def _outputs(self, theta: Parameters, batch: Batch) -> Tensor:
        return self.adapter.outputs_and_loss(partial(call, self.adapter.model, theta), batch)[0]

    def _before(self, number: int) -> Tensor:
        """Return the model's own outputs of a batch, which are the same for all queries and lengths."""
        if number in self.before:
            return self.before[number]
        outputs = self._outputs({}, self.batches[number])
        if sum(one.nbytes for one in (*self.before.values(), outputs)) <= OUTPUT_BYTES:
            self.before[number] = outputs
        return outputs

    def scaled(self, theta: Parameters) -> tuple[Parameters, float]:
        """Return theta with its change scaled to the trust, and the factor."""
        factor, exponent = 1.0, 2.0
        tried: list[tuple[float, float]] = []  # log factor, log divergence
        for _ in range(MEASUREMENTS):
            moved = self._at(theta, factor)
            found = self.divergence(moved)
            if not 0 < found < math.inf:
                factor /= LARGEST_FACTOR if found != 0 else 1 / LARGEST_FACTOR
                continue
            if abs(math.log(found / self.trust)) < CLOSE:
                return moved, factor
            tried.append((math.log(factor), math.log(found)))
            if len(tried) > 1 and tried[-1][0] != tried[-2][0]:
                exponent = (tried[-1][1] - tried[-2][1]) / (tried[-1][0] - tried[-2][0])
            step = (self.trust / found) ** (1 / min(max(exponent, 0.5), 4.0))
            factor *= min(max(step, 1 / LARGEST_FACTOR), LARGEST_FACTOR)
        self._warn(found)
        return self._at(theta, factor), factor

    def _at(self, theta: Parameters, factor: float) -> Parameters:
        own = dict(self.adapter.model.named_parameters())
        return {name: _scaled(own.get(name), value, factor) for name, value in theta.items()}

    def _warn(self, found: float) -> None:
        if not self.warned:
            warnings.warn(
                f"A query's step can't be scaled to trust={self.trust:g} nats: after {MEASUREMENTS} measurements its "
                f"predictions move by {found:.2g}. The last length is used; give a radius if the loss is flat or "
                "explodes.",
                stacklevel=2,
            )
        self.warned = True


def _scaled(own: Tensor | None, value: Tensor | LowRank, factor: float) -> Tensor | LowRank:
    if isinstance(value, LowRank):
        return value * factor
    assert own is not None
    before = own.detach().float()
    return (before + factor * (value.float() - before)).to(value.dtype)
