import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from hf_forward_inf.adapters import CausalLMAdapter, PreferenceAdapter
from hf_forward_inf.baselines import BM25
from tests.helpers.causal import questions, train_tokens, untrained

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


def test_words_that_repeat_and_words_that_no_candidate_has_count_as_in_the_formula():
    documents = ["a b a", "b", "", "c c c d"]
    queries = ["a a b", "nowhere", "", "d nowhere c"]
    found = BM25().trace(Dataset.from_dict({"text": queries}), Dataset.from_dict({"text": documents}))
    expected = [bm25_plus(query.split(), [text.split() for text in documents]) for query in queries]
    np.testing.assert_allclose(found.scores, expected, rtol=1e-5)
    np.testing.assert_array_equal(BM25().trace({"text": "a"}, {"text": ["", ""]}).scores, [[0, 0]])


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


def test_an_adapter_tells_which_columns_of_queries_and_of_candidates_are_texts():
    tokens = train_tokens()
    network = untrained("llama", len(tokens))
    rows = questions()
    said = [[{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
            for row in rows]  # fmt: skip
    pairs = rows.rename_column("completion", "chosen").add_column("rejected", [" No."] * len(rows))
    words = [[*row["prompt"].split(), *row["completion"].split()] for row in rows]
    expected = [bm25_plus(words[1], words), bm25_plus(words[1], [[*one, "No."] for one in words])]
    spans = rows.add_column("span", ["is"] * len(rows))  # names a part of the completion: its words count once
    language = CausalLMAdapter(network, tokens)
    preference = PreferenceAdapter(network, tokens, reference_model=untrained("llama", len(tokens)))
    for adapter, candidates, scores in (
        (language, rows, expected[0]),
        (language, spans, expected[0]),
        (language, Dataset.from_dict({"messages": said}), expected[0]),
        (preference, pairs, expected[1]),
    ):
        found = BM25(adapter=adapter).trace(spans.select([1]), candidates)
        np.testing.assert_allclose(found.scores[0], scores, rtol=1e-5)


def test_an_adapter_that_reads_no_texts_is_refused():
    tokens = train_tokens()
    encoded = Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[5, 6, 7]]})
    with pytest.raises(ValueError, match="The queries have no column of texts that is read: name one"):
        BM25(adapter=CausalLMAdapter(untrained("llama", len(tokens)), tokens)).trace(encoded, encoded)


def test_jax_is_not_started(tmp_path):
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("raise SystemExit('jax was imported')")
    code = "import sys; from hf_forward_inf.baselines.bm25 import _bm25s; _bm25s(); assert 'jax' not in sys.modules"
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": paths})
