"""An explainer of quanda, whose metrics and benchmarks then judge any attributor of this library.

    pip install quanda    # 0.5; it installs captum, TRAK, dattri, kronfluence, lightning and torchvision, too

quanda makes explainers by their class:

    ClassDetection(...).evaluate(explainer_cls=AttributorExplainer, expl_kwargs={"make": TracIn})
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from quanda.explainers import Explainer
from torch import Tensor, nn

from hf_forward_inf import ForwardInf
from hf_forward_inf.adapters import Adapter, TensorAdapter
from hf_forward_inf.attribution import Attributor

Make = Callable[..., Attributor]
"""Makes an attributor, given `adapter=`: a class, such as `TracIn`, or a function."""


class AttributorExplainer(Explainer):
    """Explains a classifier of tensors by an attributor of this library.

    Args:
        model (`torch.nn.Module`): From a tensor `[rows, ...]` to logits `[rows, classes]`.
        train_dataset (`torch.utils.data.Dataset`): Pairs of a tensor and its label.
        task (`str`, defaults to `"image_classification"`): The only one.
        checkpoints (`str` or `list[str]`, *optional*): Files of weights, of which the last is loaded.
        checkpoints_load_func (`Callable`, *optional*): Loads one, as in all of quanda's explainers.
        make (`Callable`, defaults to [`ForwardInf`]): Makes the attributor, given `adapter=`.
    """

    accepted_tasks = ["image_classification"]  # noqa: RUF012 (quanda's declaration)

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        task: str = "image_classification",
        checkpoints: str | list[str] | None = None,
        checkpoints_load_func: Callable[[nn.Module, str], Any] | None = None,
        make: Make = ForwardInf,
    ):
        super().__init__(model, train_dataset, task, checkpoints, checkpoints_load_func)
        if self.checkpoints:
            self.load_last_checkpoint()
        adapter: Adapter = TensorAdapter(model)
        self.attributor: Any = make(adapter=adapter)
        pairs = [train_dataset[i] for i in range(len(train_dataset))]
        self.candidates = rows_of(torch.stack([x for x, _ in pairs]), [int(label) for _, label in pairs])

    def explain(self, test_data: Tensor, targets: Any) -> Tensor:
        """Return scores of all training examples, `[queries, candidates]`; 0 where there is none.

        Args:
            test_data (`torch.Tensor`): Queries, `[queries, ...]`.
            targets (`torch.Tensor` or `list[int]`): The classes to explain.
        """
        labels = targets.tolist() if isinstance(targets, Tensor) else list(targets)
        found = self.attributor.trace(rows_of(test_data, labels), self.candidates)
        return torch.from_numpy(np.nan_to_num(found.dense())).to(self.device)

    def self_influence(self, batch_size: int = 32) -> Tensor:
        """Return each training example's influence on itself, `[candidates]`; 0 where there is none."""
        if not hasattr(self.attributor, "self_influence"):
            return super().self_influence(batch_size)
        found = self.attributor.self_influence(self.candidates)
        return torch.from_numpy(np.nan_to_num(found)).to(self.device)


def rows_of(inputs: Tensor, labels: list[int]) -> Dataset:
    """Return tensors and labels as rows that [`TensorAdapter`] reads."""
    return Dataset.from_dict({"x": inputs.detach().cpu().numpy().tolist(), "label": labels})
