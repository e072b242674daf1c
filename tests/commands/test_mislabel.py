import json

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from hf_forward_inf.commands.mislabel import flip, mislabel_run
from hf_forward_inf.commands.options import MislabelOptions
from hf_forward_inf.data.digits import labelled_digits
from hf_forward_inf.toys.networks import ResNet

SMALL = {"num_candidates": 300, "epochs": 15}


def test_a_share_gets_labels_drawn_from_all_classes():
    labels = np.arange(1000) % 10
    noisy = flip(labels, 0.2, 10)
    assert 160 < (noisy != labels).sum() < 200  # of 200, a tenth keeps its own
    np.testing.assert_array_equal(noisy, flip(labels, 0.2, 10))


def test_a_run_writes_figures_scores_and_a_report_that_tells_what_is_wrong(tmp_path):
    mislabel_run(MislabelOptions(output=str(tmp_path), other_radii=[0.1], checkpoints=2, **SMALL))
    kept = json.loads((tmp_path / "metrics.json").read_text())
    methods = ("", "radius_0.1/", "tracin/", "influence_functions/", "loss/")
    for name in (*methods, "random/", *(f"epoch_15/{one}" for one in methods)):
        assert 0 <= kept[f"{name}detected_at_15_percent"] <= kept[f"{name}ceiling_at_15_percent"]
    assert min(kept[f"{name}auc"] for name in methods) > 0.7
    assert kept["auc"] != kept["epoch_8/auc"] != kept["epoch_15/auc"]
    page = (tmp_path / "report.html").read_text()
    assert ", really " in page
    assert "<svg" in page


@pytest.mark.parametrize("rank_by", ["loss", "self_influence"])
def test_labels_of_ones_own_images_are_ranked_and_none_is_changed(tmp_path, rank_by):
    rows = labelled_digits().select(range(200))
    labels = np.array(rows["label"][:])
    wrong = labels.copy()
    wrong[:6] = (labels[:6] + 5) % 10
    mine = rows.remove_columns("label").add_column("label", wrong.tolist(), feature=rows.features["label"])
    mine.to_parquet(tmp_path / "mine.parquet")
    options = MislabelOptions(
        output=str(tmp_path / "out"), candidates=str(tmp_path / "mine.parquet"), epochs=12, rank_by=rank_by
    )
    metrics = mislabel_run(options)
    table = pd.read_csv(tmp_path / "out" / "labels.csv")
    names = rows.features["label"].names
    by_row = table.sort_values("row")
    assert by_row["label"].astype(str).tolist() == [names[label] for label in wrong]
    assert (np.diff(table[rank_by]) <= 0).all()
    assert set(range(6)) <= set(table["row"][:20])  # all six are among the first tenth
    assert metrics["model_disagrees"] == pytest.approx((table["label"] != table["model_label"]).mean())
    assert "auc" not in metrics and "the model says" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    "wrong",
    [{"flipped": 0.0}, {"flipped": 1.0}, {"radius": 0.0}, {"checkpoints": 31}, {"training_rate": 0.0}, {"blocks": 0}],
)
def test_options_that_make_no_run_are_named(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"--{name} .*(must be|more than)"):
        MislabelOptions(**wrong)


def test_labels_that_are_all_right_leave_nothing_to_find(tmp_path):
    with pytest.raises(ValueError, match="0 of 300 labels are wrong"):
        mislabel_run(MislabelOptions(output=str(tmp_path), noisy_column="label", **SMALL))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fine_tune": True}, "give --model"),
        ({"model": "m", "candidates": "c", "checkpoints": 2}, "add --fine_tune"),
        ({"weight_decay": -1.0}, "--weight_decay must be at least 0"),
        ({"other_radii": [-1.0]}, "--other_radii must be above 0"),
    ],
)
def test_options_that_don_t_fit_together_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        MislabelOptions(**options)


def test_a_column_of_noisy_labels_that_is_not_there_is_told(tmp_path):
    with pytest.raises(ValueError, match="`people`"):
        mislabel_run(MislabelOptions(output=str(tmp_path), noisy_column="people", **SMALL))


def test_a_given_network_is_trained_on_by_the_labels_that_it_is_to_judge(tmp_path):
    torch.manual_seed(0)
    save_file(ResNet(3, 10, blocks=1, width=4).state_dict(), tmp_path / "model.safetensors")
    labelled_digits().select(range(120)).to_parquet(tmp_path / "digits.parquet")
    metrics = mislabel_run(
        MislabelOptions(
            output=str(tmp_path / "out"), model=str(tmp_path / "model.safetensors"), fine_tune=True, epochs=2,
            candidates=str(tmp_path / "digits.parquet"), training_optimizer="sgd", augment=True, first="layer3",
            checkpoints=2, influence_modules=["linear"], flipped=0.2,
        )
    )  # fmt: skip
    assert metrics["epoch_1/loss/auc"] != metrics["epoch_2/loss/auc"] and metrics["influence_functions/auc"] > 0
