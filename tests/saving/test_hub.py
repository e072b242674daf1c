import shutil

import numpy as np
import pytest
from datasets import Dataset, get_dataset_config_names, load_dataset
from datasets import Image as ImageFeature
from huggingface_hub import DatasetCard, HfApi
from PIL import Image

from hf_forward_inf import Attribution
from hf_forward_inf.saving import hub


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder in place of the hub: what the client's own calls upload and download."""
    folder = tmp_path / "server"

    def create_repo(self, repo_id, *, repo_type, private, exist_ok):
        assert (repo_type, exist_ok) == ("dataset", True)
        (folder / repo_id).mkdir(parents=True, exist_ok=True)
        return f"https://huggingface.co/datasets/{repo_id}"

    def upload_folder(self, *, repo_id, repo_type, folder_path, commit_message):
        assert repo_type == "dataset" and commit_message
        shutil.copytree(folder_path, folder / repo_id, dirs_exist_ok=True)

    def snapshot_download(repo_id, *, repo_type, revision, token):
        return str(folder / repo_id)

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    return folder


NATS = {"units": "loss", "reduction": "sum", "measure": "rise"}


@pytest.fixture
def found():
    rows = Dataset.from_dict({"text": [f"row {i}" for i in range(300)], "source": ["forum"] * 300})
    scores = np.random.default_rng(0).normal(size=(2, 300)).astype(np.float32)
    scores[0, 7] = 5000
    queries = Dataset.from_dict({"prompt": ["Capital of | Peru?", "And Chile?"], "completion": ["Lima", "Santiago"]})
    return Attribution(scores, queries, rows, config={**NATS, "radius": 1.0, "fingerprint": "x"})


@pytest.mark.parametrize("top_k", [None, 3])
def test_it_comes_back_from_the_hub(found, server, top_k):
    sent = found.keep(top_k)
    assert sent.push_to_hub("me/why", k=3) == "https://huggingface.co/datasets/me/why"
    again = Attribution.from_hub("me/why")
    np.testing.assert_array_equal(again.dense()[:, 7], sent.dense()[:, 7])
    assert again.top(0, 3).to_list() == sent.top(0, 3).to_list()
    assert [again.verdict(i) for i in range(2)] == [found.verdict(i) for i in range(2)]
    assert (again.method, again.config, again.total) == (found.method, found.config, 300)
    assert len(again.candidates) == (300 if top_k is None else len(np.unique(sent.indices)))


def test_datasets_loads_the_table_that_the_viewer_shows(found, server):
    found.push_to_hub("me/why", k=2)
    folder = str(server / "me/why")
    table = load_dataset(folder, split="train", cache_dir=str(server))
    assert table.column_names == ["query", "rank", "score", "level", "row", "asked", "text"]
    assert table[0] == {
        "query": 0, "rank": 1, "score": 5000.0, "level": "strong", "row": 7, "asked": "Capital of | Peru? → Lima",
        "text": "row 7",
    }  # fmt: skip
    assert len(table) == 4
    assert set(get_dataset_config_names(folder)) >= {"attribution", "queries", "candidates", "scores"}
    assert load_dataset(folder, "queries", split="train", cache_dir=str(server)).to_list() == found.queries.to_list()


def test_the_card_says_what_was_found_and_how_to_load_it(found, server):
    found.push_to_hub("me/why", k=2)
    card = DatasetCard.load(server / "me/why/README.md")
    assert "data-attribution" in card.data.tags
    assert [config["config_name"] for config in card.data.configs if config.get("default")] == ["attribution"]
    assert found.verdict(0) in card.text and 'Attribution.from_hub("me/why")' in card.text
    assert "Capital of \\| Peru" in card.text  # no cell of a table is split by what it holds
    assert "| radius | `1.0` |" in card.text and "fingerprint" not in card.text.split("## Settings")[1]


def test_pictures_are_uploaded_with_the_rows(server, tmp_path):
    for i in range(3):
        Image.new("RGB", (4, 4), (i * 40, 0, 0)).save(tmp_path / f"{i}.png")
    rows = Dataset.from_dict({"image": [str(tmp_path / f"{i}.png") for i in range(3)], "label": [0, 1, 0]})
    rows = rows.cast_column("image", ImageFeature())
    Attribution(np.eye(3, dtype=np.float32), rows, rows).push_to_hub("me/pictures")
    for i in range(3):
        (tmp_path / f"{i}.png").unlink()
    again = Attribution.from_hub("me/pictures")
    assert [one.getpixel((0, 0))[0] for one in again.candidates["image"]] == [0, 40, 80]


def test_a_dataset_without_an_attribution_is_refused(server):
    (server / "me/other").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="me/other holds no attribution"):
        Attribution.from_hub("me/other")
