import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from transformers import BertConfig, BertForTokenClassification

from hf_forward_inf import AscentConfig, ForwardInf
from hf_forward_inf.adapters import TokenClassificationAdapter, adapter_for
from hf_forward_inf.baselines import RepresentationSimilarity, TracIn
from tests.helpers.texts import SENTENCES, WORDS, assert_close, plain_scores, randomised, tokenizer

PLAIN = AscentConfig(direction="gradient", radius=0.3)
PLACES = ["Spain", "Peru", "Lima"]
# "Lima's" is three tokens for a tokenizer that cuts at punctuation.
SPLIT = [*(sentence.split() for sentence in SENTENCES), ["Lima's", "cat"]]
TAGS = [[int(word[:4] in ("Spai", "Peru", "Lima")) for word in words] for words in SPLIT]


@pytest.fixture(autouse=True)
def few_targets(monkeypatch):
    monkeypatch.setattr("hf_forward_inf.curvature.kronecker.TARGETS", 24)  # quicker, and as good for this


def tagger(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, num_labels=2, **sizes, **options)
    return randomised(BertForTokenClassification(config))


def aligned(row, all_tokens=False):
    """A row's tokens and labels, by what the tokenizer says of words."""
    encoded = tokenizer()(SPLIT[row], is_split_into_words=True)
    labels, before = [], None
    for word in encoded.word_ids():
        counts = word is not None and (all_tokens or word != before)
        labels.append(TAGS[row][word] if counts else -100)
        before = word
    return torch.tensor([encoded["input_ids"]]), torch.tensor([labels])


@pytest.mark.parametrize("all_tokens", [False, True])
@pytest.mark.parametrize("column", ["ner_tags", "labels"])
def test_losses_and_scores_are_those_of_transformers_for_one_row(column, all_tokens):
    model, rows = tagger(), Dataset.from_dict({"tokens": SPLIT, column: TAGS})
    adapter = TokenClassificationAdapter(model, tokenizer(), label_all_tokens=all_tokens)

    def loss(row):
        ids, labels = aligned(row, all_tokens)
        return model(input_ids=ids, labels=labels).loss * (labels != -100).sum()

    features = adapter.encode(rows[:])
    assert features["terms"] == [len(tags) + 2 * (all_tokens and i == 6) for i, tags in enumerate(TAGS)]
    batch, expected = adapter.collate(features), [loss(row).item() for row in range(7)]
    np.testing.assert_allclose(adapter.loss(model, batch).detach(), expected, rtol=1e-5)
    outputs, summed = adapter.outputs_and_loss(model, batch)
    assert summed(outputs).item() == pytest.approx(sum(expected), rel=1e-5)
    found = ForwardInf(adapter=adapter, ascent=PLAIN).trace(rows.select([6]), rows)
    assert_close(found.scores[0], plain_scores(model, loss, 6, range(7), 0.3))


def test_words_are_classified_and_what_was_found_is_traced_word_by_word():
    model, rows = tagger(), Dataset.from_dict({"tokens": SPLIT, "ner_tags": TAGS})
    tracer = ForwardInf(model, tokenizer())
    expected = []
    for row in range(7):
        ids, labels = aligned(row)
        best = model(input_ids=ids).logits[0].argmax(-1)
        expected.append(best[labels[0] != -100].tolist())
    assert tracer.adapter.answer({"tokens": SPLIT}) == expected
    found = tracer.trace_generation(SPLIT[:2], rows)
    assert found.queries["ner_tags"][:] == expected[:2]
    assert tracer.adapter.term_texts(tracer.adapter.encode(rows[6:]))[0][1].strip() == "Lima"


def test_baselines_run():
    model, rows = tagger(), Dataset.from_dict({"tokens": SPLIT, "ner_tags": TAGS})
    for attributor in (TracIn(model, tokenizer()), RepresentationSimilarity(model, tokenizer())):
        assert np.isfinite(attributor.trace(rows.select([1]), rows).scores).all()


def test_classes_are_matched_by_name():
    adapter = adapter_for(tagger(id2label={0: "O", 1: "PLACE"}), tokenizer())
    reverse = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["PLACE", "O"]))})
    rows = Dataset.from_dict({"tokens": SPLIT[:2], "ner_tags": [[1 - t for t in tags] for tags in TAGS[:2]]}, reverse)
    assert adapter.prepare(rows)["ner_tags"][:] == TAGS[:2]
    named = Dataset.from_dict(
        {"tokens": SPLIT[:2], "labels": [[["O", "PLACE"][t] for t in tags] for tags in TAGS[:2]]}
    )
    assert adapter.prepare(named)["labels"][:] == TAGS[:2]
    ignored = Dataset.from_dict({"tokens": [["a", "cat"]], "tags": [[-100, 1]]})
    assert adapter.encode(adapter.prepare(ignored)[:])["terms"] == [1]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"tokens": [["a", "cat"], ["yes"]], "ner_tags": [[0, 1], [0, 1]]}, r"row 1: it has 1 words and 2 labels"),
        ({"tokens": ["a cat", "yes"], "ner_tags": [[0, 1], [0]]}, r"row 0: `tokens` holds a str, not a list of words"),
        ({"tokens": [["a"], ["cat"]], "ner_tags": [[0], [2]]}, r"holds \[2\] in row 1; labels are lists of integers"),
        ({"tokens": [["a"], ["cat"]], "ner_tags": [[0], None]}, r"Nothing to predict in candidates row 1"),
        ({"tokens": [["a"]]}, "no column `ner_tags`"),
    ],
)
def test_rows_that_cannot_be_read_are_named(rows, message):
    good = Dataset.from_dict({"tokens": [["a"]], "ner_tags": [[0]]})
    with pytest.raises(ValueError, match=message):
        ForwardInf(tagger(), tokenizer(), ascent=PLAIN).trace(good, Dataset.from_dict(rows))
