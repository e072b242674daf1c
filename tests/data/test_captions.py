import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, Image, IterableDataset, load_dataset

from hf_forward_inf.data import captions, load_captioned
from hf_forward_inf.utils.images import read_image
from tests.helpers.drawing import rows, square
from tests.helpers.shards import encoded, write_shard, write_shards

SHARDS = {"id": "000000002", "caption": "a blue square", "url": None}


def write_parquet(path, **columns):
    pa.parquet.write_table(pa.table(columns), path)
    return str(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_shards_are_read_in_their_order(streaming, tmp_path):
    folder = write_shards(tmp_path / "laion", 6)
    for source in (folder, folder / "0*.tar"):
        found = load_captioned(str(source), streaming=streaming)
        assert isinstance(found, IterableDataset if streaming else Dataset)
        assert isinstance(found.features["image"], Image)
        found = list(found)
        assert [row["caption"] for row in found] == rows(6)["caption"][:]
        assert {name: found[2][name] for name in SHARDS} == SHARDS
        assert (np.asarray(read_image(found[5]["image"])) == np.asarray(square(5))).all()
    assert [row["id"] for row in load_captioned(str(folder / "00001.tar"))] == ["000000004", "000000005"]


def test_formats_mix_and_captions_may_stand_in_json(tmp_path):
    examples = [
        ("a", {"jpg": encoded(0), "json": {"caption": "zero", "url": "http://x/0", "width": None}}),
        ("b", {"png": encoded(1, "PNG"), "txt": "one", "json": {"caption": "other", "width": 3}, "cls": "7"}),
        ("c", {"webp": encoded(2, "WEBP"), "json": {"TEXT": "two", "exif": {"deep": [1]}}}),
        ("d", {"jpeg": encoded(3), "txt": ""}),
        ("e", {"txt": "no picture"}),
        ("f", {"jpg": encoded(5), "json": {"width": "wide"}}),
    ]
    write_shard(tmp_path / "0.tar", examples)
    # Such files lie beside shards.
    write_parquet(tmp_path / "0.parquet", url=["http://x/0"], key=["a"])
    (tmp_path / "0_stats.json").write_text("{}")
    found = list(load_captioned(str(tmp_path)))
    assert [row["caption"] for row in found] == ["zero", "one", "two", "", "no picture", None]
    assert [row["image"] is None for row in found] == [False, False, False, False, True, False]
    assert [row["url"] for row in found[:2]] == ["http://x/0", None]


def test_shards_on_the_hub_are_known_by_their_builder(tmp_path):
    folder = str(write_shards(tmp_path / "laion", 6))  # a folder of shards alone is a hub repository's layout
    assert captions._named_shards(folder, None) == {"path": folder, "name": None}
    found = load_dataset(folder, split="train", streaming=True, features=captions.SHARD)
    assert [row["__key__"] for row in found][-1] == "000000005"
    rows(2).to_parquet(tmp_path / "laion" / "train.parquet")
    for shard in (tmp_path / "laion").glob("*.tar"):
        shard.unlink()
    assert captions._named_shards(folder, None) is None


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_by_laions_names(streaming, tmp_path):
    pictures = [encoded(i) for i in range(3)]
    told = ["zero", "one", "two"]
    sources = [
        write_parquet(tmp_path / "0.parquet", jpg=pictures, TEXT=told, SAMPLE_ID=[5, 6, 7], similarity=[0.3] * 3),
        write_parquet(tmp_path / "1.parquet", image=[{"bytes": p, "path": None} for p in pictures], text=told),
        write_parquet(tmp_path / "2.parquet", image=pictures, txt=told, caption=["old"] * 3),
    ]
    for source, options in zip(sources, ({}, {}, {"caption_column": "txt"}), strict=True):
        stream = load_captioned(source, streaming=streaming, **options)
        found = list(stream)
        assert isinstance(stream.features["image"], Image)
        assert [row["caption"] for row in found] == told
        assert read_image(found[2]["image"]).size == (16, 16)
    first = next(iter(load_captioned(sources[0])))
    assert first["id"] == 5 and first["similarity"] == 0.3
    assert found[0]["caption_before"] == "old"


def test_several_parquet_files_and_saved_sets(tmp_path):
    rows(2).to_parquet(tmp_path / "a0.parquet")
    rows(2, 2).to_parquet(tmp_path / "a1.parquet")
    rows(4).save_to_disk(tmp_path / "saved")
    for source in ("a*.parquet", "saved"):
        for streaming in (False, True):
            found = list(load_captioned(str(tmp_path / source), streaming=streaming))
            assert [row["caption"] for row in found] == rows(4)["caption"][:]


def test_ids_that_stand_for_several_rows_are_named_and_kept(tmp_path):
    source = write_parquet(
        tmp_path / "0.parquet", jpg=[encoded(i) for i in range(3)], text=["a"] * 3, key=["x", "y", "x"]
    )
    with pytest.warns(UserWarning, match=r"1 ids occur in several rows \('x' in 2\)"):
        found = load_captioned(source)
    assert found["id"][:] == ["x", "y", "x"]


def test_a_shard_that_is_cut_off_is_told(tmp_path):
    folder = write_shards(tmp_path / "laion", 4)
    shard = folder / "00000.tar"
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(ValueError, match="unexpected end of data"):
        load_captioned(str(folder))


def test_what_holds_no_pictures_is_told(tmp_path):
    listed = write_parquet(tmp_path / "urls.parquet", URL=["http://x/0.jpg"], TEXT=["zero"])
    with pytest.raises(ValueError, match=r"`URL` holds web addresses, and nothing is downloaded: .* img2dataset"):
        load_captioned(listed)
    untold = write_parquet(tmp_path / "untold.parquet", jpg=[encoded(0)], note=["zero"])
    with pytest.raises(ValueError, match=r"no column `caption` or .* of captions; it has jpg, note. Give the name"):
        load_captioned(untold)
    with pytest.raises(ValueError, match="no column `words` of captions"):
        load_captioned(untold, caption_column="words")
    for name in ("nothing.tar", "nothing-*.tar", "nothing-*.parquet", "nothing.parquet"):
        with pytest.raises(FileNotFoundError, match="There is no file"):
            load_captioned(str(tmp_path / name))
