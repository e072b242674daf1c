import math

import numpy as np
import pytest
from datasets import Dataset

from hf_forward_inf.baselines import BM25

ROWS = Dataset.from_dict(
    {
        "inputs_pretokenized": ["<extra_id_0> is in France", "<extra_id_0> is in Spain", "Cats like fish"],
        "targets_pretokenized": ["<extra_id_0> Paris", "<extra_id_0> Madrid", "<extra_id_0> yes"],
    }
)
QUERY = Dataset.from_dict(
    {"inputs_pretokenized": ["France owns <extra_id_0>"], "targets_pretokenized": ["<extra_id_0> Paris"]}
)


def bm25_plus(query, documents, k1=1.5, b=0.75, delta=1.0):
    """Lv and Zhai (2011), equation 5: log((N + 1) / df) (delta + tf (k1 + 1) / (k1 (1 - b + b |d| / avg) + tf))."""
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in query:
            df = sum(word in d for d in documents)
            tf = document.count(word)
            if df:
                saturation = tf * (k1 + 1) / (k1 * (1 - b + b * len(document) / mean) + tf)
                score += math.log((len(documents) + 1) / df) * (delta + saturation)
        scores.append(score)
    return scores


def test_scores_are_bm25_plus_with_the_answer_in_its_place():
    documents = [["Paris", "is", "in", "France"], ["Madrid", "is", "in", "Spain"], ["Cats", "like", "fish"]]
    found = BM25().trace(QUERY, ROWS)
    np.testing.assert_allclose(found.scores[0], bm25_plus(["France", "owns", "Paris"], documents), rtol=1e-5)


def test_without_the_answer_its_words_count_nothing():
    found = BM25(with_answer=False).trace(QUERY, ROWS)
    documents = [text.split() for text in ROWS["inputs_pretokenized"]]
    expected = bm25_plus(QUERY["inputs_pretokenized"][0].split(), documents)
    np.testing.assert_allclose(found.scores[0], expected, rtol=1e-5)


def test_it_gives_an_attribution_like_every_other():
    found = BM25().trace(QUERY, ROWS, top_k=2)
    assert found.method == "bm25"
    assert found.top(0)["inputs_pretokenized"][0] == "<extra_id_0> is in France"
    assert found.scores.shape == (1, 2)


def test_bad_rows_are_refused():
    with pytest.raises(ValueError, match="There are no candidates"):
        BM25().trace(QUERY, ROWS.select([]))
    with pytest.raises(ValueError, match="queries have no column `inputs_pretokenized`"):
        BM25().trace(QUERY.rename_column("inputs_pretokenized", "text"), ROWS)
