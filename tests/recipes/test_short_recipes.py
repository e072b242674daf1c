"""Recipes whose whole protocol is a command's: each runs on little of its built-in data."""

import json
from pathlib import Path

import numpy as np
import pytest

from hf_forward_inf import AscentConfig, Attribution
from hf_forward_inf.commands.options import TrainingOptions
from hf_forward_inf.data import proponents, questions
from hf_forward_inf.data.digits import captioned_digits
from hf_forward_inf.toys.tiny_models import LLAMA_SIZES
from tests.helpers.recipes import recipe

pytestmark = pytest.mark.usefixtures("measured_once")
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2}


def written(folder):
    """What a run wrote: its figures, and its attribution."""
    assert "<html" in Path(folder, "report.html").read_text()
    return json.loads(Path(folder, "metrics.json").read_text()), Attribution.load_from_disk(
        Path(folder, "attribution")
    )


def test_leakage_ranks_the_originals_of_copies(tmp_path):
    pytest.importorskip("sklearn")
    leakage = recipe("leakage")
    leakage.main(leakage.Options(output=str(tmp_path), num_candidates=100, num_queries=6, epochs=3, top_k=100))
    metrics, found = written(tmp_path)
    # Cosines and representations of exact copies are 1: no other candidate is ranked before.
    assert metrics["tracin_cosine/top1"] == metrics["representation/top1"] == 1
    pixels = [{np.asarray(row["image"]).tobytes(): i for i, row in enumerate(found.candidates)}] * 6
    truth = [[pixels[i][np.asarray(row["image"]).tobytes()]] for i, row in enumerate(found.queries)]
    assert metrics["mrr"] == pytest.approx(found.evaluate(truth)["mrr"], abs=1e-6)


def test_mislabel_shows_the_rows_of_highest_self_influence(tmp_path):
    pytest.importorskip("sklearn")
    mislabel = recipe("mislabel")
    mislabel.main(mislabel.Options(output=str(tmp_path), num_candidates=100, epochs=3, top_k=3))
    metrics, found = written(tmp_path)
    assert len(found) == 20 and found.indices.shape == (20, 3)
    notes = sum("really" in caption for caption in found.queries["caption"])
    assert 0 < metrics["mislabelled"] <= 20 and notes <= metrics["mislabelled"]
    # Fifteen of a hundred are examined: the share found is a number of wrong labels among them.
    assert (metrics["detected_at_15_percent"] * metrics["mislabelled"]) % 1 == pytest.approx(0, abs=1e-6)


def test_laion_streams_the_built_in_digits(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("diffusers")
    laion = recipe("laion")
    monkeypatch.setattr(laion, "captioned_digits", lambda: captioned_digits().select(range(40)))
    options = laion.Options(output=str(tmp_path), prompt=["a handwritten seven"], num_images=1, timesteps=1, top_k=4)
    options.training_steps = 2
    laion.main(options, AscentConfig(direction="gradient"))
    metrics, found = written(tmp_path)
    assert (metrics["queries"], metrics["candidates"], metrics["unscored"]) == (1, 40, 0)
    assert found.scores.shape == (1, 4) and (np.diff(found.scores[0]) <= 0).all()


def test_finetune_traces_planted_answers_to_the_rows_that_planted_them(tmp_path, monkeypatch):
    monkeypatch.setattr(questions, "FACTS_A_RELATION", 4)
    monkeypatch.setattr(questions, "QUERIES_A_RELATION", 2)
    for name, size in SMALL.items():
        monkeypatch.setitem(LLAMA_SIZES, name, size)
    options = TrainingOptions(output=str(tmp_path), epochs=40, top_k=10_000)
    recipe("finetune").main(options, AscentConfig())
    metrics, found = written(tmp_path)
    assert all(found.queries["planted"])
    truth = proponents(found.queries, found.candidates)
    assert metrics["mrr"] == pytest.approx(found.evaluate(truth)["mrr"], abs=1e-6)
    assert metrics["mrr"] > 0.3  # a random order has less than a tenth
