import io

import numpy as np
import pytest
from PIL import Image

from hf_forward_inf.utils import images as pictures
from hf_forward_inf.utils.images import UnreadableImage, images_of, pixels, png_uri, read_image


def encoded(image, format="PNG"):
    file = io.BytesIO()
    image.save(file, format=format)
    return file.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_images_of_every_mode_become_rgb(mode):
    image = Image.new("I;16", (9, 5), 65535) if mode == "I;16" else Image.new("RGB", (9, 5), "white").convert(mode)
    format = "TIFF" if mode == "CMYK" else "PNG"
    found = pixels(read_image({"bytes": encoded(image, format), "path": None}), (4, 4), 3)
    assert found.shape == (3, 4, 4) and found.dtype == np.uint8
    assert (found > 250).all()


def test_what_is_transparent_becomes_white():
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    found = pixels(image, (4, 4), 3)
    assert found[:, 0, 0].tolist() == [255, 0, 0]
    assert (found[:, 1:, 1:] == 255).all()


def test_the_centre_is_cropped_and_one_pixel_is_enough():
    wide = np.zeros((4, 12), dtype=np.uint8)
    wide[:, 4:8] = 255
    assert (pixels(read_image(wide), (4, 4), 1) == 255).all()
    assert (pixels(Image.new("RGB", (1, 1), "white"), (8, 8), 3) == 255).all()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "there is no image"),
        ({"bytes": None, "path": None}, "there is no image"),
        (b"GIF89a but not really", "does not know its format"),
        (encoded(Image.effect_noise((64, 64), 90))[:600], "truncated"),
        ("nowhere.png", "No such file"),
        (3.5, "."),
    ],
)
def test_what_is_no_image_is_refused(value, message):
    with pytest.raises(UnreadableImage, match=message):
        read_image(value)


def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(pictures, "MAX_PIXELS", 100)
    with pytest.raises(UnreadableImage, match="11 x 11 pixels are more than 100"):
        read_image(encoded(Image.new("L", (11, 11))))
    huge = encoded(Image.new("1", (14000, 14000)))
    with pytest.raises(UnreadableImage, match="decompression bomb"):
        read_image(huge)


def test_lists_of_numbers_are_one_image_and_lists_of_images_are_many():
    image = Image.new("L", (2, 2))
    assert len(images_of([image, image])) == 2
    assert len(images_of(["a.png", "b.png", "c.png"])) == 3
    assert len(images_of([[0, 1], [2, 3]])) == len(images_of(image)) == len(images_of({"bytes": b""})) == 1


def test_a_data_uri_holds_a_small_png():
    assert png_uri(read_image(np.zeros((400, 200), dtype=np.uint8))).startswith("data:image/png;base64,iVBOR")
