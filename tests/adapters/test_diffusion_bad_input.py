"""Rows as sets from the web have them: what can't be read is named and ranked last, and the run goes on."""

import io
import warnings

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as Pillow

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import DiffusionAdapter
from hf_forward_inf.adapters.diffusion_inputs import values_of
from hf_forward_inf.baselines import PixelDistance
from hf_forward_inf.passes.loss_pass import LossPass
from tests.helpers.drawing import rows, square, stable_diffusion
from tests.helpers.shards import encoded

STORED = Features({"image": Image(decode=False), "caption": Value("string")})


def stored(image, format="PNG"):
    file = io.BytesIO()
    image.save(file, format=format)
    return file.getvalue()


def table(images, captions=None):
    images = [{"bytes": image, "path": None} if isinstance(image, bytes) else image for image in images]
    return Dataset.from_dict({"image": images, "caption": captions or ["a red square"] * len(images)}, features=STORED)


@pytest.fixture
def tracer():
    adapter = DiffusionAdapter(stable_diffusion(), timesteps=1)
    return ForwardInf(adapter=adapter, ascent=AscentConfig(direction="gradient", radius=0.05))


UNREADABLE = {
    "Pillow does not know its format": b"GIF89a but not really",
    "runcated": encoded(0)[:400],
    "there is no image": None,
    "No such file": {"bytes": None, "path": "missing.png"},
    "decompression bomb": stored(Pillow.new("1", (20000, 20000))),
    "is a web address, and nothing is downloaded": {"bytes": None, "path": "https://example.org/a.jpg"},
}


def test_what_cannot_be_read_is_named_with_its_reason_and_has_no_score(tracer):
    good = [encoded(i) for i in range(3)]
    candidates = table([*good, *UNREADABLE.values()])
    with pytest.warns(UserWarning) as told:
        found = tracer.trace(candidates.select([1]), candidates)
    texts = [str(warning.message) for warning in told]
    assert len(texts) == 2
    assert "Candidates rows 3, 4, 5, 6, 7, 8 (6 rows) can't be read (row 3: " in texts[0]
    assert all(reason in texts[0] for reason in list(UNREADABLE)[:5]) and texts[0].count("; row") == 4
    assert "Candidates rows 3, 4, 5, 6, 7, 8 (6 rows): the loss is NaN" in texts[1]
    assert np.isnan(found.scores[0]).tolist() == [False] * 3 + [True] * 6
    assert found.ranking(0)[0] == 1 and len(found.top(0)) == 3
    with pytest.warns(UserWarning, match="can't be read"):  # told again, though nothing is read again
        tracer.trace(candidates.select([1]), candidates)


@pytest.mark.parametrize("reason", UNREADABLE)
def test_each_reason_is_told(reason):
    values, why = values_of([UNREADABLE[reason]], (8, 8), 3)
    assert reason in why
    assert len(values) == 1 and values[0].shape == (3, 8, 8) and np.isnan(values[0]).all()


def test_images_of_every_kind_are_read(tracer):
    red = Pillow.new("RGB", (16, 16), "red")
    clear = Pillow.new("RGBA", (16, 16), (255, 0, 0, 0))
    images = [
        *(stored(red.convert(mode), format) for mode, format in (("CMYK", "TIFF"), ("P", "PNG"), ("L", "PNG"))),
        stored(clear), stored(Pillow.new("RGB", (1, 1), "red")), stored(Pillow.new("RGB", (20000, 4), "red")),
    ]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = tracer.trace(rows(1), table(images))
    assert np.isfinite(found.scores).all()
    plain, corner = values_of([red], (16, 16), 3)[0][0], values_of([images[3]], (16, 16), 3)[0][0]
    for i in (1, 4, 5):
        np.testing.assert_array_equal(values_of([images[i]], (16, 16), 3)[0][0], plain)
    assert (corner == 1).all()  # what is transparent is white


def test_of_a_picture_that_is_not_square_the_centre_is_seen(tracer):
    wide = Pillow.new("RGB", (48, 16), "white")
    wide.paste(square(3), (16, 0))
    losses = LossPass(tracer.adapter, table([stored(wide), stored(square(3))])).base()
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_an_empty_caption_and_none_are_an_empty_prompt(tracer):
    losses = LossPass(tracer.adapter, table([encoded(0)] * 3, ["", None, "a red square"])).base()
    assert np.isfinite(losses).all()
    assert losses[0] == losses[1] != losses[2]


def test_captions_that_are_truncated_are_counted(tracer, capsys):
    candidates = table([encoded(i) for i in range(3)], ["a red square", "a red square " * 50, ""])
    with pytest.warns(UserWarning, match="are truncated: of 3 rows, 1 loses its end"):
        LossPass(tracer.adapter, candidates)
    assert "truncated" not in capsys.readouterr().err


