"""Explainers that quanda's metrics compare: attributors of this library, and quanda's wrappers of captum."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from quanda.explainers import Explainer, RandomExplainer
from quanda.explainers.wrappers import CaptumArnoldi, CaptumSimilarity, CaptumTracInCP, CaptumTracInCPFast
from safetensors.torch import load_model, save_model
from torch import nn

from experiments.quanda_explainer import AttributorExplainer
from experiments.quanda_tasks import Problem
from hf_forward_inf import ForwardInf
from hf_forward_inf.adapters import Adapter, TensorAdapter
from hf_forward_inf.attribution import Attributor
from hf_forward_inf.baselines import Ensemble

MARGINS = 0.25
"""Weight of margins next to losses ([`Ensemble`])."""
BATCH = 64
"""Examples in a batch of captum's."""


def with_margins(adapter: Adapter) -> Attributor:
    """Return Forward-INF on losses, and with a quarter of the weight on margins after the same steps."""
    losses = ForwardInf(adapter=adapter)
    margins = ForwardInf(adapter=TensorAdapter(adapter.model, objective="margin"), ascent=losses.ascent)
    return Ensemble([losses, margins], standardise=True, weights=[1, MARGINS])


def _ours(make: Callable[..., Attributor], problem: Problem, folder: Path) -> Explainer:
    return AttributorExplainer(problem.model, problem.train, make=make)


def _captum(kind: Callable[..., Explainer], problem: Problem, folder: Path, **options: Any) -> Explainer:
    file = str(folder / "weights.safetensors")
    save_model(problem.model, file)
    return kind(
        model=problem.model, train_dataset=problem.train, checkpoints=[file], checkpoints_load_func=_load, **options
    )


def _load(model: nn.Module, file: str) -> float:
    load_model(model, file)
    return 1.0  # the learning rate of TracIn's only checkpoint


def _last(model: nn.Module) -> tuple[str, str]:
    """Return the names of a network's last part, its head, and of the part before it."""
    names = [name for name, _ in model.named_children()]
    return names[-1], names[-2]


def _similarity(problem: Problem, folder: Path) -> Explainer:
    before = _last(problem.model)[1]
    return CaptumSimilarity(
        problem.model, problem.train, model_id="similarity", layers=before, cache_dir=str(folder), batch_size=BATCH,
        load_from_disk=False,
    )  # fmt: skip


def _tracin_of_the_last_layer(problem: Problem, folder: Path) -> Explainer:
    head = problem.model.get_submodule(_last(problem.model)[0])
    return _captum(CaptumTracInCPFast, problem, folder, final_fc_layer=head, batch_size=BATCH)


def _arnoldi(problem: Problem, folder: Path) -> Explainer:
    return _captum(CaptumArnoldi, problem, folder, batch_size=BATCH, arnoldi_dim=50, projection_dim=20)


CONTENDERS: dict[str, Callable[[Problem, Path], Explainer]] = {
    "forward_inf": partial(_ours, ForwardInf),
    "forward_inf_and_margins": partial(_ours, with_margins),
    "captum_similarity": _similarity,
    "captum_tracin": partial(_captum, CaptumTracInCP, batch_size=BATCH),
    "captum_tracin_last_layer": _tracin_of_the_last_layer,
    "captum_arnoldi": _arnoldi,
    "random": lambda problem, folder: RandomExplainer(problem.model, problem.train),
}
"""Explainers by name, made for a problem; a folder holds what captum writes."""
TITLES = {
    "forward_inf_and_margins": "Forward-INF, losses and margins",
    "captum_similarity": "captum, similarity of hidden states",
    "captum_tracin": "captum, TracInCP",
    "captum_tracin_last_layer": "captum, TracInCP of the last layer",
    "captum_arnoldi": "captum, Arnoldi influence functions",
}
"""Titles in tables."""
WITHOUT_SELF_INFLUENCE = ("captum_similarity", "forward_inf_and_margins")
"""An example's similarity to itself is always the highest; a mean of attributors has no self-influence."""
