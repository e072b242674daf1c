import warnings

import numpy as np
import pandas as pd
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import CausalLMAdapter, ImageClassificationAdapter, SequenceClassificationAdapter
from hf_forward_inf.baselines import BM25
from hf_forward_inf.data.inputs import as_dataset, named, read_inputs
from tests.helpers.causal import questions, train_tokens, untrained
from tests.helpers.images import network, picture
from tests.helpers.line import points

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
COLUMNS = {"prompt": ["a", "c"], "completion": ["b", "d"]}
GRADIENT = AscentConfig(direction="gradient")


@pytest.mark.parametrize(
    "rows",
    [ROWS, pd.DataFrame(ROWS), Dataset.from_list(ROWS), COLUMNS, DatasetDict(train=Dataset.from_list(ROWS))],
)
def test_rows_may_be_a_list_a_frame_columns_or_a_dataset(rows):
    assert as_dataset(rows, "queries").to_list() == ROWS


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "csv", "folder"])
def test_rows_may_be_a_file_or_a_folder(ending, tmp_path):
    rows, path = Dataset.from_list(ROWS), tmp_path / f"rows.{ending}"
    {"parquet": rows.to_parquet, "jsonl": rows.to_json, "csv": rows.to_csv, "folder": rows.save_to_disk}[ending](path)
    assert as_dataset(path, "candidates").to_list() == ROWS
    assert as_dataset(str(path), "queries").to_list() == ROWS


def test_rows_may_be_a_folder_of_pictures_with_a_folder_for_each_class(tmp_path):
    for label in ("cats", "dogs"):
        (tmp_path / label).mkdir()
        picture(len(label)).save(tmp_path / label / "one.png")
    rows = as_dataset(tmp_path, "candidates")
    assert rows.features["label"].names == ["cats", "dogs"] and len(rows) == 2


TALK = [{"role": "user", "content": "hello"}]


@pytest.mark.parametrize(
    "row",
    [
        ROWS[0],
        {"messages": TALK},
        {"prompt": TALK, "completion": TALK},
        {"input_ids": [1, 2], "labels": [1, 2]},
        {"tokens": ["a", "b"], "ner_tags": [0, 1]},
    ],
)
def test_a_dictionary_of_values_is_one_row_lists_of_messages_and_tokens_included(row):
    assert as_dataset(row, "queries").to_list() == [row]


@pytest.mark.parametrize("columns", [{"messages": [TALK, TALK]}, {"input_ids": [[1, 2], [3]]}, {"text": ["a", "b"]}])
def test_a_dictionary_of_lists_is_columns(columns):
    assert as_dataset(columns, "queries").to_dict() == columns


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ({"prompt": ["a"], "completion": ["b", "c"]}, ValueError, "`prompt` has 1, `completion` has 2"),
        ("nowhere/train.parquet", FileNotFoundError, "There is no file or folder nowhere/train.parquet"),
        (
            DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS)),
            TypeError,
            "not DatasetDict. Take one of its splits: 'train' or 'test'",
        ),
        (["a", "b"], TypeError, "not list."),
        ([], TypeError, "not list."),
        (Dataset.from_list(ROWS).select([]), ValueError, "There are no queries: the dataset is empty"),
    ],
)
def test_what_is_not_rows_is_refused_with_what_to_do(rows, error, message):
    with pytest.raises(error) as caught:
        as_dataset(rows, "queries")
    assert message in str(caught.value)


def test_traces_take_rows_as_people_have_them(line):
    queries, candidates = points(((3, 1), 0)), points(((3, 1), 0), ((1, -3), 7.5))
    tracer = ForwardInf(adapter=line)
    expected = tracer.trace(queries, candidates)
    for given in (candidates.to_list(), candidates.to_dict(), candidates.to_pandas()):
        found = tracer.trace(queries[0], given)
        np.testing.assert_array_equal(found.scores, expected.scores)
    texts = pd.DataFrame({"text": ["a b", "c d"]})
    assert BM25().trace({"text": "a b"}, texts).ranking(0)[0] == 0


@pytest.fixture(scope="module")
def plain():
    """A causal model whose tokenizer has no chat template."""
    tokens = train_tokens()
    tokens.chat_template = None
    return untrained("llama", len(tokens)), tokens


@pytest.fixture(scope="module")
def chat():
    tokens = train_tokens()
    return untrained("llama", len(tokens)), tokens


def test_other_names_of_inputs_and_targets_are_read_and_said(model, tokenizer, candidates, queries):
    """Each dataset has names of its own."""
    own = ("inputs_pretokenized", "targets_pretokenized")
    tracer = ForwardInf(model, tokenizer, ascent=GRADIENT)
    expected = tracer.trace(queries.select_columns(own), candidates.select_columns(own)).scores
    others = candidates.select_columns(own).rename_columns(dict(zip(own, ("source", "target"), strict=True)))
    with pytest.warns(UserWarning, match="candidates are read under other names: `source` as `inputs_pretok"):
        found = tracer.trace(queries, others)
    np.testing.assert_array_equal(found.scores, expected)
    assert found.candidates.column_names == list(own)


