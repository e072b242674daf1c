import json

import pytest
from datasets import Dataset
from experiments.hypothesis import HypothesisOptions
from PIL import Image

from tests.helpers.recipes import recipe

SMALL = {
    "num_candidates": 150,
    "num_queries": 2,
    "groups": 4,
    "group_size": 10,
    "group_queries": 20,
    "epochs": 2,
    "seeds": 1,
}


def test_a_run_writes_figures_scores_and_a_report(tmp_path):
    found = recipe("mirrored_influence").main(
        HypothesisOptions(output=str(tmp_path), query_counts=[10], ratios=[0.2], **SMALL)
    )
    kept = json.loads((tmp_path / "metrics.json").read_text())
    assert kept["noiseless/pearson"] == found["noiseless/pearson"] > 0.8
    for part in ("noisy", "forward_inf", "forward_inf_cg"):
        cases = [f"{case}{part}" for case in ("", "queries_10/", "mislabelled_0.2/")]
        assert {f"{case}/spearman" for case in cases} < kept.keys()
        assert len({kept[f"{case}/pearson"] for case in cases}) == 3
    assert "<svg" in (tmp_path / "report.html").read_text()
    with pytest.raises(FileExistsError, match="already holds a run"):
        recipe("mirrored_influence").main(HypothesisOptions(output=str(tmp_path), **SMALL))


def test_too_few_images_are_told_with_what_is_needed(tmp_path):
    with pytest.raises(ValueError, match=r"1797 images.* takes 2010 .*, the groups 1550"):
        recipe("mirrored_influence").main(HypothesisOptions(output=str(tmp_path), num_candidates=2000))


def test_images_of_several_sizes_are_refused(tmp_path):
    images = [Image.new("L", (8 + i % 2, 8)) for i in range(200)]
    Dataset.from_dict({"image": images, "label": [i % 3 for i in range(200)]}).save_to_disk(tmp_path / "images")
    options = HypothesisOptions(output=str(tmp_path / "run"), candidates=str(tmp_path / "images"), **SMALL)
    with pytest.raises(ValueError, match="several sizes"):
        recipe("mirrored_influence").main(options)


@pytest.mark.parametrize("wrong", [{"groups": 1}, {"radius": 0.0}, {"seeds": 0}, {"epochs": 0}, {"mislabelled": 0.6}])
def test_options_that_make_no_run_are_named(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"--{name} "):
        HypothesisOptions(**wrong)
