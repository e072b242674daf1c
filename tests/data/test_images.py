import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pillow

from hf_forward_inf.data.images import class_names, count_classes, load_images


def picture(i):
    return Pillow.fromarray(np.full((4, 4), 10 * i, dtype=np.uint8))


def test_digits_are_there_without_a_download():
    pytest.importorskip("sklearn")
    rows = load_images()
    assert len(rows) == 1797 and rows.column_names == ["image", "label"]
    assert np.asarray(rows[0]["image"]).shape == (8, 8)
    assert class_names(rows) == [str(i) for i in range(10)] and count_classes(rows) == 10


def test_a_folder_of_folders_is_read_and_split_names_are_taken(tmp_path):
    for split in ("train", "test"):
        for i, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            picture(i).save(tmp_path / split / name / "0.png")
    rows = load_images(str(tmp_path), split="test")
    assert class_names(rows) == ["cat", "dog"] and rows["label"][:] == [0, 1]
    assert rows[1]["image"].size == (4, 4)


def test_columns_of_other_names_and_labels_that_are_words(tmp_path):
    features = Features({"img": Image(), "label": Value("int64"), "kind": Value("string")})
    rows = Dataset.from_dict(
        {"img": [picture(i) for i in range(3)], "label": [0, 1, 2], "kind": ["b", "a", "b"]}, features=features
    )
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    found = load_images(str(tmp_path / "rows.parquet"), label_column="kind")
    assert found.features["label"] == ClassLabel(names=["a", "b"]) and found["label"][:] == [1, 0, 1]
    found = load_images(str(tmp_path / "rows.parquet"))
    assert found["label"][:] == [0, 1, 2] and count_classes(found, found.select([0])) == 3
    with pytest.raises(ValueError, match="have no column `noise`; they have img, label, kind"):
        load_images(str(tmp_path / "rows.parquet"), label_column="noise")


def test_an_unclear_split_and_a_missing_file_are_told(tmp_path):
    rows = Dataset.from_dict(
        {"image": [picture(0)], "label": [0]}, features=Features({"image": Image(), "label": Value("int64")})
    )
    DatasetDict({"a": rows, "b": rows}).save_to_disk(tmp_path / "sets")
    with pytest.raises(ValueError, match="has the splits a, b, and none is called test"):
        load_images(str(tmp_path / "sets"), split="test")
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        load_images(str(tmp_path / "nothing.parquet"))
