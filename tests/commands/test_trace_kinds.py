"""The trace command on other models than those that say something, and on other columns than ours."""

import json

import pytest
from datasets import Dataset

from hf_forward_inf import Attribution
from hf_forward_inf.cli import main
from tests.helpers.causal import questions, train_tokens, untrained
from tests.helpers.images import picture, processor, vision_transformer


@pytest.fixture
def pictures(tmp_path):
    """A classifier's folder, a folder of pictures for each class, and one of pictures without labels."""
    for one in (vision_transformer(), processor()):
        one.save_pretrained(tmp_path / "model")
    for i in range(9):
        (tmp_path / "train" / f"class {i % 3}").mkdir(parents=True, exist_ok=True)
        picture(i).save(tmp_path / "train" / f"class {i % 3}" / f"{i}.png")
    (tmp_path / "asked").mkdir()
    for i in (10, 11):
        picture(i).save(tmp_path / "asked" / f"{i}.png")
    return tmp_path


def test_pictures_without_labels_are_classified_and_traced_to_a_folder_of_labelled_ones(pictures, capsys):
    words = ["--model", pictures / "model", "--candidates", pictures / "train", "--queries", pictures / "asked"]
    assert main(["trace", *map(str, words), "--output", str(pictures / "out"), "--direction", "gradient"]) == 0
    printed = capsys.readouterr().out
    assert "1. 10.png" in printed and "2. 11.png" in printed and "→ class " in printed
    found = Attribution.load_from_disk(pictures / "out" / "attribution")
    assert len(found) == 2 and found.queries["label"][0] in (0, 1, 2)
    assert found.candidates.features["label"].names == ["class 0", "class 1", "class 2"]


@pytest.fixture
def told(tmp_path):
    """The options of a trace of a causal model over rows of other columns."""
    tokens = train_tokens()
    tokens.chat_template = None
    for one in (untrained("llama", len(tokens)), tokens):
        one.save_pretrained(tmp_path / "model")
    rows = questions().rename_columns({"prompt": "told", "completion": "reply"})
    rows.to_json(tmp_path / "rows.jsonl")
    Dataset.from_dict({"told": ["What is the capital of Peru?"]}).to_csv(tmp_path / "asked.csv")
    given = {"model": "model", "candidates": "rows.jsonl", "queries": "asked.csv", "output": "out"}
    return [word for name, value in given.items() for word in (f"--{name}", str(tmp_path / value))]


def test_named_columns_are_read_and_the_result_is_json(told, capsys):
    named = ["--input-column", "told", "--target-column", "reply", "--direction", "gradient", "--json"]
    assert main(["trace", *told, *named]) == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    (answer,) = result["answers"]
    assert answer["asked"] == "What is the capital of Peru?" and len(answer["best"]) == 3
    assert all(row["text"].startswith("What is the capital of") for row in answer["best"])
    assert result["candidates"] == 5


def test_columns_that_are_not_known_are_an_error_that_names_the_options(told, capsys):
    assert main(["trace", *told]) == 1
    error = capsys.readouterr().err
    assert (
        "The candidates can't be read" in error
        and "these have told, reply" in error
        and "--input_column, --target_column" in error
    )


def test_options_may_come_from_a_file(told, tmp_path, capsys):
    words = dict(zip(told[::2], told[1::2], strict=True))
    lines = [f"{name[2:]}: {value}" for name, value in words.items()]
    lines += ["input_column: told", "target_column: reply", "baselines: false", "direction: gradient"]
    (tmp_path / "run.yaml").write_text("\n".join(lines))
    assert main(["trace", "--config", str(tmp_path / "run.yaml"), "--quiet"]) == 0
    assert capsys.readouterr().out.strip().startswith("1. What is the capital of Peru?")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["option/input_column"] == "told"
