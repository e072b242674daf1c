import numpy as np
from datasets import Dataset
from PIL import Image

from hf_forward_inf import Attribution


def test_the_preview_is_a_picture_of_the_size_that_sites_show_and_the_page_names_it(tmp_path):
    rows = Dataset.from_dict({"text": [f"A long sentence, number {i}, of many words. " * 9 for i in range(120)]})
    scores = np.random.default_rng(0).normal(size=(2, 120)).astype(np.float32)
    found = Attribution(scores, rows.select(range(2)), rows)
    found.to_html(tmp_path / "why.html", preview=tmp_path / "why.png")
    image = Image.open(tmp_path / "why.png")
    assert image.size == (1200, 630)
    pixels = np.asarray(image.convert("L"))
    assert (pixels < 128).any(axis=1).sum() > 200  # lines of text
    assert (pixels[:, -40:] == 255).all()  # none of which leaves the picture
    page = (tmp_path / "why.html").read_text()
    assert '<meta property="og:image" content="why.png">' in page
    found.to_html(tmp_path / "bare.html")
    assert "og:image" not in (tmp_path / "bare.html").read_text()
