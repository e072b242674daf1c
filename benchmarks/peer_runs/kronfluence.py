"""kronfluence: influence functions with eigenvalue-corrected Kronecker factors (EK-FAC), which it stores."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task as KronfluenceTask
from torch import Tensor, nn

from peer_runs.measure import main
from peer_runs.task import IGNORED, Rows, Task, logits_of, losses

BATCH = 32

Batch = dict[str, Tensor]


class LanguageModelling(KronfluenceTask):
    """Summed cross-entropy for training and queries, with labels sampled from the model where factors are fitted."""

    def __init__(self, model: nn.Module, head: bool):
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        self.names = [name for name in linear if head or name != "lm_head"]

    def compute_train_loss(self, batch: Batch, model: nn.Module, sample: bool = False) -> Tensor:
        """Return the loss whose curvature is fitted."""
        logits, labels = logits_of(model, batch), batch["labels"]
        if sample:
            drawn = torch.multinomial(F.softmax(logits.detach(), dim=-1).flatten(0, 1), 1).view_as(labels)
            labels = torch.where(labels == IGNORED, labels, drawn)
        return losses(logits, labels).sum()

    def compute_measurement(self, batch: Batch, model: nn.Module) -> Tensor:
        """Return the explained loss, which is the same."""
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self) -> list[str]:
        """Return the linear layers, by default without the output layer, as in the library's own examples."""
        return self.names

    def get_attention_mask(self, batch: Batch) -> Any:
        """Return masks that exclude padding from the factors, of the input's tokens or the target's."""
        inputs, targets = batch["attention_mask"], batch["labels"] != IGNORED
        if "decoder_input_ids" not in batch:
            return inputs
        return {name: inputs if _reads_inputs(name) else targets.to(inputs) for name in self.names}


def _reads_inputs(name: str) -> bool:
    return name.startswith("encoder.") or name.endswith(("EncDecAttention.k", "EncDecAttention.v"))


class Padded(torch.utils.data.Dataset):
    """Rows padded to one length."""

    def __init__(self, task: Task, rows: Rows):
        self.batch = task.collate(rows)

    def __len__(self) -> int:
        return len(self.batch["labels"])

    def __getitem__(self, i: int) -> Batch:
        return {name: values[i] for name, values in self.batch.items()}


def ekfac(task: Task, strategy: str = "ekfac", damping: float | None = 1e-8, head: bool = False) -> np.ndarray:
    """Return influence; a damping of `None` is a tenth of the mean eigenvalue.

    Its default, 1e-8, is next to none.
    """
    candidates, queries = Padded(task, task.candidates), Padded(task, task.queries)
    ours = LanguageModelling(task.model, head)
    model = prepare_model(task.model, ours)
    run = f"run-{strategy}-{head}"
    analyzer = Analyzer(analysis_name=run, model=model, task=ours, cpu=True, disable_tqdm=True)
    analyzer.fit_all_factors(
        factors_name="factors",
        dataset=candidates,
        per_device_batch_size=BATCH,
        factor_args=FactorArguments(strategy=strategy),
    )
    for folder in Path("influence_results", run).glob("scores_*"):
        shutil.rmtree(folder)
    analyzer.compute_pairwise_scores(
        scores_name="asked",
        factors_name="factors",
        query_dataset=queries,
        train_dataset=candidates,
        per_device_query_batch_size=len(queries),
        per_device_train_batch_size=BATCH,
        score_args=ScoreArguments(damping_factor=damping),
    )
    return analyzer.load_pairwise_scores("asked")["all_modules"].numpy()


if __name__ == "__main__":
    main({"ekfac": ekfac, "kfac": partial(ekfac, strategy="kfac")})
