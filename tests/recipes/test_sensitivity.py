import json

import numpy as np
import pytest
from datasets import Dataset
from experiments.sensitivity import REFERENCE, Variant

from hf_forward_inf import Attribution
from hf_forward_inf.cli import run_command
from hf_forward_inf.scores.retraining import Retrained
from tests.helpers.recipes import recipe

RECIPE = recipe("sensitivity")


def test_a_variant_is_compared_with_the_truth_and_the_reference():
    draw = np.random.default_rng(0)
    fact = {"predicate_id": ["P1"] * 2, "obj_uri": ["A", "B"], "sub_uri": ["C", "D"]}
    queries = Dataset.from_dict({**fact, "text": ["a", "b"]})
    candidates = Dataset.from_dict({"text": list("abcdefghijklmno"), "facts": [["P1,A,C"]] + [["P1,B,D"]] * 14})
    scores = draw.normal(size=(2, 15)).astype(np.float32)
    scores[0, 0] = 9  # the only proponent of the first query
    truth = Retrained(queries, draw.random((8, 15)) < 0.5, np.empty((8, 2)))
    truth.losses[:] = -(truth.subsets.astype(float) @ scores.T)
    twice, same, opposite = (Attribution(factor * scores, queries, candidates) for factor in (2, 1, -1))
    variant = Variant(None, candidates, np.arange(15) >= 5)
    alike = RECIPE.by_query(variant, twice, scores, truth)
    np.testing.assert_allclose(alike["lds"], 1)
    np.testing.assert_allclose(alike["lds_gain"], 0)
    np.testing.assert_allclose([alike["rank_correlation"], alike["same_best"], alike["mrr"]], 1)
    other = RECIPE.by_query(variant, opposite, scores, truth)
    np.testing.assert_allclose([other["lds"], other["rank_correlation"]], -1)
    np.testing.assert_allclose(other["same_best"], 0.5)  # 10 of 15 from either end
    assert other["mrr"][0] == pytest.approx(1 / 15)
    expected = [(np.argsort(scores[i])[:10] >= 5).mean() for i in range(2)]
    np.testing.assert_allclose(other["unwanted"], expected)
    assert "lds_gain" not in RECIPE.by_query(variant, same, scores, truth)


def test_everything_that_users_do_is_in_one_table(tmp_path, monkeypatch):
    training = {"epochs": 2, "learning_rate": 4e-3, "batch_length": 2048}
    for module in ("retrainable_sentences", "sensitivity"):
        monkeypatch.setattr(f"experiments.{module}.TRAINING", training)
    monkeypatch.setattr("experiments.sensitivity.CHECKPOINTS", (1,))
    words = [
        "--output",
        str(tmp_path),
        "--num_candidates",
        "60",
        "--num_queries",
        "2",
        "--subsets",
        "2",
        "--seeds",
        "1",
    ]
    assert run_command(RECIPE.main, RECIPE.Options, arguments=words, bars=False) == 0
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert len(rows) == 14 and next(iter(rows)) == REFERENCE
    assert all(row["lds_low"] <= row["lds"] <= row["lds_high"] for row in rows.values())
    assert rows["bfloat16"]["rank_correlation"] > rows["another seed"]["rank_correlation"]
    assert [name for name, row in rows.items() if "unwanted" in row] == [
        "half of the rows never seen", "a fifth of the rows three times",
    ]  # fmt: skip
    assert (tmp_path / "report.html").exists()
    monkeypatch.setattr("experiments.sensitivity.train_llama", None)  # not trained again
    (tmp_path / "metrics.json").unlink()  # as if it had been interrupted
    assert run_command(RECIPE.main, RECIPE.Options, arguments=[*words, "--overwrite"], bars=False) == 0
    assert json.loads((tmp_path / "figures.json").read_text())["rows"] == rows
