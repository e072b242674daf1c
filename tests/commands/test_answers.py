import json

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from hf_forward_inf import Attribution
from hf_forward_inf.commands.answers import QUERIES, answers, show
from hf_forward_inf.data import as_dataset
from tests.helpers.images import picture


def talk(asked, said):
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]


@pytest.fixture
def chats():
    rows = [talk("Capital of Peru?", "It is Lima."), talk("Capital of Cuba?", "It is Havana."), talk("Hello", "Hi")]
    queries = Dataset.from_dict({"messages": [talk("Peru's capital?", "Lima, surely.")]})
    return Attribution(
        np.array([[2.0, 0.5, np.nan]], dtype=np.float32), queries, Dataset.from_dict({"messages": rows})
    )


def test_answers_hold_what_was_said_and_the_best_rows_as_json_can_hold_them(chats):
    (answer,) = json.loads(json.dumps(answers(chats)))
    assert (answer["query"], answer["asked"], answer["said"]) == (0, "Peru's capital?", "Lima, surely.")
    assert answer["verdict"] == chats.verdict(0)
    assert [(row["rank"], row["candidate"], row["score"]) for row in answer["best"]] == [(1, 0, 2.0), (2, 1, 0.5)]
    assert answer["best"][0]["text"] == "Capital of Peru? → It is Lima."
    assert answer["best"][0]["matters"] == ["Capital", "Peru", "Lima"]  # shared with the query


def test_the_tokens_that_matter_are_those_with_the_highest_scores(chats):
    details = {
        "query": [0],
        "candidate": [0],
        "terms": [["It", " is", " Lima", "."]],
        "term_scores": [[0.1, 0, 1.9, 0]],
    }
    explained = Attribution(chats.scores, chats.queries, chats.candidates, details=Dataset.from_dict(details))
    assert answers(explained)[0]["best"][0]["matters"] == ["Lima"]


def test_what_is_printed_is_plain_text_where_there_is_no_terminal(chats, capsys):
    show(answers(chats), "out/report.html")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == ["1. Peru's capital?", "   → Lima, surely."]
    assert lines[5].split(maxsplit=3) == ["1", "2", "0", "Capital of Peru? → It is Lima."]
    assert lines[-1] == "The page: out/report.html"
    assert not any(line != line.rstrip() or "\x1b" in line for line in lines)


def test_what_matters_is_in_bold_on_a_terminal_and_is_not_cut_away(chats, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    long = Dataset.from_dict({"messages": [talk("Well. " * 40 + "Peru?", "Lima."), *chats.candidates["messages"][1:]]})
    show(answers(Attribution(chats.scores, chats.queries, long)), "out/report.html")
    printed = capsys.readouterr().out
    assert "Peru\x1b[0m?" in printed and "…" in printed
    assert "\x1b[1;32mLima, surely." in printed


def test_a_class_is_shown_by_its_name_and_a_sentinel_by_its_span(capsys):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["good", "bad"])})
    rows = Dataset.from_dict({"text": ["fine", "awful"], "label": [0, 1]}, features=features)
    (answer,) = answers(Attribution(np.ones((1, 2), dtype=np.float32), rows.select([1]), rows))
    assert (answer["asked"], answer["said"]) == ("awful", "bad")
    assert answer["best"][0]["text"] == "fine → good"
    facts = {"inputs_pretokenized": ["<extra_id_0> is here"], "targets_pretokenized": ["<extra_id_0> Lima"]}
    rows = Dataset.from_dict(facts)
    (answer,) = answers(Attribution(np.ones((1, 1), dtype=np.float32), rows, rows))
    assert answer["best"][0]["text"] == "Lima is here"
    show([answer], "page")
    assert "1. ____ is here\n   → Lima\n" in capsys.readouterr().out


def test_many_queries_are_counted_but_not_all_printed(capsys):
    rows = Dataset.from_dict({"text": [f"row {i}" for i in range(QUERIES + 2)]})
    found = answers(Attribution(np.eye(QUERIES + 2, dtype=np.float32), rows, rows))
    assert len(found) == QUERIES + 2
    show(found, "page")
    printed = capsys.readouterr().out
    assert "... and 2 more queries." in printed and f"\n{QUERIES + 1}. " not in printed


def test_a_picture_is_named_by_its_file_and_its_class(tmp_path, capsys):
    for label in ("cats", "dogs"):
        (tmp_path / label).mkdir()
        picture(len(label)).save(tmp_path / label / f"{label}.png")
    rows = as_dataset(tmp_path, "candidates")
    queries = rows.select([1]).remove_columns("label").add_column("label", [0])  # the model says a number
    (answer,) = answers(Attribution(np.array([[2.0, 1.0]], dtype=np.float32), queries, rows))
    assert (answer["asked"], answer["said"]) == ("dogs.png", "cats")
    assert [row["text"] for row in answer["best"]] == ["cats.png → cats", "dogs.png → dogs"]


def test_a_pair_of_texts_is_shown_with_its_class_and_a_class_without_a_name_by_its_number():
    features = Features(
        {"sentence1": Value("string"), "sentence2": Value("string"), "label": ClassLabel(names=["no"])}
    )
    rows = Dataset.from_dict({"sentence1": ["One."], "sentence2": ["Two."], "label": [0]}, features=features)
    query = Dataset.from_dict({"sentence1": ["Three."], "sentence2": ["Four."], "label": [7]})
    (answer,) = answers(Attribution(np.ones((1, 1), dtype=np.float32), query, rows))
    assert (answer["asked"], answer["said"]) == ("Three.\nFour.", "7")
    assert answer["best"][0]["text"] == "One.\nTwo. → no"
