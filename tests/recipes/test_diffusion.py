import json
from dataclasses import replace

import numpy as np
import pytest
from experiments.diffusion import DiffusionOptions, likeness
from experiments.diffusion_alone import _asked, candidates_of
from experiments.diffusion_checks import swapped
from experiments.diffusion_removal import without

from hf_forward_inf import AscentConfig, Attribution
from hf_forward_inf.adapters import DiffusionAdapter
from hf_forward_inf.baselines import PixelDistance
from hf_forward_inf.data.digits import captioned_digits
from hf_forward_inf.evaluation.task import Task
from hf_forward_inf.scores.corrections import standardised
from hf_forward_inf.toys.drawings import Drawing, as_queries, choose_exemplars, drawings
from hf_forward_inf.toys.pixel_pipeline import tiny_pipeline
from tests.helpers.drawing import rows, stable_diffusion
from tests.helpers.recipes import recipe

pytestmark = pytest.mark.usefixtures("measured_once")


def test_a_run_on_pictures_writes_what_it_found(tmp_path):
    pytest.importorskip("sklearn")
    options = DiffusionOptions(
        output=str(tmp_path / "run"), training_steps=2, finetuning_steps=2, exemplars=3, num_candidates=8,
        fewer_candidates=[5], timesteps=2, num_images=2, heatmaps=True, baselines=True, checks=True, top_k=5,
    )  # fmt: skip
    metrics = recipe("diffusion").main(options, AscentConfig(direction="cg", sample=8, iterations=2))
    assert metrics == json.loads((tmp_path / "run" / "metrics.json").read_text())
    methods = (
        "gradient", "pixel_distance", "representation", "bm25", "low_loss", "learned", "tracin", "tracin_cosine",
        "first_order_standardised", "unlearning_by_base_loss", "forward_inf_single", "gradient_plain",
        "descent_standardised", "denoiser_features", "fixed_learning_rate", "exemplar_as_query",
    )  # fmt: skip
    assert {
        "top1",
        "top5",
        "mrr",
        "5/top1",
        "low_loss/5/mrr",
        *(f"{method}/top1" for method in methods),
    } <= metrics.keys()
    assert metrics["second_query/encoder_calls"] == 0 and metrics["second_query/denoiser_passes"] >= 1
    assert metrics["variance_ratio"] > 1
    assert {"uncaptioned/top1", "uncaptioned/standardised/top1"} <= metrics.keys()
    assert metrics["queries"] == 3 and metrics["candidates"] == 8
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count('<use href="#p') >= 3 * 2 + 3 * 5
    assert "handwritten" in page and 'class="heat"' in page
    found = Attribution.load_from_disk(tmp_path / "run" / "attribution")
    assert found.scores.shape == (3, 5) and len(found.queries[0]["image"]) == 2
    assert metrics["top1"] == np.mean([found.ranking(i)[0] == i for i in range(3)])  # exemplars are the first rows


def test_each_exemplar_alone_stands_among_candidates_of_its_own(tmp_path):
    pytest.importorskip("sklearn")
    options = DiffusionOptions(
        output=str(tmp_path / "run"), training_steps=2, finetuning_steps=2, exemplars=3, num_candidates=9,
        fewer_candidates=[5], timesteps=1, num_images=1, alone=True, top_k=5,
    )  # fmt: skip
    metrics = recipe("diffusion").main(options, AscentConfig(direction="cg", sample=4, iterations=1))
    assert metrics["queries"] == 3 and metrics["candidates"] == 9
    assert {"top1", "5/top1", "another_query/5/top1", "low_loss/mrr"} <= metrics.keys()
    found = Attribution.load_from_disk(tmp_path / "run" / "attribution")
    assert np.isfinite(found.scores).all() and found.total == 1797
    page = (tmp_path / "run" / "report.html").read_text()
    assert "ignore the query" in page and "divided by that loss" in page


def test_taking_the_best_candidates_away_is_judged_by_training_again(tmp_path):
    rows(40).to_parquet(tmp_path / "pictures.parquet")
    options = DiffusionOptions(
        output=str(tmp_path / "run"), candidates=str(tmp_path / "pictures.parquet"), width=8, training_steps=2,
        exemplars=3, num_candidates=8, timesteps=1, num_images=1, removed=20, retrained=1, top_k=5,
    )  # fmt: skip
    metrics = recipe("diffusion").main(options, AscentConfig(direction="cg", sample=4, iterations=1))
    assert metrics["queries"] == 1 and metrics["candidates"] == 40
    assert {"rise", "pixel_distance/rise", "random/rise"} <= metrics.keys()
    assert metrics["random/rise"] != metrics["rise"]
    assert (tmp_path / "run" / "report.html").exists()


def test_others_take_the_places_of_what_is_left_out():
    places = without(np.array([0, 4]), 6, seed=0)
    assert len(places) == 6 and not {0, 4} & set(places.tolist())
    assert places[[1, 2, 3, 5]].tolist() == [1, 2, 3, 5]


