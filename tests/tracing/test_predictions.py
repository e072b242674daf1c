import numpy as np
import pytest
import torch
from datasets import ClassLabel

from hf_forward_inf import ForwardInf
from hf_forward_inf.adapters import ImageClassificationAdapter
from tests.helpers.images import network, rows, tensors


def test_predictions_of_a_classifier_are_added_to_queries_and_best_candidates(tmp_path):
    data, model = rows(12).cast_column("label", ClassLabel(names=["cat", "dog", "fox"])), network()
    tracer = ForwardInf(adapter=ImageClassificationAdapter(model))
    found = tracer.predict(tracer.trace(data.select([5, 6]), data), k=2)
    model.eval()
    with torch.no_grad():
        chances = model(tensors(data)[0]).softmax(dim=1).numpy()
    names = np.array(["cat", "dog", "fox"])[chances.argmax(1)]
    assert found.queries["prediction"][:] == names[[5, 6]].tolist()
    np.testing.assert_allclose(found.queries["probability"][:], chances[[5, 6]].max(1), rtol=1e-5)
    best = {row for i in range(2) for row in found.ranking(i)[:2].tolist()}
    expected = [name if i in best else None for i, name in enumerate(names.tolist())]
    assert found.candidates["prediction"][:] == expected
    found.to_html(tmp_path / "page.html")
    assert f"the model says <b>{names[5]} ({chances[5].max():.0%})</b>" in (tmp_path / "page.html").read_text()


def test_other_models_predict_no_class(line):
    tracer = ForwardInf(adapter=line)
    with pytest.raises(NotImplementedError, match="predicts no class"):
        tracer.predict(None)
