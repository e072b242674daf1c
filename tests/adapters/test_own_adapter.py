"""The adapter in docs/adapters.md is what it says."""

import inspect
import re
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import Adapter
from tests.helpers.texts import assert_close, plain_scores

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
TOKENS, RATINGS = [[1, 2, 3], [4], [2, 2, 5, 1], [3, 1]], [1.0, -2.0, 0.5, 3.0]


class Rater(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 4), nn.Linear(4, 1)

    def forward(self, ids):
        read = (ids != 0)[..., None]
        mean = (self.embedding(ids) * read).sum(1) / read.sum(1)
        return self.head(mean.tanh())[:, 0]


def section():
    return PAGE.read_text(encoding="utf-8").split("## A new kind of model")[1].split("\n## ")[0]


def test_the_example_traces_as_plain_torch_does():
    torch.manual_seed(0)
    names, model = {}, Rater()
    exec(re.search(r"```python\n(.*?)```", section(), re.DOTALL)[1], names)
    adapter, rows = names["RatingAdapter"](model), Dataset.from_dict({"tokens": TOKENS, "rating": RATINGS})

    def loss(row):
        return (model(torch.tensor([TOKENS[row]]))[0] - RATINGS[row]).square()

    batch = adapter.collate(adapter.encode(rows[:]))
    expected = [loss(row).item() for row in range(4)]
    np.testing.assert_allclose(adapter.loss(lambda **inputs: model(**inputs), batch).detach(), expected, rtol=1e-5)
    found = ForwardInf(adapter=adapter, ascent=AscentConfig(direction="gradient", radius=0.3)).trace(rows, rows)
    for query in range(4):
        assert_close(found.scores[query], plain_scores(model, loss, query, range(4), 0.3))


def test_every_abstract_method_is_named():
    abstract = {name for name, value in inspect.getmembers(Adapter) if getattr(value, "__isabstractmethod__", False)}
    assert (
        all(f"`{name}`" in section() and f"def {name}(" in section() for name in abstract) and "columns" in section()
    )
