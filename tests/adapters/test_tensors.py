import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import TensorAdapter
from hf_forward_inf.baselines import RepresentationSimilarity
from tests.helpers import digits
from tests.helpers.line import assert_same_state, state


def test_scores_are_those_of_the_algorithm_written_out_by_hand():
    network, queries, candidates = digits.perceptron(), digits.rows(100, 102), digits.rows(0, 30)
    before = state(network)
    found = ForwardInf(adapter=TensorAdapter(network), ascent=AscentConfig(direction="gradient", radius=0.3)).trace(
        queries, candidates
    )
    assert_same_state(before, state(network))
    data = candidates.with_format("torch")[:]
    with torch.no_grad():
        base = nn.functional.cross_entropy(network(data["x"]), data["label"], reduction="none")
    for i in range(2):
        moved = digits.perceptron()
        query = queries.with_format("torch")[i]
        nn.functional.cross_entropy(moved(query["x"][None]), query["label"][None]).backward()
        norm = torch.cat([p.grad.flatten() for p in moved.parameters()]).norm()
        with torch.no_grad():
            for p in moved.parameters():
                p += 0.3 * p.grad / norm
            risen = nn.functional.cross_entropy(moved(data["x"]), data["label"], reduction="none") - base
        np.testing.assert_allclose(found.scores[i], risen, atol=1e-5)


def test_columns_can_be_named_and_arrays_transformed():
    network, candidates = digits.perceptron(), digits.rows(0, 20)
    expected = ForwardInf(adapter=TensorAdapter(network)).trace(candidates.select([3]), candidates).scores
    named = candidates.rename_columns({"x": "pixels", "label": "digit"})
    doubled = named.map(lambda row: {"pixels": [2 * value for value in row["pixels"]]})
    adapter = TensorAdapter(
        network, input_column="pixels", label_column="digit", transform=lambda value: np.asarray(value) / 2
    )
    found = ForwardInf(adapter=adapter).trace(doubled.select([3]), doubled).scores
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_another_transform_is_another_cache_entry():
    network = digits.perceptron()
    settings = {TensorAdapter(network, transform=one).cache_key for one in (None, np.tanh, np.negative)}
    assert len(settings) == 3


def test_integers_stay_integers():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(8, 2))
    rows = Dataset.from_dict({"x": [[0, 1], [3, 4]], "label": [0, 1]})
    adapter = TensorAdapter(network)
    batch = adapter.collate(adapter.encode(rows[:]))
    assert batch["input"].dtype == torch.int64 and batch["input"].tolist() == rows["x"][:]
    found = ForwardInf(adapter=adapter, ascent=AscentConfig(direction="gradient", radius=0.5)).trace(rows, rows)
    assert np.diag(found.scores).min() > 0  # each row's own loss rises most along its own gradient
    assert (found.scores.argmax(axis=1) == [0, 1]).all()


def test_a_row_is_most_like_itself():
    found = RepresentationSimilarity(adapter=TensorAdapter(digits.perceptron())).trace(
        digits.rows(0, 5), digits.rows(0, 20)
    )
    assert [found.ranking(i)[0] for i in range(5)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"x": [[0.0] * 64], "label": [None]}, "Nothing to predict in candidates row 0"),
        ({"x": [[0.0] * 64], "label": [0.5]}, "`label` holds 0.5 in row 0; a label is an integer from 0"),
        ({"x": [[0.0] * 64], "label": [10]}, "`label` holds 10, but the model knows only the classes 0 to 9"),
        ({"x": [[0.0] * 64, [0.0] * 63], "label": [1, 1]}, r"arrays of the shapes \(63,\) and \(64,\)"),
        ({"x": [[[0.0] * 64] * 2], "label": [1]}, r"shape \(1, 2, 10\) for 1 rows"),
    ],
)
def test_rows_that_cannot_be_used_are_told(rows, message):
    tracer = ForwardInf(adapter=TensorAdapter(digits.perceptron()))
    with pytest.raises(ValueError, match=message):
        tracer.trace(digits.rows(100, 101), Dataset.from_dict(rows))


def test_a_module_that_takes_no_tensor_is_refused():
    class Deaf(nn.Module):
        def forward(self):
            return None

    with pytest.raises(TypeError, match=r"Deaf.forward takes no argument"):
        TensorAdapter(Deaf())


def test_a_model_of_texts_is_refused():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    with pytest.raises(TypeError, match="BertForSequenceClassification reads tokens"):
        TensorAdapter(BertForSequenceClassification(BertConfig(vocab_size=5, **sizes)))


def test_the_default_step_is_corrected_by_curvature_and_a_given_one_is_taken():
    adapter = TensorAdapter(digits.perceptron())
    default = ForwardInf(adapter=adapter).ascent
    assert (default.direction, default.damping, default.radius, default.iterations) == ("pcg", 0.01, 0.3, 3)
    longer = ForwardInf(adapter=adapter, ascent=AscentConfig(radius=2.0)).ascent
    assert (longer.direction, longer.damping, longer.radius) == ("pcg", 0.01, 2.0)
    plain = ForwardInf(adapter=adapter, ascent=AscentConfig(direction="gradient")).ascent
    assert (plain.direction, plain.damping, plain.radius) == ("gradient", None, 1.0)
    fixed = ForwardInf(adapter=adapter, ascent=AscentConfig(learning_rate=0.1)).ascent
    assert (fixed.direction, fixed.radius) == ("gradient", None)
