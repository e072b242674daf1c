import json

import numpy as np
import pytest

from hf_forward_inf.experiments.mislabel import MislabelOptions, flip, mislabel_run

SMALL = {"num_candidates": 300, "epochs": 15}


def test_a_share_gets_labels_drawn_from_all_classes():
    labels = np.arange(1000) % 10
    noisy = flip(labels, 0.2, 10)
    assert 160 < (noisy != labels).sum() < 200  # of 200, a tenth keeps its own
    np.testing.assert_array_equal(noisy, flip(labels, 0.2, 10))


def test_a_run_writes_figures_scores_and_a_report_that_tells_what_is_wrong(tmp_path):
    mislabel_run(MislabelOptions(output=str(tmp_path), **SMALL))
    kept = json.loads((tmp_path / "metrics.json").read_text())
    for name in ("", "tracin/", "loss/", "random/"):
        assert 0 <= kept[f"{name}detected_at_15_percent"] <= kept[f"{name}ceiling_at_15_percent"]
    assert min(kept["auc"], kept["tracin/auc"], kept["loss/auc"]) > 0.7
    page = (tmp_path / "report.html").read_text()
    assert ", really " in page
    assert "<svg" in page


@pytest.mark.parametrize("wrong", [{"flipped": 0.0}, {"flipped": 1.0}, {"radius": 0.0}])
def test_options_that_make_no_run_are_named(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"--{name} must be"):
        MislabelOptions(**wrong)


def test_labels_that_are_all_right_leave_nothing_to_find(tmp_path):
    with pytest.raises(ValueError, match="0 of 300 labels are wrong"):
        mislabel_run(MislabelOptions(output=str(tmp_path), noisy_column="label", **SMALL))