def test_drawings_can_be_changed_before_they_are_traced():
    adapter = DiffusionAdapter(tiny_pipeline(["a red square"], 8, 3, 8, seed=0))
    asked = Drawing(num_images=1, seed=3)
    (drawn,) = drawings(adapter, ["a red square"], asked)
    (negative,) = drawings(adapter, ["a red square"], replace(asked, change="inverted"))
    assert negative["caption"] == "a red square"
    assert np.array_equal(np.asarray(negative["image"][0]), 255 - np.asarray(drawn["image"][0]))


def test_other_captions_are_drawn_beside_an_exemplars():
    captions = ["a"] * 5 + ["b"] * 9 + ["c", "d"]
    asked = _asked(captions, seed=0)
    assert asked[0] == 0 and sorted(captions[i] for i in asked) == ["a", "b", "c", "d"]
    with pytest.raises(ValueError, match="have 2: raise --num_candidates"):
        _asked(captions[:-1], seed=0)


def test_scores_that_know_nothing_but_captions_go_by_the_caption_when_pictures_are_swapped():
    class ByCaption:
        def trace(self, queries, candidates):
            scores = [[float(a == b) for b in candidates["caption"]] for a in queries["caption"]]
            return Attribution(np.array(scores, dtype=np.float32), queries, candidates)

    queries = as_queries(rows(3)["caption"][:], [[image] for image in rows(3)["image"]])
    found = swapped(ByCaption(), queries, rows(3), [[0], [1], [2]])
    assert found == {"swapped/caption_first": 1.0, "swapped/picture_first": 0.0}


def test_half_of_an_exemplars_candidates_share_its_words():
    chosen = candidates_of(4, rows(30), 9, seed=0)
    assert chosen[0] == 4 and len(set(chosen)) == 9
    assert all(rows(30)[i]["caption"] == rows(30)[4]["caption"] for i in chosen[:5])
    assert set(chosen) <= set(candidates_of(4, rows(30), 20, seed=0))


def test_a_folded_unet_draws_pictures_of_its_size():
    pipe = tiny_pipeline(["a red square"], 16, 3, 8, seed=0)
    (picture,) = pipe("a red square", num_inference_steps=2).images
    assert picture.size == (16, 16)
    assert pipe.unet.unet.config.sample_size == 8 and pipe.unet.unet.config.in_channels == 12
    with pytest.raises(ValueError, match="multiple of 8"):
        tiny_pipeline(["a"], 12, 3, 8, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "x"}, "give --candidates"),
        ({"exemplars": 2}, "at least 3"),
        ({"exemplars": 20, "num_candidates": 10}, "at least --exemplars"),
        ({"change": "turned"}, "must be one of none, shifted"),
        ({"removed": 50, "alone": True}, "leave out --model"),
        ({"timesteps": 0}, "--timesteps must be at least 1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionOptions(**options)


def test_digits_are_captioned_by_what_stands_in_them():
    pytest.importorskip("sklearn")
    digits = captioned_digits()
    assert len(digits) == 1797 and digits[0]["image"].size == (8, 8)
    ink = {stroke: [] for stroke in ("a thin", "a bold")}
    for row in digits.select(range(300)):
        for stroke, found in ink.items():
            if row["caption"].startswith(stroke) and "seven" in row["caption"]:
                found.append(np.mean(row["image"]))
    assert max(ink["a thin"]) < min(ink["a bold"])


def test_exemplars_have_captions_of_their_own():
    chosen, others = choose_exemplars(rows(9), 3, seed=0)
    assert len({rows(9)[i]["caption"] for i in chosen}) == 3
    assert sorted([*chosen, *others]) == list(range(9))
    with pytest.raises(ValueError, match="there are 3"):
        choose_exemplars(rows(9), 4, seed=0)


def test_a_picture_is_nearest_to_itself():
    found = PixelDistance(adapter=DiffusionAdapter(stable_diffusion())).trace(rows(2, first=1), rows(5))
    assert [found.ranking(i)[0] for i in range(2)] == [1, 2]
    np.testing.assert_allclose(found.scores.max(axis=1), 0, atol=1e-9)


def test_drawings_that_equal_their_exemplar_are_at_no_distance_from_it():
    task = Task(rows(3), rows(3), [[0], [1], [2]])
    figures = likeness(
        PixelDistance(adapter=DiffusionAdapter(stable_diffusion())).trace(task.queries, task.candidates), task
    )
    assert figures["drawings/distance_to_exemplar"] == pytest.approx(0, abs=1e-9)
    assert figures["drawings/distance_to_candidates"] > 0


def test_standardised_scores_have_mean_0_and_deviation_1_over_the_queries():
    scores = np.random.default_rng(0).normal(3, 2, size=(6, 4)).astype(np.float32)
    scores[0, 1] = np.nan
    found = standardised(scores)
    assert np.isnan(found[0, 1])
    np.testing.assert_allclose(np.nanmean(found, axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(np.nanstd(found, axis=0), 1, atol=1e-6)
    with pytest.raises(ValueError, match="at least 3"):
        standardised(scores[:2])