def test_equal_rows_and_ids_are_told_apart_by_their_number(tracer):
    candidates = rows(4).select([0, 1, 0, 2]).add_column("id", ["x", "x", "x", "y"])
    found = tracer.trace(rows(1), candidates)
    assert found.scores[0, 0] == pytest.approx(found.scores[0, 2], rel=1e-5)
    assert sorted(found.ranking(0)[:2]) == [0, 2]
    assert found.top(0, 2)["id"][:] == ["x", "x"] and sorted(found.top(0, 2)["candidate"][:]) == [0, 2]


def test_of_a_query_that_is_unreadable_in_part_the_rest_is_traced(tracer):
    features = Features({"image": List(Image(decode=False)), "caption": Value("string")})
    picture = {"bytes": encoded(1), "path": None}
    broken = {"bytes": encoded(2)[:300], "path": "cut.jpg"}
    caption = ["a green square"]
    whole = Dataset.from_dict({"image": [[picture]], "caption": caption}, features=features)
    part = Dataset.from_dict({"image": [[picture, broken]], "caption": caption}, features=features)
    expected = tracer.trace(whole, rows(4)).scores
    with pytest.warns(UserWarning, match=r"Queries row 0 can't be read \(row 0: image 2 of 2, cut.jpg, "):
        found = tracer.trace(part, rows(4))
    np.testing.assert_allclose(found.scores, expected, rtol=1e-5)


def test_a_query_without_a_readable_picture_has_no_scores_and_others_do(tracer):
    queries = table([b"broken", encoded(1)])
    with pytest.warns(UserWarning) as told:
        found = tracer.trace(queries, rows(3))
    texts = " ".join(str(warning.message) for warning in told)
    assert "Queries row 0 can't be read" in texts and "Queries row 0: the gradient" in texts
    assert np.isnan(found.scores[0]).all() and np.isfinite(found.scores[1]).all()


def test_curvature_does_without_what_cannot_be_read(tracer):
    broken = [b"broken"] * 40  # more than a batch
    tracer = tracer.with_options(ascent=AscentConfig(radius=0.05, direction="cg", sample=64, iterations=2))
    with pytest.warns(UserWarning, match="can't be read"):
        found = tracer.trace(rows(1), table([*broken, encoded(0), encoded(1)]))
        with pytest.raises(ValueError, match="None of the 40 training examples drawn for the curvature can be read"):
            tracer.trace(rows(1), table(broken))
    assert np.isfinite(found.scores[0, 40:]).all() and np.isnan(found.scores[0, :40]).all()


def test_distances_leave_out_what_cannot_be_read(tracer):
    with pytest.warns(UserWarning, match="can't be read"):
        found = PixelDistance(adapter=tracer.adapter).trace(rows(1), table([encoded(0), b"broken"]))
    assert np.isnan(found.scores[0]).tolist() == [False, True]


def test_rows_of_a_stream_are_named_by_their_place(tracer):
    candidates = table([*(encoded(i) for i in range(5)), b"broken", encoded(5)])
    with pytest.warns(UserWarning) as told:
        found = tracer.trace_stream(rows(1), candidates.to_iterable_dataset(), chunk_size=2, top_k=9)
    texts = [str(warning.message) for warning in told]
    assert "Candidates row 5 can't be read (row 5: Pillow does not know its format" in texts[0]
    assert "Candidates row 5: the loss is NaN" in texts[1]
    assert found.config["unscored"] == 1 and len(found.candidates) == 6


def test_what_is_no_set_of_rows_is_refused_with_the_way_out(tracer):
    stream = rows(3).to_iterable_dataset()
    for options in ({}, {"time_budget": 1.0}):
        with pytest.raises(TypeError, match=r"The candidates are a stream. Use ForwardInf.trace_stream\(quer"):
            tracer.trace(rows(1), stream, **options)
    with pytest.raises(TypeError, match="The queries are a stream"):
        tracer.trace(stream, rows(3))
    with pytest.raises(TypeError, match="The candidates are a stream"):
        PixelDistance(adapter=tracer.adapter).trace(rows(1), stream)
    with pytest.raises(TypeError, match=r"not DatasetDict\. Take one of its splits: 'train' or 'test'"):
        tracer.trace(rows(1), DatasetDict({"train": rows(3), "test": rows(3)}))
    with pytest.raises(TypeError, match=r"The queries must be a datasets.Dataset, not list\."):
        tracer.trace([square(0)], rows(3))
