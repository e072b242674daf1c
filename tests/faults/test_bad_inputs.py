"""Inputs that can't be read end a command with one line that says what is wrong, and leave no output."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value

from hf_forward_inf import AscentConfig, Attribution, ForwardInf
from hf_forward_inf.adapters import TensorAdapter
from hf_forward_inf.baselines import BM25
from hf_forward_inf.cli import main
from tests.helpers import digits
from tests.helpers.causal import train_tokens, untrained

TEXTS = [{"text": f"The capital of land {i} is town {i}."} for i in range(6)]
PAIRS = [{"prompt": f"Capital of land {i}?", "completion": f" Town {i}."} for i in range(6)]
GRADIENT = AscentConfig(direction="gradient", radius=0.1)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with a good and a cut-off file of weights, and one with NaN among its weights."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_tokens()
    model = untrained("llama", len(tokenizer))
    for name in ("good", "cut", "nan"):
        if name == "nan":
            model.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    weights = root / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return root


CASES = {
    "broken JSON": ("c.jsonl", lines(TEXTS)[:-9], "c.jsonl can't be read: JSON parse error"),
    "latin-1": ("c.jsonl", '{"text": "café"}\n'.encode("latin-1"), "c.jsonl can't be read: .* Save it as UTF-8"),
    "empty lines": ("c.jsonl", b"", "c.jsonl can't be read: it is empty"),
    "a lone surrogate": ("c.jsonl", b'{"text": "a \\ud800 b"}\n', "c.jsonl can't be read: .*surrogate pair"),
    "no parquet": ("c.parquet", b"garbage" * 9, "c.parquet can't be read: Parquet magic bytes not found"),
    "a null row": ("c.jsonl", b"null\n" + lines(TEXTS), "c.jsonl can't be read: its first row is null"),
    "numbers": ("c.jsonl", lines([{"text": 1}]), "row 0: `text` holds int where a text"),
    "a null": ("c.jsonl", lines([*PAIRS, {"prompt": "a", "completion": None}]), "candidates row 6: `completion`"),
    "other columns": ("c.csv", b"a,b\nx,1\ny,2\n", "these have a, b"),
    "no such file": ("there.jsonl", None, "There is no file or folder .*c.jsonl"),
    "an unknown ending": ("c.txt", b"text", "has an unknown ending"),
}


@pytest.mark.parametrize("case", CASES)
def test_candidates_that_cannot_be_read(folder, tmp_path, capfd, case):
    name, data, message = CASES[case]
    (tmp_path / name).write_bytes(data or b"")
    queries = PAIRS[:1] if case == "a null" else TEXTS[:1]
    assert_refused(tmp_path, capfd, folder / "good", name if data is not None else "c.jsonl", lines(queries), message)


def assert_refused(tmp_path, capfd, model, candidates, queries, message):
    (tmp_path / "q.jsonl").write_bytes(queries)
    given = {"model": model, "candidates": tmp_path / candidates, "queries": tmp_path / "q.jsonl"}
    words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    capfd.readouterr()
    assert main(["trace", *words, "--output", str(tmp_path / "out"), "--no_baselines"]) == 1
    said = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(said) == 1 and said[0].startswith("error: ")
    assert re.search(message, said[0]), said[0]
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("model", "message"),
    [("cut", "The weights of .*cut can't be read"), ("nan", "predictions for training examples are NaN or infinite")],
)
def test_models_that_cannot_be_used(folder, tmp_path, capfd, model, message):
    (tmp_path / "c.jsonl").write_bytes(lines(TEXTS))
    assert_refused(tmp_path, capfd, folder / model, "c.jsonl", lines(TEXTS[:1]), message)


def test_one_empty_answer_among_queries(folder, tmp_path, capfd):
    (tmp_path / "c.jsonl").write_bytes(lines(PAIRS))
    queries = lines([PAIRS[0], {"prompt": "a", "completion": ""}])
    assert_refused(tmp_path, capfd, folder / "good", "c.jsonl", queries, "queries row 1: `completion` is empty")


def test_an_output_without_a_name(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.jsonl").write_bytes(lines(TEXTS))
    words = ["--model", str(folder / "good"), "--candidates", "c.jsonl", "--queries", "c.jsonl", "--output", ""]
    assert main(["trace", *words]) == 1
    assert "--output is empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["c.jsonl"]


@pytest.mark.parametrize("kind", ["torch", "numpy", "arrow", "pandas"])
def test_formatted_rows_are_read_as_they_are_stored(tmp_path, kind):
    tokenizer = train_tokens()
    tracer = ForwardInf(untrained("llama", len(tokenizer)), tokenizer, ascent=GRADIENT)
    rows = Dataset.from_list(TEXTS)
    expected = tracer.trace(rows.select([1]), rows)
    formatted = rows.with_format(kind)
    found = tracer.trace(formatted.select([1]), formatted)
    np.testing.assert_array_equal(found.scores, expected.scores)
    found.save_to_disk(tmp_path / "saved")
    assert type(found).load_from_disk(tmp_path / "saved").top(0)[:] == expected.top(0)[:]

    network = TensorAdapter(torch.nn.Linear(64, 10))
    rows = digits.rows(0, 6)
    tracer = ForwardInf(adapter=network, ascent=GRADIENT)
    expected = tracer.trace(rows, rows).scores
    np.testing.assert_array_equal(tracer.trace(rows.with_format(kind), rows.with_format(kind)).scores, expected)


def test_a_transform_is_not_applied_and_a_warning_says_so():
    tokenizer = train_tokens()
    tracer = ForwardInf(untrained("llama", len(tokenizer)), tokenizer, ascent=GRADIENT)
    rows = Dataset.from_list(TEXTS)
    shouting = rows.with_transform(lambda batch: {"text": [text.upper() for text in batch["text"]]})
    with pytest.warns(UserWarning, match=r"candidates have a transform \(set_transform\), which is not applied"):
        found = tracer.trace(rows.select([1]), shouting)
    np.testing.assert_array_equal(found.scores, tracer.trace(rows.select([1]), rows).scores)


def test_word_overlap_downloads_no_pictures():
    features = Features({"text": Value("string"), "image": Image()})
    rows = {"text": ["a cat", "a dog"], "image": [{"bytes": None, "path": "http://localhost:9/cat.png"}] * 2}
    rows = Dataset.from_dict(rows, features=features)
    assert (BM25().score(rows.select_columns("text"), rows).argmax(axis=1) == [0, 1]).all()


def test_a_folder_that_is_no_model(folder, tmp_path, capfd):
    shutil.copytree(folder / "good", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"hidden_size": 3}')
    (tmp_path / "c.jsonl").write_bytes(lines(TEXTS))
    assert_refused(tmp_path, capfd, tmp_path / "model", "c.jsonl", lines(TEXTS[:1]), "Unrecognized model")


def test_half_a_character_leaves_no_empty_page(tmp_path):
    rows = Dataset.from_list(TEXTS)
    found = Attribution(np.ones((1, 6), dtype=np.float32), rows.select([0]), rows)
    found.to_html(tmp_path / "page.html", title="half a \ud800 character")
    assert "half a ? character" in (tmp_path / "page.html").read_text()


def test_a_result_is_not_saved_through_a_link(tmp_path):
    (tmp_path / "precious.json").write_text("mine")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "attribution.json").symlink_to(tmp_path / "precious.json")
    rows = Dataset.from_list(TEXTS)
    found = Attribution(np.ones((1, 6), dtype=np.float32), rows.select([0]), rows)
    with pytest.raises(FileExistsError, match=r"attribution\.json is a symbolic link"):
        found.save_to_disk(tmp_path / "saved")
    assert (tmp_path / "precious.json").read_text() == "mine"


def test_a_page_downloads_no_pictures_and_leaves_out_corrupt_ones(tmp_path):
    values = [{"bytes": None, "path": "http://localhost:9/cat.png"}, {"bytes": b"no picture", "path": None}]
    features = Features({"text": Value("string"), "image": Image()})
    rows = Dataset.from_dict({"text": ["a cat", "a dog"], "image": values}, features=features)
    found = Attribution(np.ones((1, 2), dtype=np.float32), rows.select([0]), rows)
    found.to_html(tmp_path / "page.html")
    assert "a dog" in (tmp_path / "page.html").read_text()


def test_queries_whose_step_is_lost_in_rounding_are_named():
    tokenizer = train_tokens()
    tracer = ForwardInf(untrained("llama", len(tokenizer)), tokenizer, ascent=AscentConfig(radius=1e-30, sample=4))
    rows = Dataset.from_list(TEXTS)
    with pytest.warns(UserWarning, match=r"Queries rows 0, 1 .*: the step changes no candidate's loss, so all scores"):
        assert not tracer.trace(rows.select([0, 1]), rows).scores.any()
