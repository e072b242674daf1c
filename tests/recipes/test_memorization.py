import json

import numpy as np
import pytest
import torch
from experiments.features_under_ascent import features_under_ascent, moved, on_a_plane
from experiments.memorization import MemorizationOptions
from PIL import Image as Pillow
from torch import nn

from hf_forward_inf import AscentConfig, Attribution, ForwardInf
from hf_forward_inf.adapters import ImageClassificationAdapter
from tests.helpers.images import network, rows, tensors
from tests.helpers.recipes import recipe

pytestmark = pytest.mark.usefixtures("measured_once")


def test_a_run_pairs_test_images_with_training_images(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    options = MemorizationOptions(
        output=str(tmp_path), num_candidates=80, epochs=3, num_queries=5, pairs=4, others=20, dynamics=[0, 0.1],
        top_k=3,
    )  # fmt: skip
    metrics = recipe("memorization").main(options)
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["queries"] == 5 and metrics["candidates"] == 80
    found = Attribution.load_from_disk(tmp_path / "attribution")
    same = [query["label"] == found.top(i, 1)[0]["label"] for i, query in enumerate(found.queries)]
    assert len(same) == 4 and metrics["same_label"] == np.mean(same)
    assert metrics["moved/query"] > metrics["moved/others"] > 0
    page = (tmp_path / "report.html").read_text()
    assert page.count('<use href="#p') == 4 + 4 * 3 and "radius 0.1" in page and "t-SNE" in page
    assert Pillow.open(tmp_path / "pairs.png").width > 500


def test_features_are_those_of_the_moved_model():
    data, model = rows(6), network().eval()
    tracer = ForwardInf(
        adapter=ImageClassificationAdapter(model), ascent=AscentConfig(direction="gradient", radius=1.0)
    )
    found = features_under_ascent(tracer, data.select([2]), data, [0.0, 0.5])
    images, labels = tensors(data)
    with torch.no_grad():
        np.testing.assert_allclose(found[0], model[:-1](images), atol=1e-6)
    nn.functional.cross_entropy(model(images[2:3]), labels[2:3]).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.5 * p.grad / norm
        np.testing.assert_allclose(found[1], model[:-1](images), atol=1e-5)


def test_movement_is_relative_to_the_length_of_features():
    features = np.array([[[3.0, 4.0], [1.0, 0.0]], [[3.0, 9.0], [1.0, 0.0]]])
    assert moved(features).tolist() == [[0, 0], [1, 0]]


def test_all_radii_lie_on_one_plane():
    pytest.importorskip("sklearn")
    features = np.random.default_rng(0).normal(size=(2, 20, 5)).astype(np.float32)
    assert on_a_plane(features).shape == (2, 20, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": "x"}, "give --candidates with them"),
        ({"candidates": "x"}, "give the --model that was trained on them"),
        ({"num_queries": 2}, "--num_queries must be at least 3"),
        ({"dynamics": [0.1, 0.3]}, "--dynamics must begin with 0"),
        ({"radius": 0.0}, "--radius must be above 0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MemorizationOptions(**options)
