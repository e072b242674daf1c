import numpy as np
import pytest
import torch
from datasets import Dataset

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.curvature.perturber import Perturber
from hf_forward_inf.tracing.prepared import load, prepare
from tests.helpers.causal import questions, train_tokens, untrained


@pytest.fixture(scope="module")
def tokens():
    return train_tokens()


@pytest.mark.parametrize(
    "ascent",
    [{"direction": "kfac", "sample": 4}, {"direction": "gradient", "step": "low_rank"}, {"mode": "symmetric"}],
)
def test_stored_models_are_the_computed_ones(tokens, tmp_path, monkeypatch, ascent):
    monkeypatch.setattr(Perturber, "_block_size", lambda self, tokens: 2)
    model = untrained("llama", len(tokens))
    tracer = ForwardInf(model, tokens, ascent=AscentConfig(radius=0.5, **ascent), training=questions())
    rows = questions()
    prepare(tracer, rows.select(range(3)), tmp_path / "models")
    assert len(list((tmp_path / "models").glob("*.safetensors"))) == 2
    stored = load(tmp_path / "models", tracer.adapter)
    for (where, models), (again, computed) in zip(
        stored(), tracer.models_of(rows.select(range(3)), rows)(), strict=True
    ):
        assert where == again and models.fingerprint == computed.fingerprint
        for theta, own in zip(models.thetas, computed.thetas, strict=True):
            assert theta.keys() == own.keys()
            for name, value in theta.items():
                pairs = [(vars(value)[part], vars(own[name])[part]) for part in getattr(value, "__dict__", {})]
                for one, other in pairs or [(value, own[name])]:
                    torch.testing.assert_close(one, other, rtol=0, atol=0)
    expected = tracer.trace(rows.select(range(3)), rows).scores
    scores = tracer.score(rows.select(range(3)), rows, tmp_path / "other", models=stored)
    np.testing.assert_array_equal(scores, expected)


def test_models_are_prepared_as_in_evaluation_whatever_mode_the_model_is_in(tokens, tmp_path):
    def steps(mode, folder):
        model = untrained("gpt2", len(tokens)).train(mode)  # with dropout
        ascent = AscentConfig(direction="kfac", sample=4, radius=0.5, step="full")
        tracer = ForwardInf(model, tokens, ascent=ascent, training=questions(), cache_dir=tmp_path / folder)
        ((_, models),) = prepare(tracer, questions().select(range(2)), tmp_path / folder)()
        return [value for theta in models.thetas for value in theta.values()]

    moved = steps(True, "training")
    assert moved
    for one, other in zip(moved, steps(False, "evaluation"), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_query_without_a_gradient_has_no_model(line, tmp_path):
    queries = Dataset.from_dict({"x": [[0.0, 0.0], [1.0, 0.0]], "y": [1.0, 0.0]})
    tracer = ForwardInf(adapter=line)
    prepare(tracer, queries, tmp_path)
    ((_, models),) = load(tmp_path, line)()
    assert models.thetas[0] is None and models.thetas[1] is not None


def test_a_folder_without_models_is_refused(line, tmp_path):
    with pytest.raises(FileNotFoundError, match="There are no perturbed models"):
        load(tmp_path, line)
