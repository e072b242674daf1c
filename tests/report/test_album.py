import io

import numpy as np
from PIL import Image

from hf_forward_inf.report import album
from hf_forward_inf.report.album import Album, heatmap


def noise(seed, size=100):
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return {"bytes": file.getvalue(), "path": None}


def test_a_picture_is_stored_once_and_an_unreadable_one_not_at_all():
    pictures = Album()
    first, second = (pictures.add({"image": noise(0)}) for _ in range(2))
    assert first == second and len(pictures.stored()) == 1
    assert pictures.add({"images": [noise(1), {"bytes": b"no picture", "path": None}]})[0] != first[0]
    assert pictures.add({"text": "none"}) == [] and len(pictures.stored()) == 2
    assert (first[0].width, first[0].height, first[0].is_small) == (100, 100, False)


def test_many_pictures_are_smaller_and_all_together_stay_within_a_limit(monkeypatch):
    few, many = Album(expected=10), Album(expected=4000)
    [large], [small] = (one.add({"image": noise(0, 300)}) for one in (few, many))
    assert (large.width, small.width) == (224, 96)
    for i in range(9):
        few.add({"image": noise(i + 1, 300)})
    before = sum(len(data) for _, data in few.stored())
    monkeypatch.setattr(album, "LIMIT", before // 3)
    after = few.stored()
    assert sum(len(data) for _, data in after) <= before // 3 and len(after) == 10


def test_small_pictures_keep_every_pixel():
    pictures = Album(expected=4000)
    [picture] = pictures.add({"image": noise(0, 32)})
    [(_, data)] = pictures.stored()
    assert data.startswith("data:image/png") and picture.is_small


def test_a_heatmap_circles_its_hottest_places():
    detail = {"terms": ["0,0", "0,1", "1,0", "1,1"], "term_scores": [0.1, 4.0, -3.0, 3.0]}
    assert heatmap(detail).spots == [(0.75, 0.25), (0.75, 0.75)]
    assert heatmap(None) is None
