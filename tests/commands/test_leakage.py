import json

import numpy as np
import pytest
from PIL import Image as Pillow

from hf_forward_inf import Attribution
from hf_forward_inf.commands.leakage import draw_tasks, lead, leakage_run
from hf_forward_inf.commands.options import IMAGE_CHANGES, LeakageOptions
from hf_forward_inf.data.image_changes import CHANGES, changed
from hf_forward_inf.data.images import load_images
from hf_forward_inf.evaluation.task import MAIN
from tests.helpers.images import picture

pytestmark = pytest.mark.usefixtures("measured_once")


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return load_images()


def test_a_run_finds_the_copies_and_writes_what_it_found(digits, tmp_path):
    options = LeakageOptions(
        output=str(tmp_path), num_candidates=120, num_queries=12, tuning_share=0.5, epochs=4, top_k=5, radii=[0.01],
        change=["none", "shifted"], network="conv",
    )  # fmt: skip
    metrics = leakage_run(options)
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["queries"] == 6 and metrics["candidates"] == 120
    for name in ("top1", "top5", "shifted/top1", "cross_entropy/top1", "tracin/shifted/top5", "representation/top1"):
        assert 0 <= metrics[name] <= 1
    assert (
        metrics["tracin_cosine/top1"] == metrics["representation/top1"] == 1
    )  # of themselves, whatever they are worth
    assert "radius 0.01" in metrics["setting"] and metrics["forward_passes_per_query"] > 0
    page = (tmp_path / "report.html").read_text()
    assert page.count('<use href="#p') == 12 + 12 * 5 and ", shifted" in page and "copies of?" in page
    assert Attribution.load_from_disk(tmp_path / "attribution").scores.shape == (12, 5)
    with pytest.raises(FileExistsError, match="--overwrite"):
        leakage_run(options)


def test_settings_are_chosen_by_images_that_are_not_judged(digits):
    tuning, judged = draw_tasks(
        digits, LeakageOptions(num_queries=20, tuning_share=0.25, change=["recoloured", "none"])
    )
    assert len(tuning.queries) == 10 and len(judged.queries) == 30 and len(tuning.candidates) == 1024
    assert judged.groups == {MAIN: list(range(15)), "none": list(range(15, 30))}
    copies = {}
    for name, task in (("tuning", tuning), ("judged", judged)):
        half = len(task.queries) // 2
        copies[name] = [task.candidates[task.proponents[half + i][0]]["image"] for i in range(half)]
        for i, copy in enumerate(copies[name]):
            query = task.queries[half + i]
            assert np.array_equal(query["image"], copy)
            assert query["label"] == task.candidates[task.proponents[i][0]]["label"]
    tuned, others = ({np.asarray(image).tobytes() for image in images} for images in copies.values())
    assert not tuned & others


def test_the_options_name_the_changes_that_there_are():
    assert tuple(CHANGES) == IMAGE_CHANGES


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_changes_leave_size_and_mode_and_all_but_a_negative_is_near(mode):
    image = Pillow.linear_gradient("L").resize((16, 16)).convert(mode)
    before = np.asarray(image, dtype=float)
    for change in CHANGES:
        found = changed(image, change)
        assert found.size == (16, 16) and found.mode == mode
        assert np.array_equal(found, image) == (change == "none")
        far = np.abs(np.asarray(found, dtype=float) - before).mean()
        assert far > 100 if change == "inverted" else far < 60
    shifted = np.asarray(changed(picture(0, mode, size=16), "shifted"))
    assert np.array_equal(shifted[2:, 2:], np.asarray(picture(0, mode, size=16))[:-2, :-2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "x"}, "give its training images as --candidates"),
        ({"change": ["mirrored"]}, "--change must be one of none, shifted"),
        ({"num_queries": 10}, "3 or more are needed for each"),
        ({"tuning_share": 1.0}, "--tuning_share must be below 1"),
        ({"radii": [0.0]}, "--radii must be above 0"),
        ({"epochs": 0}, "--epochs must be at least 1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LeakageOptions(**options)


def test_more_queries_than_candidates_are_refused(digits):
    with pytest.raises(ValueError, match="20 queries need more than 20 candidates"):
        draw_tasks(digits.select(range(20)), LeakageOptions(num_queries=20))


def test_a_lead_is_counted_in_deviations_of_the_querys_scores():
    scores = np.array([[5.0, 1.0, 3.0, 3.0], [0.0, 2.0, 0.0, 2.0]])
    assert np.isclose(lead(scores, [[0], [2]]), (2 / 2**0.5 + -2 / 1) / 2)
