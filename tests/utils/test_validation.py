import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict

from hf_forward_inf import ForwardInf
from hf_forward_inf.baselines import BM25
from hf_forward_inf.utils.validation import as_dataset
from tests.helpers.line import points

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]


@pytest.mark.parametrize("rows", [ROWS, pd.DataFrame(ROWS), Dataset.from_list(ROWS)])
def test_rows_may_be_a_list_a_frame_or_a_dataset(rows):
    assert as_dataset(rows, "queries").to_list() == ROWS


def test_a_dictionary_is_one_row():
    assert as_dataset(ROWS[0], "queries").to_list() == ROWS[:1]
    talk = {"messages": [{"role": "user", "content": "hello"}]}
    assert as_dataset(talk, "queries").to_list() == [talk]


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        ({"prompt": ["a"], "completion": ["b"]}, TypeError, "queries are a dictionary of lists: make them a dataset"),
        ("train.parquet", TypeError, "not str. Read files and hub names with hf_forward_inf.data.load_rows"),
        (DatasetDict(train=Dataset.from_list(ROWS)), TypeError, "not DatasetDict. Take one of its splits: 'train'"),
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
    found = tracer.trace(queries[0], candidates.to_list())
    np.testing.assert_array_equal(found.scores, expected.scores)
    assert found.candidates.to_list() == candidates.to_list()
    texts = pd.DataFrame({"text": ["a b", "c d"]})
    assert BM25().trace({"text": "a b"}, texts).ranking(0)[0] == 0