def test_questions_without_answers_are_asked_whatever_their_name(chat):
    tracer = ForwardInf(*chat, ascent=GRADIENT)
    candidates = questions().rename_columns({"prompt": "question", "completion": "answer"})
    asked = ["What is the capital of Peru?"]
    expected = tracer.trace_generation(asked, candidates)
    with pytest.warns(UserWarning, match="queries are read under other names: `question` as `messages`"):
        found = tracer.trace({"question": asked, "id": [7]}, candidates)
    assert found.queries["output_ids"][0] == expected.queries["output_ids"][0]
    assert found.queries["id"][0] == 7
    np.testing.assert_array_equal(found.scores, expected.scores)


def test_inputs_without_targets_are_answered_whatever_their_name(model, tokenizer, candidates, queries):
    asked = {"source": queries["inputs_pretokenized"][:]}
    with pytest.warns(UserWarning, match="queries are read under other names: `source` as `inputs_pretokenized`"):
        read, _ = read_inputs(ForwardInf(model, tokenizer).adapter, asked, candidates)
    assert read.to_dict() == {"inputs_pretokenized": asked["source"]}


def test_plain_prompts_over_conversations_are_continued_with_a_warning(chat, plain):
    talks = [[{"role": "user", "content": "Peru?"}, {"role": "assistant", "content": "Lima."}]]
    with pytest.warns(UserWarning, match="The queries' `prompt` is continued as it is, and the candidates are conver"):
        read_inputs(CausalLMAdapter(*chat), {"prompt": ["Peru?"]}, {"messages": talks})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_inputs(CausalLMAdapter(*chat), {"prompt": ["Peru?"]}, {"text": ["It is Lima."]})
        read_inputs(CausalLMAdapter(*plain), {"prompt": ["Peru?"]}, questions())


def test_a_pair_of_other_names_is_a_chat_where_there_is_a_template(chat, plain):
    rows = questions().rename_columns({"prompt": "query", "completion": "response"})
    with pytest.warns(UserWarning, match="`query` as `question`, `response` as `answer`"):
        _, read = read_inputs(CausalLMAdapter(*chat), rows, rows)
    assert read.column_names == ["question", "answer"]
    with pytest.raises(
        ValueError, match=r"Rows need columns `messages`; .* these have query, response.*--input_column"
    ):
        ForwardInf(*plain, ascent=GRADIENT).trace(rows, rows)
    after = questions().rename_columns({"completion": "response"})
    with pytest.warns(UserWarning, match="`response` as `completion`"):
        assert read_inputs(CausalLMAdapter(*plain), after, after)[1].column_names == ["prompt", "completion"]


def test_pictures_and_classes_are_found_by_their_type_unless_there_are_several():
    adapter = ImageClassificationAdapter(network())
    features = Features({"photograph": Image(), "kind": ClassLabel(names=["a", "b", "c"]), "place": Value("string")})
    rows = Dataset.from_dict({"photograph": [picture(0)], "kind": [1], "place": ["x"]}, features=features)
    with pytest.warns(UserWarning, match="`photograph` as `image`, `kind` as `label`"):
        queries, candidates = read_inputs(adapter, rows, rows)
    assert queries.column_names == candidates.column_names == ["image", "label", "place"]
    two = rows.add_column("breed", [2], feature=features["kind"])
    with pytest.warns(UserWarning, match="`photograph` as `image`. If others"):
        assert "label" not in read_inputs(adapter, two, two)[1].column_names


def test_the_only_column_of_texts_is_what_a_classifier_reads():
    from tests.adapters.test_sequence_classification import classifier, tokenizer

    adapter = SequenceClassificationAdapter(classifier(), tokenizer())
    rows = Dataset.from_dict({"tweet": ["yes", "maybe"], "label": [0, 1]})
    with pytest.warns(UserWarning, match="`tweet` as `text`"):
        assert read_inputs(adapter, rows, rows)[0].column_names == ["text", "label"]


def test_named_columns_take_the_names_that_the_adapter_reads(chat, plain):
    rows = Dataset.from_dict({"asked": ["a"], "said": ["b"], "prompt": ["c"]})
    columns = ("asked", "said")
    read = named(rows, CausalLMAdapter(*plain), columns, "candidates")
    assert read.to_list() == [{"prompt": "a", "completion": "b"}]
    read = named(rows, CausalLMAdapter(*chat), columns, "candidates")
    assert read.to_list() == [{"question": "a", "answer": "b", "prompt": "c"}]
    alone = named(rows, CausalLMAdapter(*plain), (None, "said"), "candidates")
    assert alone["text"][:] == ["b"]
    assert named(rows.remove_columns("said"), CausalLMAdapter(*plain), columns, "queries").column_names == ["prompt"]
    with pytest.raises(ValueError, match="The candidates have no column `spoken`; they have asked, said, prompt"):
        named(rows, CausalLMAdapter(*plain), ("asked", "spoken"), "candidates")
